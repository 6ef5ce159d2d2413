"""Means over examples, with bootstrap intervals."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from keras_laid.arguments import check_number
from keras_laid.arguments import check_seed

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and its interval, as arrays of the same shape.

    Attributes:
        mean: Mean over examples.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_with_interval(
    values: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over examples, with its bootstrap interval.

    Examples are drawn with replacement 2,000 times; the interval is between the
    percentiles of the means. To compare two models that were measured on the
    same examples, pass the differences of their values.

    Args:
        values: Array of shape `(examples, ...)`, two examples or more.
        confidence: Float in `(0, 1)`, the share of the drawn means that lie in
            the interval. Defaults to `0.95`.
        seed: Integer, the seed of the drawing. Defaults to `0`.

    Returns:
        An `Interval`, a named tuple `(mean, low, high)` of arrays of shape
        `(...)`.

    Raises:
        ValueError: If there are fewer than two examples, if a value is not
            finite, or if `confidence` is out of its range.
    """
    values = np.asarray(values, "float64")
    if values.ndim == 0 or len(values) < 2 or not values.size:
        raise ValueError(
            "`values` must have two examples or more on its first axis. "
            f"Received: values.shape={values.shape}. "
            "Pass the value of each example, not their mean."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            "`values` must be finite. Received: "
            f"{np.sum(~np.isfinite(values))} of {values.size} that are not. "
            "Leave out the examples without a value, and say how many."
        )
    check_number("confidence", confidence, "(0, 1)")
    check_seed(seed)
    count = len(values)
    rng = np.random.default_rng(seed)
    # How often each example is drawn: [resamples, examples].
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    means = np.tensordot(drawn / count, values, axes=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return Interval(values.mean(axis=0), low, high)
