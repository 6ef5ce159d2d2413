"""Short prompts whose positions range over a long window."""

import numpy as np


class PositionStretching:
    """Draws positions that spread the images of a prompt over a long window.

    For each example a window of between the prompt's own number of images and
    `max_images` is drawn uniformly; the images take sorted random slots in it,
    each image's own tokens stay contiguous, and the text follows the window.
    A model trained on few images this way sees the positions of many.

    Args:
        max_images: Integer, the longest window, in images.
        image_length: Integer, tokens an image has
            (`backbone.image_sequence_length`).

    Raises:
        ValueError: If `max_images` or `image_length` is less than 1, or a
            prompt has more than `max_images` images.
    """

    def __init__(self, max_images, image_length):
        for name, value in (
            ("max_images", max_images),
            ("image_length", image_length),
        ):
            if value < 1:
                raise ValueError(
                    f"`{name}` must be at least 1. Received: {name}={value}"
                )
        self.max_images = max_images
        self.image_length = image_length

    def positions(self, batch, images, text_length, rng):
        """Draws the positions of one batch.

        Args:
            batch: Integer, number of prompts.
            images: Integer, images in each prompt.
            text_length: Integer, text tokens in each prompt.
            rng: A `numpy.random.Generator`.

        Returns:
            An `int32` array of shape
            `(batch, images * image_length + text_length)`, in tokens.
        """
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
        chosen = np.sort(order[:, :images], axis=1)
        starts = chosen[..., None] * self.image_length
        image_positions = starts + np.arange(self.image_length)
        text = windows * self.image_length + np.arange(text_length)
        return np.concatenate(
            [image_positions.reshape(batch, -1), text], axis=1
        ).astype("int32")
