"""How far a model sees: the effective window, by four rules."""

import itertools
import math
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple

import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_number
from keras_laid.arguments import check_seed
from keras_laid.arguments import is_integer
from keras_laid.arguments import is_number

RESAMPLES = 2000

# The arguments each rule takes; any other is refused.
TAKES = {
    "relative": ("share", "chance", "base_sizes"),
    "absolute": ("threshold",),
    "nolima": ("base_sizes",),
    "ruler": (),
}


class EffectiveWindow(NamedTuple):
    """An effective window, or an end of its interval.

    Attributes:
        window: Float, in images, or in tokens where those were asked for;
            within the measured sizes.
        censored: `None`; or `"above"` where every size measured last passes, so
            that the true window is at least `window`; or `"below"` where none
            passes, or not the first, so that it is less than `window`.
    """

    window: float
    censored: str | None


def effective_window(
    accuracy: dict[int, float],
    rule: Literal["relative", "absolute", "nolima", "ruler"] = "relative",
    share: float | None = None,
    chance: float | None = None,
    base_sizes: Sequence[int] | None = None,
    threshold: float | None = None,
    tokens_per_image: float | None = None,
) -> EffectiveWindow:
    """The longest haystack at which a model still answers well enough.

    | rule | a size passes if its accuracy is |
    | --- | --- |
    | `"relative"` | above chance, at least `share` of what the base is |
    | `"absolute"` | at least `threshold` |
    | `"nolima"` | at least 0.85 of the base |
    | `"ruler"` | more than 0.856 |

    The base is the best accuracy at `base_sizes`. With the first two rules the
    window ends where accuracy first falls below, whatever follows; between two
    measured sizes accuracy is interpolated linearly in the logarithm of the
    size. The last two are those of the benchmarks of that name: the longest
    measured size that passes, whatever comes before, with no regard to chance
    and nothing interpolated.

    Example:

    ```python
    effective_window({1: 0.9, 10: 0.9, 40: 0.78})  # 20 images.
    ```

    Args:
        accuracy: Dictionary from haystack size, in images, above 0, to
            accuracy, 0 to 1. Its order does not matter.
        rule: One of `"relative"`, `"absolute"`, `"nolima"` and `"ruler"`.
            Defaults to `"relative"`.
        share: Float in `(0, 1]`, for `"relative"`. Defaults to `0.85`.
        chance: Float in `[0, 1)`, accuracy of guessing, for `"relative"`.
            Defaults to `0.5`.
        base_sizes: Sequence of sizes, all in `accuracy`, for `"relative"` and
            `"nolima"`. Defaults to the smallest size.
        threshold: Float in `(0, 1]`, for `"absolute"`, which needs it.
        tokens_per_image: Optional number above 0. With it, the window is in
            tokens of images; those of the question are not counted.

    Returns:
        An `EffectiveWindow`, a named tuple `(window, censored)`. By
        `"relative"` and with the base at the smallest size, `censored` is never
        `"below"`.

    Raises:
        ValueError: If `accuracy` is empty, or a size, an accuracy or an
            argument is out of its range; if the rule does not take an argument,
            or lacks one; or if the base is not above chance.
        TypeError: If `accuracy` is not a dictionary, or an argument is not a
            number.

    Reference:
     - `"nolima"`: [Modarressi et al., 2025](https://arxiv.org/abs/2502.05167).
       Their base score is the best at 250, 500 and 1,000 tokens.
     - `"ruler"`: [Hsieh et al., 2024](https://arxiv.org/abs/2404.06654). Their
       threshold is Llama-2-7B's (chat) score at 4,096 tokens, 85.6%.
    """
    criterion = _make_criterion(
        accuracy,
        rule,
        tokens_per_image,
        share=share,
        chance=chance,
        base_sizes=base_sizes,
        threshold=threshold,
    )
    return _find(accuracy, criterion)


def effective_window_interval(
    accuracy: dict[int, float],
    questions: int | dict[int, int],
    confidence: float = 0.95,
    seed: int = 0,
    **arguments: Any,
) -> tuple[EffectiveWindow, EffectiveWindow]:
    """How sure an effective window is, given how many questions were asked.

    A parametric bootstrap: at each size the number of right answers is drawn
    2,000 times from the binomial distribution of the measured accuracy, and the
    window of each draw is found. The interval is between the percentiles of
    those windows, widened where that is needed to hold the measured one, which
    may lie outside: the first of several noisy falls comes early. A draw whose
    base is not above chance counts as `"below"`.

    An accuracy of exactly 0 or 1 does not vary, so that intervals are too
    narrow there, unless there are many questions.

    Args:
        accuracy: As in `effective_window`.
        questions: Integer, questions asked at each size, or a dictionary from
            each size to an integer.
        confidence: Float in `(0, 1)`. Defaults to `0.95`.
        seed: Integer. Defaults to `0`.
        **arguments: The other arguments of `effective_window`.

    Returns:
        A tuple `(low, high)` of `EffectiveWindow`s, in the same unit as the
        window. A `censored` end lies beyond the measured sizes.

    Raises:
        ValueError: As `effective_window`; if `questions` is not above 0 or its
            sizes are not those of `accuracy`; or if `confidence` is out of its
            range.
    """
    measured = effective_window(accuracy, **arguments)
    criterion = _make_criterion(accuracy, **arguments)
    sizes = sorted(accuracy)
    counts = _make_counts(questions, sizes)
    check_number("confidence", confidence, "(0, 1)")
    check_seed(seed)
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(
        counts, [accuracy[size] for size in sizes], (RESAMPLES, len(sizes))
    )
    windows = sorted(
        (
            _find(dict(zip(sizes, row, strict=True)), criterion)
            for row in (drawn / counts).tolist()
        ),
        key=_order,
    )
    tail = round(RESAMPLES * (1 - confidence) / 2)
    low, high = windows[tail], windows[-1 - tail]
    return min(low, measured, key=_order), max(high, measured, key=_order)


class _Criterion(NamedTuple):
    """A rule with its arguments filled in."""

    rule: str
    share: float | None
    chance: float | None
    base_sizes: tuple[int, ...] | None
    threshold: float | None
    unit: float

    def passes(self, accuracy: float, threshold: float) -> bool:
        if self.rule == "ruler":
            return accuracy > threshold
        return accuracy >= threshold

    def find_threshold(self, accuracy: dict[int, float]) -> float:
        """The accuracy to reach; infinite if the base is mere guessing."""
        if self.threshold is not None:
            return self.threshold
        base = self.base(accuracy)
        if base <= self.chance:
            return np.inf
        # The base itself passes, however the sum is rounded.
        return min(base, self.chance + self.share * (base - self.chance))

    def base(self, accuracy: dict[int, float]) -> float:
        return max(accuracy[size] for size in self.base_sizes)


def _find(accuracy: dict[int, float], criterion: _Criterion) -> EffectiveWindow:
    """The window of accuracies and a criterion that have been checked."""
    sizes = sorted(accuracy)
    threshold = criterion.find_threshold(accuracy)
    passing = [
        size for size in sizes if criterion.passes(accuracy[size], threshold)
    ]
    interpolated = criterion.rule in ("relative", "absolute")
    if not passing or (interpolated and passing[0] != sizes[0]):
        window, censored = sizes[0], "below"
    elif interpolated and len(passing) < len(sizes):
        near, far = next(
            pair for pair in itertools.pairwise(sizes) if pair[1] not in passing
        )
        fall = accuracy[near] - accuracy[far]
        part = (accuracy[near] - threshold) / fall
        window, censored = near * (far / near) ** part, None
    else:
        window = passing[-1]
        censored = "above" if window == sizes[-1] else None
    return EffectiveWindow(float(window * criterion.unit), censored)


def _order(window: EffectiveWindow) -> tuple[float, int]:
    """Sorts windows: one below a size comes before it, one above it after."""
    return window.window, ("below", None, "above").index(window.censored)


def _make_criterion(
    accuracy: dict[int, float],
    rule: str = "relative",
    tokens_per_image: float | None = None,
    **given: Any,
) -> _Criterion:
    _check_accuracy(accuracy)
    check_choice("rule", rule, TAKES)
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in TAKES[rule]:
            raise ValueError(
                f"`{name}` must be left out with rule={rule!r}, which takes "
                f"{TAKES[rule] or 'no arguments'}. Received: "
                f"{name}={given[name]}. Leave it out, or choose a rule that "
                "takes it."
            )
    if rule == "absolute" and "threshold" not in given:
        raise ValueError(
            "`threshold` must be given with rule='absolute'. Received: "
            "threshold=None. Pass an accuracy, such as `threshold=0.8`."
        )
    share, chance, threshold = {
        "relative": (given.get("share", 0.85), given.get("chance", 0.5), None),
        "absolute": (None, None, given.get("threshold")),
        "nolima": (0.85, 0.0, None),
        "ruler": (None, None, 0.856),
    }[rule]
    base_sizes = None
    if threshold is None:
        bases = given.get("base_sizes", (min(accuracy),))
        base_sizes = () if is_number(bases) else tuple(bases)
        check_number("share", share, "(0, 1]")
        check_number("chance", chance, "[0, 1)")
        measured = list(accuracy)
        if not base_sizes or any(size not in measured for size in base_sizes):
            raise ValueError(
                "`base_sizes` must be one or more of the sizes of `accuracy`, "
                f"{sorted(accuracy)}. Received: base_sizes={bases!r:.80}. "
                "Measure those sizes too, or choose among these."
            )
    else:
        check_number("threshold", threshold, "(0, 1]")
    unit = 1 if tokens_per_image is None else tokens_per_image
    check_number("tokens_per_image", unit, "(0, inf)")
    criterion = _Criterion(rule, share, chance, base_sizes, threshold, unit)
    if criterion.find_threshold(accuracy) == np.inf:
        raise ValueError(
            "The best accuracy at `base_sizes` must be above chance. Received: "
            f"an accuracy of {criterion.base(accuracy)} at {base_sizes}, "
            f"chance={chance}. A model that guesses has no window; by "
            "rule='absolute' it is below the smallest size."
        )
    return criterion


def _check_accuracy(accuracy: dict[int, float]) -> None:
    if not isinstance(accuracy, dict):
        raise TypeError(
            "`accuracy` must be a dictionary from haystack size to accuracy. "
            f"Received: accuracy={accuracy!r:.80}. Pass `results.accuracy`."
        )
    if not accuracy:
        raise ValueError(
            "`accuracy` must have at least one size. Received: accuracy={}. "
            "Measure some with `evaluate_haystacks`."
        )
    for size, value in accuracy.items():
        if not is_number(size) or not 0 < size < math.inf:
            raise ValueError(
                "The sizes of `accuracy` must be numbers above 0. Received: "
                f"{size!r}. Sizes read from JSON are strings: `int(size)`."
            )
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(
                "`accuracy` must be between 0 and 1. Received: "
                f"accuracy[{size}]={value!r:.80}. Divide percentages by 100."
            )


def _make_counts(
    questions: int | dict[int, int], sizes: Sequence[int]
) -> np.ndarray:
    if not isinstance(questions, dict):
        questions = dict.fromkeys(sizes, questions)
    if questions.keys() != set(sizes):
        raise ValueError(
            f"`questions` must have the sizes of `accuracy`, {sizes}. "
            f"Received: {list(questions)}. Pass one number if it is the same "
            "at each size."
        )
    for size, count in questions.items():
        if not is_integer(count) or not 0 < count < 2**63:
            raise ValueError(
                "`questions` must be integers above 0. Received: "
                f"{count!r} at size {size}. Pass how many were asked, "
                "`questions` of what `evaluate_haystacks` returns."
            )
    return np.array([questions[size] for size in sizes])
