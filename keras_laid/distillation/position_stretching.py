"""Short prompts whose positions range over a long window."""

from typing import Any
from typing import Self

import keras
import numpy as np
from numpy.typing import ArrayLike

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_kind


@keras.saving.register_keras_serializable(package="keras_laid")
class PositionStretching:
    """Draws positions that spread the images of a prompt over a long window.

    For each example, the length of a window is drawn uniformly, from the
    prompt's own number of images to `max_images`. The images take random slots
    in the window without changing their order, each image's own tokens stay
    contiguous, and the text follows the window.
    A model trained on few images this way sees the positions of many.

    Args:
        max_images: Integer, the longest window, in images.
        image_length: Integer, the number of tokens that an image adds to a
            prompt: `backbone.image_sequence_length`, and where images stand
            among text, also the tokens that mark the image. With M-RoPE, the
            number of positions that it adds, which is smaller: in Qwen 3.5, its
            rows or columns of tokens, whichever are more, and 2.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If `max_images` or `image_length` is less than 1, or a
            prompt has more than `max_images` images.
    """

    def __init__(self, max_images: int, image_length: int) -> None:
        check_integer("max_images", max_images)
        check_integer("image_length", image_length)
        self.max_images = max_images
        self.image_length = image_length

    def get_config(self) -> dict[str, Any]:
        return {
            "max_images": self.max_images,
            "image_length": self.image_length,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    def positions(
        self,
        batch: int,
        images: int,
        text_length: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Draws the positions of a batch whose images stand before the text.

        Args:
            batch: Integer, number of prompts.
            images: Integer, images in each prompt.
            text_length: Integer, text tokens in each prompt.
            rng: A `numpy.random.Generator`.

        Returns:
            An `int32` array of shape
            `(batch, images * image_length + text_length)`, in tokens.
        """
        check_integer("batch", batch)
        check_integer("images", images, at_least=0)
        check_integer("text_length", text_length, at_least=0)
        check_generator(rng)
        windows, slots = self._draw(batch, images, rng)
        starts = slots[..., None] * self.image_length
        image_positions = starts + np.arange(self.image_length)
        text = windows * self.image_length + np.arange(text_length)
        return np.concatenate(
            [image_positions.reshape(batch, -1), text], axis=1
        ).astype("int32")

    def positions_in_text(
        self, vision_mask: ArrayLike, rng: np.random.Generator, margin: int = 0
    ) -> np.ndarray:
        """Draws the positions of a batch whose images stand among the text.

        Text between images follows the image before it; text after the last
        image follows the window.

        Args:
            vision_mask: Integer or boolean array of shape `(batch, length)`: 1
                for tokens of images, 0 for the text that separates them.
                KerasHub's preprocessors of Gemma 3 and 4 make it.
            rng: A `numpy.random.Generator`.
            margin: Integer, 0 or more: how many tokens on either side of an
                image move with it, such as the marks of its start and end.
                Defaults to `0`.

        Returns:
            An `int32` array of shape `(batch, length)`, in tokens.
        """
        offsets = self.offsets_in_text(vision_mask, rng, margin)
        return np.arange(offsets.shape[1], dtype="int32") + offsets

    def offsets_in_text(
        self, vision_mask: ArrayLike, rng: np.random.Generator, margin: int = 0
    ) -> np.ndarray:
        """Draws by how much the positions of a batch grow.

        The arguments are those of `positions_in_text`. Where a model does not
        count positions token by token, as Qwen 3.5 with images, the result is
        added to its own positions, and `image_length` is in positions.

        Returns:
            An `int32` array of shape `(batch, length)`.
        """
        check_generator(rng)
        check_integer("margin", margin, at_least=0)
        vision_mask = np.asarray(vision_mask)
        if vision_mask.ndim != 2 or not np.isin(vision_mask, (0, 1)).all():
            raise ValueError(
                "`vision_mask` must have shape (batch, length), and be 0 or 1. "
                f"Received: vision_mask.shape={vision_mask.shape}, with values "
                f"such as {vision_mask.ravel()[:3]}"
            )
        vision_mask = vision_mask.astype("int8")
        moved = np.zeros_like(vision_mask, "int32")
        for offsets, mask in zip(moved, vision_mask, strict=True):
            edges = np.diff(mask, prepend=0, append=0)
            firsts, ends = (np.flatnonzero(edges == e) for e in (1, -1))
            if not len(firsts):
                continue
            windows, slots = self._draw(1, len(firsts), rng)
            before = np.maximum(firsts - margin, np.append(0, ends[:-1]))
            free = slots[0] - np.arange(len(firsts))
            for start, images in zip(before, free, strict=True):
                offsets[start:] = images * self.image_length
            free = windows[0, 0] - len(firsts)
            offsets[ends[-1] + margin :] = free * self.image_length
        return moved

    def _draw(
        self, batch: int, images: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Windows, `(batch, 1)`, and slots of images, `(batch, images)`."""
        if images > self.max_images:
            raise ValueError(
                "A prompt must have at most `max_images` images. Received: "
                f"images={images}, max_images={self.max_images}"
            )
        windows = rng.integers(images, self.max_images + 1, size=(batch, 1))
        slots = np.tile(np.arange(self.max_images), (batch, 1))
        order = np.where(
            slots < windows, rng.random((batch, self.max_images)), 2.0
        ).argsort(axis=1)
        return windows, np.sort(order[:, :images], axis=1)


def check_generator(rng: object) -> None:
    check_kind(
        "rng",
        rng,
        np.random.Generator,
        "a `numpy.random.Generator`",
        "Pass `numpy.random.default_rng(seed)`.",
    )
