"""Draws haystacks: the question, the needles, and what other images show."""

import dataclasses
import itertools

import numpy as np

from keras_laid.haystacks.questions import multi_needle_question
from keras_laid.haystacks.questions import question

# Names in one haystack. If straws showed any of hundreds of names, the target
# would hardly be among them, and to see it anywhere would be to know.
PALETTE = 10


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Images and a question about those of them that show the anchor.

    Attributes:
        question: String.
        answer: `"yes"` or `"no"`.
        anchor: String, what the needles show and no other image does.
        target: String, what is asked for.
        needles: Tuple of integers, the positions of the needles.
        images: Sequence of `uint8` arrays of shape `(height, width, 3)`, or of
            paths below a root.
    """

    question: str
    answer: str
    anchor: str
    target: str
    needles: tuple
    images: object

    @classmethod
    def from_example(cls, example):
        """Makes one from an example of the dataset `visual_haystacks`.

        Args:
            example: Dictionary of NumPy values, of `tfds.as_numpy` or
                `tfds.data_source`.
        """
        texts = ("question", "answer", "anchor", "target")
        return cls(
            needles=tuple(int(needle) for needle in example["needles"]),
            images=example["images"],
            **{name: _decoded(example[name]) for name in texts},
        )


def _decoded(text):
    return text.decode() if isinstance(text, bytes) else str(text)


def draw_questions(kinds, count, rng):
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


def draw_pairs(palettes, anchors, beside, needles, size, rng):
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
        an image; the anchor in the needles alone.
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

    def draw(self, size, needles, shows, rng):
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
        images = self.render(pairs[0], rng)
        return self.names[anchors[0]], self.names[targets[0]], images


def draw_haystacks(source, num_questions, sizes, needles=(1,), seed=0):
    """Draws haystacks, single-needle or multi-needle.

    Sizes, numbers of needles, "all" and "any" are shared out evenly, and half
    of the answers to each are yes. Positions of needles are uniform. Question
    `i` depends on the arguments and on `i` alone.

    Args:
        source: A `PairSource` or a `keras_laid.haystacks.Coco`.
        num_questions: Integer, at least 1.
        sizes: Sequence of integers: how many images a haystack holds.
        needles: Sequence of integers: how many of them show the anchor. One
            needle is asked for by the benchmark's single-needle question, more
            by its multi-needle questions. Defaults to `(1,)`.
        seed: Integer or sequence of integers.

    Yields:
        `Haystack` objects.

    Raises:
        ValueError: If a number is not positive, or if no number of needles is
            small enough for one of the sizes.
    """
    for name, value in (
        ("num_questions", num_questions),
        ("sizes", min(sizes, default=0)),
        ("needles", min(needles, default=0)),
    ):
        if value < 1:
            raise ValueError(
                f"`{name}` must be at least 1. Received: {name}={value}"
            )
    if min(needles) > min(sizes):
        raise ValueError(
            "A haystack must have room for its needles. "
            f"Received: needles={tuple(needles)}, sizes={tuple(sizes)}. "
            "Pass fewer needles or greater sizes."
        )
    cells = [
        (size, count, quantifier, answer)
        for size, count in itertools.product(sizes, needles)
        if count <= size
        for quantifier in (("all",) if count == 1 else ("all", "any"))
        for answer in ("yes", "no")
    ]
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.resize(np.arange(len(cells)), num_questions))
    for child, cell in zip(rng.spawn(num_questions), order, strict=True):
        yield _draw_haystack(source, *cells[cell], child)


def _draw_haystack(source, size, count, quantifier, answer, rng):
    places = rng.permutation(size)[:count]
    # "All" is refuted by any needle without the target, "any" by no less than
    # all of them.
    if quantifier == "all":
        showing = count if answer == "yes" else rng.integers(count)
    else:
        showing = rng.integers(1, count + 1) if answer == "yes" else 0
    shows = rng.permutation(count) < showing
    anchor, target, images = source.draw(size, places, shows, rng)
    if count == 1:
        text = question(anchor, target)
    else:
        text = multi_needle_question(anchor, target, quantifier)
    needles = tuple(sorted(places.tolist()))
    return Haystack(text, answer, anchor, target, needles, images)
