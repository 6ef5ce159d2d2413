"""Draws haystacks: the question, the needles, and what other images show."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import Self

import numpy as np

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.arguments import check_seed
from keras_laid.arguments import is_integer
from keras_laid.haystacks.questions import ANSWERS
from keras_laid.haystacks.questions import multi_needle_question
from keras_laid.haystacks.questions import question
from keras_laid.typing import Images

if TYPE_CHECKING:
    from keras_laid.haystacks.coco import Coco

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
            strings, paths below a root.

    Raises:
        TypeError: If the question is not a string, the images are not a
            sequence, or a path is not a string.
        ValueError: If the question is empty, if the answer is another word, if
            there are no images, or if a needle is not one of their positions.
    """

    question: str
    answer: str
    anchor: str
    target: str
    needles: tuple[int, ...]
    images: Images

    def __eq__(self, other: object) -> bool:
        """Whether all is the same, images pixel by pixel."""
        if not isinstance(other, Haystack):
            return NotImplemented
        return (
            len(self.images) == len(other.images)
            and all(map(np.array_equal, self.images, other.images))
            and all(
                getattr(self, field.name) == getattr(other, field.name)
                for field in dataclasses.fields(self)
                if field.name != "images"
            )
        )

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not hasattr(
            self.images, "__len__"
        ):
            raise TypeError(
                "A haystack must have a string as its question and a sequence "
                f"of images. Received: question={self.question!r:.80}, images "
                f"of type {type(self.images).__name__}"
            )
        if not self.question.strip() or self.answer not in ANSWERS:
            raise ValueError(
                "A haystack must have a question that is not empty and an "
                f"answer in {ANSWERS}. Received: question="
                f"{self.question!r:.80}, answer={self.answer!r}"
            )
        if any(isinstance(image, os.PathLike) for image in self.images):
            raise TypeError(
                "Paths of images must be strings. Received: "
                f"images={self.images!r:.80}. Pass `str(path)` of each."
            )
        count = len(self.images)
        if not count or not all(
            is_integer(needle) and 0 <= needle < count
            for needle in self.needles
        ):
            raise ValueError(
                "A haystack must have images, and `needles` must be positions "
                f"among them. Received: {count} images, needles={self.needles}"
            )

    @classmethod
    def from_example(cls, example: Mapping[str, Any]) -> Self:
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


def _decoded(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


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


def draw_haystacks(
    source: "PairSource | Coco",
    num_questions: int,
    sizes: Sequence[int],
    needles: Sequence[int] = (1,),
    seed: int | Sequence[int] = 0,
) -> Iterator[Haystack]:
    """Draws haystacks, single-needle or multi-needle.

    Sizes, numbers of needles, "all" and "any" are shared out evenly, and half
    of the answers to each are yes. Positions of needles are uniform. Question
    `i` depends only on the arguments and on `i`.

    Args:
        source: A `PairSource` or a `keras_laid.haystacks.Coco`.
        num_questions: Integer, at least 1.
        sizes: Sequence of integers: how many images a haystack holds.
        needles: Sequence of integers: how many of them show the anchor. One
            needle is asked for by the benchmark's single-needle question, more
            by its multi-needle questions. Defaults to `(1,)`.
        seed: Integer or sequence of integers.

    Returns:
        An iterator of `Haystack`s, which are drawn one by one.

    Raises:
        ValueError: If a number is not positive, if no number of needles is
            small enough for one of the sizes, or if the source has fewer than
            three names or two that are the same.
        TypeError: If a number is not an integer, or if `source` cannot be drawn
            from.
    """
    check_integer("num_questions", num_questions)
    sizes, needles = check_sizes(sizes, needles)
    check_seed(seed)
    if isinstance(source, PairSource):
        check_pair_source(source)
    elif not callable(getattr(source, "draw", None)) or isinstance(
        source, type
    ):
        raise TypeError(
            "`source` must be a `keras_laid.haystacks.PairSource` or a "
            f"`keras_laid.haystacks.Coco`. Received: {source!r:.80}"
        )
    return _draw(source, num_questions, sizes, needles, seed)


def _draw(
    source: "PairSource | Coco",
    num_questions: int,
    sizes: Sequence[int],
    needles: Sequence[int],
    seed: int | Sequence[int],
) -> Iterator[Haystack]:
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
        yield _draw_haystack(source, *cells[int(cell)], child)


def _draw_haystack(
    source: "PairSource | Coco",
    size: int,
    count: int,
    quantifier: str,
    answer: str,
    rng: np.random.Generator,
) -> Haystack:
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
