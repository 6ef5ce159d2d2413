"""How each family's prompts hold images or documents, for training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops
from keras_hub.models import CausalLMPreprocessor
from keras_hub.models import Gemma3CausalLMPreprocessor
from keras_hub.models import Gemma4CausalLMPreprocessor
from keras_hub.models import PaliGemmaCausalLMPreprocessor

from keras_laid.backbones.multi_image_pali_gemma import multi_image_preprocessor
from keras_laid.typing import Tensor

# Inputs are arrays, and a dictionary of them for the teacher.
Batch = tuple[dict[str, Any], np.ndarray, np.ndarray]
LENGTH_STEP = 16  # Lengths are multiples, so that few shapes are compiled.
# Where a prompt without a response ends; nothing is learned from the label.
NO_LABEL = -1


class PromptForm:
    """Prompts of one family, by its own preprocessor.

    Args:
        preprocessor: That of KerasHub.

    Attributes:
        takes_images: Boolean, or else prompts hold documents of text.
        image_length: Integer, positions that an image adds to a prompt, with
            what stands around it.
        margin: Integer, tokens on either side of an image that mark it.
    """

    takes_images = True
    margin = 0

    def __init__(self, preprocessor: CausalLMPreprocessor) -> None:
        self.preprocessor = preprocessor
        self.image_length = 0

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that images are made to have, in pixels."""
        size = self.preprocessor.image_converter.image_size
        if size is None:
            raise ValueError(
                "The size of images must be known. Received: a preprocessor "
                "that makes none, with image_converter.image_size=None. Give "
                "the converter an `image_size`, or pass `image_size` to "
                "`LongPrompts`."
            )
        height, width = size
        return height, width

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, by itself."""
        return [len(ids) for ids in self.preprocessor.tokenizer(list(texts))]

    def length(self, longest: int, images: int) -> int:
        """Tokens that a prompt has room for: a multiple of `LENGTH_STEP`.

        Args:
            longest: Integer, the most tokens of text, with the response and, in
                a decoder of text, the documents.
            images: Integer, images or documents in each prompt.
        """
        # Tokens may be others where texts meet, and some mark start and end.
        length = longest + images * (self.image_length + 1) + 2
        return -(-length // LENGTH_STEP) * LENGTH_STEP

    def encode_whole(
        self,
        images: Any,
        prompts: Sequence[str],
        responses: Sequence[str | None],
        length: int,
    ) -> Batch:
        """As `encode`, in more than `length` tokens where these are too few."""
        while True:
            batch = self.encode(images, prompts, responses, length)
            # A full row may have been cut.
            if not batch[0]["padding_mask"][:, -1].any():
                return batch
            length += LENGTH_STEP

    def encode(
        self,
        images: Any,
        prompts: Sequence[str],
        responses: Sequence[str | None],
        length: int,
    ) -> Batch:
        """A batch of prompts that hold equally many images.

        Args:
            images: `uint8` array of shape `(batch, images, height, width, 3)`,
                or for text a list of lists of strings, the documents.
            prompts: Sequence of strings.
            responses: Sequence of strings, or of `None` where the token after
                the prompt is marked, without a label.
            length: Integer, tokens of text that there is room for.

        Returns:
            A tuple `(x, y, sample_weight)` of NumPy arrays.
        """
        x, y, sample_weight = self.call(
            images, prompts, [text or "" for text in responses], length
        )
        x = {name: as_array(value) for name, value in x.items()}
        y = as_array(y).astype("int32")
        sample_weight = as_array(sample_weight).astype("float32")
        # Without a response the end of the text is the only marked token.
        silent = [text is None for text in responses]
        if any(silent) and not self.preprocessor.add_end_token:
            raise ValueError(
                "The preprocessor must add an end token for prompts without a "
                "response, of which it marks the end. Received: "
                "add_end_token=False. Set it, or give each example a response."
            )
        y[silent] = np.where(sample_weight[silent] > 0, NO_LABEL, y[silent])
        return x, y, sample_weight

    def call(
        self,
        images: Any,
        prompts: Sequence[str],
        responses: Sequence[str],
        length: int,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The same by the preprocessor, with an empty response for none."""
        raise NotImplementedError

    def stretched(
        self,
        stretching: Any,
        x: dict[str, np.ndarray],
        images: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Positions of a batch, by a `keras_laid.PositionStretching`."""
        return stretching.positions_in_text(x["vision_mask"], rng, self.margin)


class PaliGemmaForm(PromptForm):
    """All images stand before the text; their tokens are not part of it."""

    def __init__(self, preprocessor: PaliGemmaCausalLMPreprocessor) -> None:
        super().__init__(multi_image_preprocessor(preprocessor))

    def stretched(
        self,
        stretching: Any,
        x: dict[str, np.ndarray],
        images: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        batch, text_length = x["token_ids"].shape
        return stretching.positions(batch, images, text_length, rng)

    def call(
        self,
        images: Any,
        prompts: Sequence[str],
        responses: Sequence[str],
        length: int,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        return self.preprocessor(
            {"images": images, "prompts": prompts, "responses": responses},
            sequence_length=length,
        )


class PlaceholderForm(PromptForm):
    """A placeholder in the text stands for each image."""

    placeholder = ""

    def __init__(self, preprocessor: CausalLMPreprocessor) -> None:
        super().__init__(preprocessor)
        tokens = preprocessor.num_vision_tokens_per_image
        self.image_length = tokens + 2 * self.margin
        # From a number of images to a preprocessor of so many.
        self.by_count: dict[int, CausalLMPreprocessor] = {}

    def with_images(self, count: int) -> CausalLMPreprocessor:
        """The preprocessor for prompts of so many images."""
        if count not in self.by_count:
            config = self.preprocessor.get_config()
            config |= {
                "tokenizer": self.preprocessor.tokenizer,
                "image_converter": self.preprocessor.image_converter,
                "max_images_per_prompt": count,
                "sequence_length": count * self.image_length + 1,
            }
            self.by_count[count] = type(self.preprocessor)(**config)
        return self.by_count[count]

    def call(
        self,
        images: Any,
        prompts: Sequence[str],
        responses: Sequence[str],
        length: int,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        count = len(images[0])
        return self.with_images(count)(
            {
                "images": images,
                "prompts": [
                    self.placeholder * count + text for text in prompts
                ],
                "responses": responses,
            },
            sequence_length=length,
        )


class Gemma3Form(PlaceholderForm):
    """With a line break and a mark on either side of an image."""

    placeholder = "<start_of_image>"
    margin = 2


class Gemma4Form(PlaceholderForm):
    """With a mark on either side of an image."""

    placeholder = "<|image|>"
    margin = 1

    @property
    def image_size(self) -> tuple[int, int]:
        """A square of the size that gives all of an image's tokens."""
        converter = self.preprocessor.image_converter
        tokens = self.preprocessor.num_vision_tokens_per_image
        side = int(tokens**0.5)
        pixels = side * converter.patch_size * converter.pooling_kernel_size
        return pixels, pixels


class TextForm(PromptForm):
    """Documents stand before the prompt, each a segment of its own."""

    takes_images = False
    separator = "\n\n"

    def call(
        self,
        images: Any,
        prompts: Sequence[str],
        responses: Sequence[str],
        length: int,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        rows = [
            self.row(*each)
            for each in zip(images, prompts, responses, strict=True)
        ]
        # One token more than inputs have: the last one is only ever a label.
        tokens, segments, marked = (
            np.full((len(rows), length + 1), fill, "int32")
            for fill in (self.preprocessor.tokenizer.pad_token_id or 0, 0, 0)
        )
        present = np.zeros((len(rows), length + 1), "int32")
        for index, (row, segment, prompt_length) in enumerate(rows):
            end = min(len(row), length + 1)
            tokens[index, :end] = row[:end]
            segments[index, :end] = segment[:end]
            present[index, :end] = 1
            marked[index, prompt_length:end] = 1
        numbers = np.tile(np.arange(len(images[0])) + 1, (len(rows), 1))
        x = {
            "token_ids": tokens[:, :-1],
            "padding_mask": present[:, :-1],
            "segments": segments[:, :-1],
            "segment_numbers": numbers.astype("int32"),
        }
        return x, tokens[:, 1:], marked[:, 1:]

    def row(
        self, documents: Sequence[str], prompt: str, response: str
    ) -> tuple[list[int], list[int], int]:
        """Tokens, the number of each one's document, and of the prompt's."""
        tokens, segments = self.prompt_tokens(documents, prompt)
        prompt_length = len(tokens)
        tokens += self.tokenize(response) if response else []
        if self.preprocessor.add_end_token:
            tokens.append(self.preprocessor.tokenizer.end_token_id)
        segments += [0] * (len(tokens) - prompt_length)
        return tokens, segments, prompt_length

    def prompt_tokens(
        self, documents: Sequence[str], prompt: str
    ) -> tuple[list[int], list[int]]:
        """Tokens of documents and a prompt, and each one's document.

        Args:
            documents: Sequence of strings.
            prompt: String.

        Returns:
            A tuple of two lists of integers. Documents are numbered from 1; 0
            is no document.
        """
        tokens, segments = self.document_tokens(documents)
        ids = self.tokenize(prompt)
        return tokens + ids, segments + [0] * len(ids)

    def document_tokens(
        self, documents: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """What `prompt_tokens` returns, without the prompt."""
        tokens, segments = [], []
        if self.preprocessor.add_start_token:
            tokens.append(self.preprocessor.tokenizer.start_token_id)
            segments.append(0)
        for number, document in enumerate(documents, 1):
            ids = self.tokenize(document + self.separator)
            tokens += ids
            segments += [number] * len(ids)
        return tokens, segments

    def tokenize(self, text: str) -> list[int]:
        return [
            int(token) for token in as_array(self.preprocessor.tokenizer(text))
        ]


FORMS = {
    PaliGemmaCausalLMPreprocessor: PaliGemmaForm,
    Gemma3CausalLMPreprocessor: Gemma3Form,
    Gemma4CausalLMPreprocessor: Gemma4Form,
}


def prompt_form(preprocessor: CausalLMPreprocessor) -> PromptForm:
    """The form of a preprocessor's family.

    Raises:
        TypeError: If it is not a preprocessor of KerasHub.
        ValueError: If the family's prompts with images are unknown.
    """
    if not isinstance(
        preprocessor, (CausalLMPreprocessor, PaliGemmaCausalLMPreprocessor)
    ):
        raise TypeError(
            "`preprocessor` must be one of KerasHub. Received: "
            f"{preprocessor!r:.80}. Pass `model.preprocessor`."
        )
    if not getattr(preprocessor, "image_converter", None):
        return TextForm(preprocessor)
    for kind, form in FORMS.items():
        if isinstance(preprocessor, kind):
            return form(preprocessor)
    names = sorted(kind.__name__ for kind in FORMS)
    raise ValueError(
        "The preprocessor's prompts with several images must be known, as of "
        f"{names}. Received: {type(preprocessor).__name__}"
    )


def as_array(value: Any) -> np.ndarray:
    return np.array(ops.convert_to_numpy(value))


def sizes_read(sizes: Sequence[int], teacher_images: int | None) -> set[int]:
    """The numbers of images in prompts of the student and of the teacher."""
    if teacher_images is None:
        return {*sizes}
    return {*sizes, *(min(size, teacher_images) for size in sizes)}
