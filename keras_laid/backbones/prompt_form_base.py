"""The base class of forms: how a family's prompts hold images, for training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops
from keras_hub.models import CausalLMPreprocessor

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
        position_length: Integer, by how much an image, with what stands around
            it, moves the positions of the text after it.
        margin: Integer, tokens on either side of an image that mark it.
    """

    takes_images = True
    margin = 0

    def __init__(self, preprocessor: CausalLMPreprocessor) -> None:
        self.preprocessor = preprocessor
        self.image_length = 0

    @property
    def position_length(self) -> int:
        return self.image_length

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

    def response_tokens(self, response: str) -> list[int]:
        """Tokens of a response, with the end token if there is one."""
        tokens = self.tokenize(response) if response else []
        if self.preprocessor.add_end_token:
            tokens.append(self.preprocessor.tokenizer.end_token_id)
        return tokens

    def tokenize(self, text: str) -> list[int]:
        return [
            int(token) for token in as_array(self.preprocessor.tokenizer(text))
        ]


def packed(
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    length: int,
    fill: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of prompts with their responses, cut or padded to one length.

    Args:
        rows: Tokens of each prompt and its response.
        prompt_lengths: Sequence of integers, how many of them are the prompt's.
        length: Integer, the length of inputs.
        fill: Integer, the token of padding.

    Returns:
        A tuple of three `int32` arrays of shape `(batch, length + 1)`: tokens,
        1 where there is one, and 1 where it is the response's. They are one
        longer than inputs: the last token is only ever a label.
    """
    tokens = np.full((len(rows), length + 1), fill, "int32")
    present, marked = np.zeros_like(tokens), np.zeros_like(tokens)
    for index, (row, start) in enumerate(
        zip(rows, prompt_lengths, strict=True)
    ):
        tokens[index, : len(row)] = row[: length + 1]
        present[index, : len(row)] = 1
        marked[index, start : len(row)] = 1
    return tokens, present, marked


def as_array(value: Any) -> np.ndarray:
    return np.array(ops.convert_to_numpy(value))
