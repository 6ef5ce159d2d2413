"""How each family's prompts hold images or documents, for training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras_hub.models import CausalLMPreprocessor
from keras_hub.models import Gemma3CausalLMPreprocessor
from keras_hub.models import Gemma4CausalLMPreprocessor
from keras_hub.models import PaliGemmaCausalLMPreprocessor
from keras_hub.models import Qwen3_5CausalLMPreprocessor

from keras_laid.backbones.multi_image_pali_gemma import multi_image_preprocessor
from keras_laid.backbones.prompt_form_base import PromptForm
from keras_laid.backbones.prompt_form_base import packed
from keras_laid.backbones.qwen_form import Qwen3_5Form
from keras_laid.typing import Tensor


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
        tokens, present, marked = packed(
            [row for row, _, _ in rows],
            [prompt_length for _, _, prompt_length in rows],
            length,
            self.preprocessor.tokenizer.pad_token_id or 0,
        )
        segments = np.zeros_like(tokens)
        for index, (_, segment, _) in enumerate(rows):
            segments[index, : len(segment)] = segment[: length + 1]
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
        tokens += self.response_tokens(response)
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


FORMS = {
    PaliGemmaCausalLMPreprocessor: PaliGemmaForm,
    Gemma3CausalLMPreprocessor: Gemma3Form,
    Gemma4CausalLMPreprocessor: Gemma4Form,
}


def prompt_form(
    preprocessor: CausalLMPreprocessor,
    image_size: tuple[int, int] | None = None,
) -> PromptForm:
    """The form of a preprocessor's family.

    Args:
        preprocessor: That of KerasHub.
        image_size: Optional tuple of integers, height and width of images in
            pixels, where these decide how many tokens an image becomes: for
            Qwen 3.5. Defaults to `None`, those that the form chooses.

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
    if isinstance(preprocessor, Qwen3_5CausalLMPreprocessor):
        return Qwen3_5Form(preprocessor, image_size)
    for kind, form in FORMS.items():
        if isinstance(preprocessor, kind):
            return form(preprocessor)
    known = (*FORMS, Qwen3_5CausalLMPreprocessor)
    names = sorted(kind.__name__ for kind in known)
    raise ValueError(
        "The preprocessor's prompts with several images must be known, as of "
        f"{names}. Received: {type(preprocessor).__name__}"
    )


def sizes_read(sizes: Sequence[int], teacher_images: int | None) -> set[int]:
    """The numbers of images in prompts of the student and of the teacher."""
    if teacher_images is None:
        return {*sizes}
    return {*sizes, *(min(size, teacher_images) for size in sizes)}
