"""Draws haystacks: questions of four kinds about images of a source."""

import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal
from typing import NamedTuple

import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_seed
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.questions import ANSWERS
from keras_laid.haystacks.questions import LETTERS
from keras_laid.haystacks.questions import count_question
from keras_laid.haystacks.questions import multi_needle_question
from keras_laid.haystacks.questions import present_question
from keras_laid.haystacks.questions import question
from keras_laid.haystacks.questions import which_image_question
from keras_laid.haystacks.sampling import PairSource
from keras_laid.haystacks.sampling import check_pair_source
from keras_laid.haystacks.sampling import check_sizes

if TYPE_CHECKING:
    from keras_laid.haystacks.coco import Coco


def draw_haystacks(
    source: "PairSource | Coco",
    num_questions: int,
    sizes: Sequence[int],
    needles: Sequence[int] = (1,),
    seed: int | Sequence[int] = 0,
    task: Literal["contains", "present", "count", "which_image"] = "contains",
) -> Iterator[Haystack]:
    """Draws haystacks with questions of one task.

    | task | question | options |
    | --- | --- | --- |
    | `"contains"` | "For the image with a seven, is there a three?" | yes, no |
    | `"present"` | "Is there an image with a seven?" | yes, no |
    | `"count"` | "How many images show a seven?" | the numbers in `needles` |
    | `"which_image"` | "Which image shows a seven? A: image 3, ..." | A to D |

    The first is the Visual Haystacks benchmark's, single-needle with one needle
    and multi-needle ("do all of them", "do any of them") with more. In
    `"present"` half of the haystacks have no needle.

    Sizes, numbers of needles, "all" and "any" are shared out evenly, and so are
    the answers. Positions of needles are uniform. Question `i` depends only on
    the arguments and on `i`.

    Args:
        source: A `PairSource` or a `keras_laid.haystacks.Coco`.
        num_questions: Integer, at least 1.
        sizes: Sequence of integers: how many images a haystack holds, at least
            4 for `"which_image"`.
        needles: Sequence of integers: how many images show the anchor. Only
            `"contains"` and `"count"` take others than one, and `"count"` needs
            two or more different numbers. Defaults to `(1,)`.
        seed: Integer or sequence of integers.
        task: `"contains"`, `"present"`, `"count"` or `"which_image"`. Defaults
            to `"contains"`.

    Returns:
        An iterator of `Haystack`s, which are drawn one by one.

    Raises:
        ValueError: If a number is not positive, if the task is unknown or does
            not take these sizes or needles, if no number of needles is small
            enough for one of the sizes, or if the source has fewer than three
            names or two that are the same.
        TypeError: If a number is not an integer, or if `source` cannot be drawn
            from.
    """
    check_integer("num_questions", num_questions)
    sizes, needles = check_sizes(sizes, needles)
    check_seed(seed)
    check_choice("task", task, TASKS)
    if isinstance(source, PairSource):
        check_pair_source(source)
    elif not callable(getattr(source, "draw", None)) or isinstance(
        source, type
    ):
        raise TypeError(
            "`source` must be a `keras_laid.haystacks.PairSource` or a "
            f"`keras_laid.haystacks.Coco`. Received: {source!r:.80}"
        )
    return _draw(source, num_questions, TASKS[task](sizes, needles), seed)


def _draw(
    source: Any,
    num_questions: int,
    cells: Sequence[Callable[[Any, np.random.Generator], Haystack]],
    seed: int | Sequence[int],
) -> Iterator[Haystack]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.resize(np.arange(len(cells)), num_questions))
    for child, cell in zip(rng.spawn(num_questions), order, strict=True):
        yield cells[int(cell)](source, child)


# A task makes its cells of sizes and numbers of needles. A cell is called with
# a source and a generator and draws a haystack; questions are shared out evenly
# over the cells.


class Contains(NamedTuple):
    """Whether needles show the target too."""

    size: int
    num_needles: int
    quantifier: str
    answer: str

    @classmethod
    def cells(
        cls, sizes: Sequence[int], needles: Sequence[int]
    ) -> list["Contains"]:
        return [
            cls(size, count, quantifier, answer)
            for size, count in itertools.product(sizes, needles)
            if count <= size
            for quantifier in (("all",) if count == 1 else ("all", "any"))
            for answer in ANSWERS
        ]

    def __call__(self, source: Any, rng: np.random.Generator) -> Haystack:
        size, count, quantifier, answer = self
        places = rng.permutation(size)[:count]
        # One needle without the target makes "all" wrong; "any" is wrong only
        # where all needles are without it.
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
        return Haystack(
            text, answer, anchor, target, as_needles(places), images
        )


class Present(NamedTuple):
    """Whether any image shows the anchor."""

    size: int
    answer: str

    @classmethod
    def cells(
        cls, sizes: Sequence[int], needles: Sequence[int]
    ) -> list["Present"]:
        check_one_needle("present", needles)
        return [cls(*cell) for cell in itertools.product(sizes, ANSWERS)]

    def __call__(self, source: Any, rng: np.random.Generator) -> Haystack:
        places = rng.permutation(self.size)[: int(self.answer == "yes")]
        drawn = draw_anchor(source, self.size, places, rng)
        return Haystack(
            present_question(drawn[0]), self.answer, *drawn, ANSWERS
        )


class Count(NamedTuple):
    """How many images show the anchor."""

    size: int
    num_needles: int
    options: tuple[str, ...]

    @classmethod
    def cells(
        cls, sizes: Sequence[int], needles: Sequence[int]
    ) -> list["Count"]:
        numbers = sorted({*needles})
        if len(numbers) < 2 or max(numbers) > min(sizes):
            raise ValueError(
                "The task 'count' must have two or more numbers of needles, "
                "all of which fit into each size. Received: "
                f"needles={needles}, sizes={sizes}. Pass `needles=(1, 2, 3)`, "
                "for example."
            )
        options = tuple(map(str, numbers))
        return [
            cls(size, count, options)
            for size, count in itertools.product(sizes, numbers)
        ]

    def __call__(self, source: Any, rng: np.random.Generator) -> Haystack:
        places = rng.permutation(self.size)[: self.num_needles]
        drawn = draw_anchor(source, self.size, places, rng)
        text, answer = count_question(drawn[0]), str(self.num_needles)
        return Haystack(text, answer, *drawn, self.options)


class WhichImage(NamedTuple):
    """Which of four images shows the anchor."""

    size: int
    answer: str

    @classmethod
    def cells(
        cls, sizes: Sequence[int], needles: Sequence[int]
    ) -> list["WhichImage"]:
        check_one_needle("which_image", needles)
        if min(sizes) < len(LETTERS):
            raise ValueError(
                "The task 'which_image' must have four images to choose from. "
                f"Received: sizes={sizes}"
            )
        return [cls(*cell) for cell in itertools.product(sizes, LETTERS)]

    def __call__(self, source: Any, rng: np.random.Generator) -> Haystack:
        offered = np.sort(rng.permutation(self.size)[: len(LETTERS)])
        needle = offered[[LETTERS.index(self.answer)]]
        drawn = draw_anchor(source, self.size, needle, rng)
        text = which_image_question(drawn[0], offered.tolist())
        return Haystack(text, self.answer, *drawn, LETTERS)


TASKS: dict[str, Callable[..., Any]] = {
    "contains": Contains.cells,
    "present": Present.cells,
    "count": Count.cells,
    "which_image": WhichImage.cells,
}


def draw_anchor(
    source: Any, size: int, places: np.ndarray, rng: np.random.Generator
) -> tuple[str, str, tuple[int, ...], Any]:
    """The anchor, no target, the needles at `places`, and all images."""
    shows = np.zeros(len(places), bool)
    anchor, _, images = source.draw(size, places, shows, rng)
    return anchor, "", as_needles(places), images


def check_one_needle(task: str, needles: Sequence[int]) -> None:
    if tuple(needles) != (1,):
        raise ValueError(
            f"The task {task!r} has one needle at most. "
            f"Received: needles={needles}. Leave out `needles`."
        )


def as_needles(places: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(places.tolist()))
