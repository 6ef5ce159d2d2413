"""Draws what the images of haystacks show."""

import collections
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_laid.arguments import check_integers

# Names in one haystack. If straws showed any of hundreds of names, the target
# would hardly be among them, and to see it anywhere would be to know.
PALETTE = 10


def sizes_of_batches(
    sizes: Sequence[int], batches: int, rng: np.random.Generator
) -> np.ndarray:
    """Sizes shared out evenly over batches, in a random order.

    TensorFlow takes its input shapes from the first two batches: these differ
    where sizes do.
    """
    drawn = rng.permutation(np.resize(np.asarray(sizes), batches))
    differ = np.nonzero(drawn != drawn[0])[0]
    if len(differ):
        one, other = 1, differ[0]
        drawn[[one, other]] = drawn[[other, one]]
    return drawn


def draw_questions(
    kinds: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws what questions are about, from names numbered `0` to `kinds - 1`.

    Args:
        kinds: Integer, at least 3.
        count: Integer, number of questions.
        rng: A `numpy.random.Generator`.

    Returns:
        A tuple of four integer arrays: anchors and targets of shape `(count,)`,
        what needles may show in place of the target, of shape `(count, n)`,
        and the names that a haystack shows, sorted, of shape `(count, m)`.
        `m` is `PALETTE`, or `kinds` if there are fewer; `n` is `m - 2`.
    """
    draws = rng.random((count, kinds)).argsort(axis=1)[:, :PALETTE]
    return draws[:, 0], draws[:, 1], draws[:, 2:], np.sort(draws, axis=1)


def draw_pairs(
    palettes: np.ndarray,
    anchors: np.ndarray,
    beside: np.ndarray,
    needles: np.ndarray,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws which two things each image of some haystacks shows.

    Args:
        palettes: Integer array of shape `(count, names)`, sorted: what the
            images of a haystack may show.
        anchors: Integer array of shape `(count,)`.
        beside: Integer array of shape `(count, needles)`: what a needle shows
            beside the anchor.
        needles: Integer array of shape `(count, needles)`, positions.
        size: Integer, images in a haystack.
        rng: A `numpy.random.Generator`.

    Returns:
        An integer array of shape `(count, size, 2)`. Two different things in
        an image; the anchor only in the needles.
    """
    count, kinds = palettes.shape
    # Draw from the palette but one, then step over the anchor.
    draws = rng.random((count, size, kinds - 1)).argsort(axis=-1)[..., :2]
    ranks = np.sum(palettes < anchors[:, None], axis=1)
    draws = draws + (draws >= ranks[:, None, None])
    row = np.arange(count)[:, None]
    pairs = palettes[row[..., None], draws]
    pairs[row, needles] = np.stack(
        np.broadcast_arrays(anchors[:, None], beside), axis=-1
    )
    return pairs


class PairSource:
    """A source whose images show two different things each.

    A subclass has `names` and `render(pairs, rng)`, as
    `keras_laid.haystacks.Digits` does.
    """

    names: Sequence[str]
    image_size: int
    render: Callable[[np.ndarray, np.random.Generator], np.ndarray]

    def draw(
        self,
        size: int,
        needles: np.ndarray,
        shows: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[str, str, np.ndarray]:
        """Draws the anchor, the target and the images of one haystack.

        Args:
            size: Integer, number of images.
            needles: Integer array, positions of the needles.
            shows: Boolean array, which of the needles show the target.
            rng: A `numpy.random.Generator`.

        Returns:
            A tuple: two names and a `uint8` array of shape
            `(size, height, width, 3)`.
        """
        anchors, targets, others, palettes = draw_questions(
            len(self.names), 1, rng
        )
        beside = np.where(shows, targets, np.resize(others, len(shows)))
        pairs = draw_pairs(
            palettes, anchors, beside[None], needles[None], size, rng
        )
        images = rendered(self, pairs[0], rng)
        return self.names[anchors[0]], self.names[targets[0]], images


def check_pair_source(source: Any) -> None:
    """Refuses what has no `render`, or has no names to ask about."""
    if not callable(getattr(source, "render", None)) or isinstance(
        source, type
    ):
        raise TypeError(
            "`source` must have `names` and `render(pairs, rng)`, as "
            f"`keras_laid.haystacks.Digits(...)`. Received: {source!r:.80}"
        )
    names = getattr(source, "names", None)
    if (
        not isinstance(names, collections.abc.Sequence)
        or not all(isinstance(name, str) and name.strip() for name in names)
        or not len(names) == len(set(names)) >= 3
    ):
        raise ValueError(
            "`source.names` must be three or more different strings: the "
            "anchor, the target and what needles show in its place. "
            f"Received: {names!r:.80}"
        )


def rendered(
    source: PairSource, pairs: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The images that `source.render` makes, which must be one a pair."""
    images = source.render(pairs, rng)
    shape: tuple[int, ...] = getattr(images, "shape", ())
    if (
        len(shape) != 4
        or (shape[0], shape[3]) != (len(pairs), 3)
        or images.dtype != "uint8"
    ):
        raise ValueError(
            "`source.render` must return a `uint8` array of shape `(images, "
            "height, width, 3)`, with one image a pair: colours of 0 to 255, "
            "of which none can be NaN. Received: "
            f"{type(images).__name__} of shape {shape} and dtype "
            f"{getattr(images, 'dtype', None)} for {len(pairs)} pairs"
        )
    return images


def check_sizes(
    sizes: Sequence[int], needles: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns both as tuples, if there is room for some needles."""
    sizes = check_integers("sizes", sizes)
    needles = check_integers("needles", needles)
    if min(needles) > min(sizes):
        raise ValueError(
            "A haystack must have room for its needles. "
            f"Received: needles={needles}, sizes={sizes}. "
            "Pass fewer needles or greater sizes."
        )
    return sizes, needles
