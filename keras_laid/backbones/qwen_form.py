"""How prompts of Qwen 3.5 hold images."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras_hub.models import Qwen3_5CausalLMPreprocessor

from keras_laid.backbones.prompt_form_base import LENGTH_STEP
from keras_laid.backbones.prompt_form_base import PromptForm
from keras_laid.backbones.prompt_form_base import as_array
from keras_laid.backbones.prompt_form_base import packed
from keras_laid.typing import Tensor


class Qwen3_5Form(PromptForm):
    """With a mark on either side of an image, and positions by M-RoPE.

    KerasHub's preprocessor makes prompts with images only for generation, so
    responses are added to these. All images of a batch have one size.

    Args:
        preprocessor: That of KerasHub, with an image converter.
        image_size: Optional tuple of integers, height and width of images in
            pixels. Defaults to `None`: a square of the fewest pixels that the
            converter makes, `min_pixels`.
    """

    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    margin = 1

    def __init__(
        self,
        preprocessor: Qwen3_5CausalLMPreprocessor,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(preprocessor)
        # From height and width in pixels to rows and columns of patches.
        self.grids: dict[tuple[int, int], tuple[int, int]] = {}
        if image_size is None:
            converter = preprocessor.image_converter
            side = round(math.sqrt(converter.min_pixels))
            rows, columns = self.grid((side, side))
            image_size = (
                rows * converter.patch_size,
                columns * converter.patch_size,
            )
        self.size = image_size
        self.image_length = self.tokens_of(image_size) + 2 * self.margin

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    @property
    def position_length(self) -> int:
        # M-RoPE gives an image as many positions as its longer side has tokens.
        longest = max(self.grid(self.size)) // self.merge
        return longest + 2 * self.margin

    @property
    def merge(self) -> int:
        """Patches on either side of the square that becomes one token."""
        return self.preprocessor.image_converter.spatial_merge_size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of `size`."""
        if size not in self.grids:
            image = np.zeros((*size, 3), "uint8")
            made = self.preprocessor.image_converter(image)["grid_thw"]
            _, rows, columns = as_array(made).tolist()
            self.grids[size] = rows, columns
        return self.grids[size]

    def tokens_of(self, size: tuple[int, int]) -> int:
        """How many tokens an image of `size` becomes, without its marks."""
        rows, columns = self.grid(size)
        return rows * columns // self.merge**2

    def call(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        responses: Sequence[str],
        length: int,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        placeholders = self.placeholder * images.shape[1]
        x = self.prompt_inputs(
            images, [placeholders + text for text in prompts], length
        )
        lengths = x["padding_mask"].sum(axis=1).tolist()
        rows = [
            ids[:count].tolist() + self.response_tokens(response)
            for ids, count, response in zip(
                x["token_ids"], lengths, responses, strict=True
            )
        ]
        # A response takes the place of padding, whose positions it keeps.
        tokens, present, marked = packed(
            rows,
            lengths,
            x["token_ids"].shape[1],
            self.preprocessor.tokenizer.pad_token_id,
        )
        x |= {"token_ids": tokens[:, :-1], "padding_mask": present[:, :-1]}
        return x, tokens[:, 1:], marked[:, 1:]

    def prompt_inputs(
        self, images: np.ndarray, texts: Sequence[str], length: int
    ) -> dict[str, Any]:
        """Prompts without responses, as inputs of the backbone.

        Args:
            images: `uint8` array of shape `(batch, images, height, width, 3)`.
            texts: Sequence of strings with a placeholder for each image.
            length: Integer, tokens that there is room for; there is more where
                these are too few.

        Returns:
            A dictionary of NumPy arrays, with the names of the preprocessor's
            outputs and an axis of prompts in each. Its `"position_ids"` are
            `"positions"`, of shape `(batch, 4, length)`.
        """
        self.check_placeholders(texts, images.shape[1])
        while True:
            made = self.preprocessor.generate_preprocess(
                {
                    "images": [*images.reshape(-1, *images.shape[2:])],
                    "prompts": list(texts),
                },
                sequence_length=length,
            )
            x = {name: as_array(value) for name, value in made.items()}
            if not x["padding_mask"][:, -1].any():
                break
            length += LENGTH_STEP  # A full row may have been cut.
        x["positions"] = x.pop("position_ids")
        # The preprocessor puts those of all prompts one after another.
        for name in ("pixel_values", "image_grid_thw", "vision_indices"):
            x[name] = x[name].reshape(len(texts), -1, *x[name].shape[1:])
        return x

    def check_placeholders(self, texts: Sequence[str], images: int) -> None:
        """Refuses texts with other placeholders than one for each image."""
        mark, video = (
            self.preprocessor.image_token,
            self.preprocessor.video_token,
        )
        for text in texts:
            if text.count(mark) != images or video in text:
                raise ValueError(
                    f"A prompt must have a {mark!r} for each image, which is "
                    f"put there for it, and no {video!r}. Received: {images} "
                    f"images, {text.count(mark)} times {mark!r} and "
                    f"{text.count(video)} times {video!r}. Leave them out of "
                    "prompts and questions."
                )

    def stretched(
        self,
        stretching: Any,
        x: dict[str, np.ndarray],
        images: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        is_image = x["token_ids"] == self.preprocessor.image_token_id
        moved = stretching.offsets_in_text(is_image, rng, self.margin)
        return x["positions"] + moved[:, None]
