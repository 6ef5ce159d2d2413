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
        image_length: Integer, tokens that an image adds to a prompt
            (`backbone.image_sequence_length`; with what stands around it, where
            images stand among text).

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
        windows, slots = self._draw(batch, images, rng)
        starts = slots[..., None] * self.image_length
        image_positions = starts + np.arange(self.image_length)
        text = windows * self.image_length + np.arange(text_length)
        return np.concatenate(
            [image_positions.reshape(batch, -1), text], axis=1
        ).astype("int32")

    def positions_in_text(self, vision_mask, rng, margin=0):
        """Draws the positions of a batch whose images stand among the text.

        Text follows the image before it; what stands after the last image
        follows the window.

        Args:
            vision_mask: Integer or boolean array of shape `(batch, length)`:
                the tokens of images, which text separates. KerasHub's
                preprocessors of Gemma 3 and 4 make it.
            rng: A `numpy.random.Generator`.
            margin: Integer: so many tokens on either side of an image, which
                mark where it is, move with it. Defaults to `0`.

        Returns:
            An `int32` array of shape `(batch, length)`, in tokens.
        """
        vision_mask = np.asarray(vision_mask).astype("int8")
        moved = np.zeros(vision_mask.shape, "int32")
        for of_example, mask in zip(moved, vision_mask, strict=True):
            edges = np.diff(mask, prepend=0, append=0)
            firsts, ends = (np.flatnonzero(edges == e) for e in (1, -1))
            if not len(firsts):
                continue
            windows, slots = self._draw(1, len(firsts), rng)
            before = np.maximum(firsts - margin, np.append(0, ends[:-1]))
            free = slots[0] - np.arange(len(firsts))
            for start, images in zip(before, free, strict=True):
                of_example[start:] = images * self.image_length
            free = windows[0, 0] - len(firsts)
            of_example[ends[-1] + margin :] = free * self.image_length
        return np.arange(moved.shape[1], dtype="int32") + moved

    def _draw(self, batch, images, rng):
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
