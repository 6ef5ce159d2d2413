"""How the heads of a model look at segments, each in its sharpest rows."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple
from typing import Self

import numpy as np
from keras import ops

from keras_laid.backbones.segments import Segments
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.retrieval_divergence import retrieval
from keras_laid.ops.segment_attention import segment_attention
from keras_laid.typing import Tensor

ROWS = 512  # The number of rows whose attention is in memory at a time.


@dataclasses.dataclass(frozen=True, eq=False)
class HeadStatistics:
    """How the heads of a model look at segments, in rows of one kind.

    In each example, a head is measured in its sharpest row: the row with the
    largest product of mass and sharpness. All attributes are float arrays of
    shape `(layers, heads)`, means over examples; they are NaN for layers
    without full attention, for heads that a layer lacks, and where no example
    has a row of that kind.

    Attributes:
        mass: Share of the row's attention that goes to segments, in `[0, 1]`.
        sharpness: `1 - entropy / log(segments)` of the shares of segments, in
            `[0, 1]`.
        selectivity: How much the segment that a head attends differs between
            examples, in `[0, 1]`: the entropy of the examples' mean shares
            minus the mean of their entropies, divided by `log(segments)`. It is
            0 for a head that attends the same place whatever the question.
            Examples are compared only with those that have the same number of
            segments; it is NaN where no two examples have.
        needle: Share of the row's attention that the needle gets, minus the
            mean share of the other segments, in `[-1, 1]`. It is NaN where no
            needle is known.
    """

    mass: np.ndarray
    sharpness: np.ndarray
    selectivity: np.ndarray
    needle: np.ndarray


class SharpestRows(NamedTuple):
    """The sharpest row of each example and head, for one layer.

    Attributes:
        weight: Float array of shape `(examples, heads)`: `mass * sharpness` of
            the row, or -1 where an example has no row that counts.
        mass: Float array of shape `(examples, heads)`, as in
            `keras_laid.ops.Retrieval`.
        sharpness: Float array of shape `(examples, heads)`, as in
            `keras_laid.ops.Retrieval`.
        shares: Float array of shape `(examples, heads, segments)`, as in
            `keras_laid.ops.Retrieval`.
    """

    weight: np.ndarray
    mass: np.ndarray
    sharpness: np.ndarray
    shares: np.ndarray

    def or_sharper(self, other: Self) -> Self:
        """The sharper of two rows, for each example and head."""
        better = other.weight > self.weight
        pairs = zip(self, other, strict=True)
        return type(self)(
            *(
                np.where(
                    better[..., None] if one.ndim == 3 else better, two, one
                )
                for one, two in pairs
            )
        )


class Examples(NamedTuple):
    """Some examples of the data, and what heads do in them.

    Attributes:
        exists: Boolean array of shape `(examples, segments)`: which segments an
            example has.
        needle: Integer array of shape `(examples,)`: the number of the segment
            that is the needle, from 0. If an example has no segment of that
            number, such as -1, its needle is not known.
        rows: Dictionary from the index of a layer to `SharpestRows`.
    """

    exists: np.ndarray
    needle: np.ndarray
    rows: Mapping[int, SharpestRows]


def sharpest_rows(
    attention: Attention,
    mask_of: Callable[[np.ndarray], AttentionMask],
    segments: Segments,
    row_index: np.ndarray,
    counts: np.ndarray,
) -> SharpestRows:
    """The sharpest rows of a layer, in memory linear in the number of keys.

    Args:
        attention: `keras_laid.ops.Attention` of all rows.
        mask_of: Function from the places of rows, an integer array, to their
            `keras_laid.ops.AttentionMask`.
        segments: `Segments` of the keys, whose count is an integer.
        row_index: Integer array of shape `(rows,)`, at least one: the places of
            the rows that are looked at.
        counts: Boolean array of shape `(batch, rows)`: which rows count in
            which example. At least one must count in each example that is used
            later.
    """

    def sharpest_from(start: int) -> SharpestRows:
        block = slice(start, start + ROWS)
        some = row_index[block]
        query = ops.take(attention.query, some, axis=1)
        log_shares = segment_attention(
            attention._replace(query=query), mask_of(some), *segments
        )
        return sharpest_of_block(log_shares, counts[:, block])

    found = sharpest_from(0)
    for start in range(ROWS, len(row_index), ROWS):
        found = found.or_sharper(sharpest_from(start))
    return found


def sharpest_of_block(log_shares: Tensor, counts: np.ndarray) -> SharpestRows:
    """The sharpest of some rows, from their result of `segment_attention`."""
    batch, heads, rows, segments = log_shares.shape
    # Each head on its own: [batch * heads, 1, rows, segments].
    single_heads = ops.reshape(log_shares, (batch * heads, 1, rows, segments))
    shares, mass, sharpness = (
        ops.convert_to_numpy(each).reshape(batch, heads, *each.shape[1:])
        for each in retrieval(single_heads)
    )
    weight = np.where(counts[:, None], mass * sharpness, -1.0)
    best = weight.argmax(axis=-1)[..., None]
    weight, mass, sharpness = (
        np.take_along_axis(each, best, axis=-1)[..., 0]
        for each in (weight, mass, sharpness)
    )
    shares = np.take_along_axis(shares, best[..., None], axis=2)[..., 0, :]
    return SharpestRows(weight, mass, sharpness, shares)


def head_statistics(
    batches: Sequence[Examples], num_layers: int, num_heads: int
) -> HeadStatistics:
    """Statistics of the examples of all batches together.

    Args:
        batches: Sequence of `Examples`.
        num_layers: Integer, the number of decoder layers of the model.
        num_heads: Integer, the largest number of query heads in a layer.
    """
    names = [field.name for field in dataclasses.fields(HeadStatistics)]
    table = {name: np.full((num_layers, num_heads), np.nan) for name in names}
    if not batches:
        return HeadStatistics(**table)
    segments = max(batch.exists.shape[1] for batch in batches)
    exists = np.concatenate([padded(b.exists, segments) for b in batches])
    needle = np.concatenate([batch.needle for batch in batches])
    for layer in batches[0].rows:
        parts = [batch.rows[layer] for batch in batches]
        shares = np.concatenate([padded(p.shares, segments) for p in parts])
        mass = np.concatenate([part.mass for part in parts])
        sharpness = np.concatenate([part.sharpness for part in parts])
        for name, values in (
            ("mass", mass.mean(axis=0)),
            ("sharpness", sharpness.mean(axis=0)),
            ("selectivity", selectivity(shares, exists)),
            ("needle", on_needle(shares, mass, exists, needle)),
        ):
            table[name][layer, : len(values)] = values
    return HeadStatistics(**table)


def padded(array: np.ndarray, segments: int) -> np.ndarray:
    """Pads an array with zeros, so that its last axis has `segments`."""
    missing = segments - array.shape[-1]
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def selectivity(shares: np.ndarray, exists: np.ndarray) -> np.ndarray:
    """`HeadStatistics.selectivity` of a layer, of shape `(heads,)`."""
    shares = shares.astype("float64")
    counts = exists.sum(axis=1)
    total, compared = np.zeros(shares.shape[1]), 0
    for count in np.unique(counts):
        alike = shares[counts == count]
        if len(alike) < 2:
            continue
        spread = entropy(alike.mean(axis=0)) - entropy(alike).mean(axis=0)
        total += len(alike) * spread / np.log(count)
        compared += len(alike)
    if not compared:
        return np.full(shares.shape[1], np.nan)
    # Rounding can take a value of 0 slightly below 0.
    return np.maximum(total / compared, 0.0)


def entropy(shares: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in nats."""
    return -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=-1)


def on_needle(
    shares: np.ndarray,
    mass: np.ndarray,
    exists: np.ndarray,
    needle: np.ndarray,
) -> np.ndarray:
    """`HeadStatistics.needle` of a layer, of shape `(heads,)`."""
    is_needle = exists & (needle[:, None] == np.arange(exists.shape[1]))
    known = is_needle.any(axis=1)
    if not known.any():
        return np.full(mass.shape[1], np.nan)
    attention = shares * mass[..., None]
    found = (attention * is_needle[:, None]).sum(axis=-1)
    others = (exists.sum(axis=1) - 1)[:, None]
    return (found - (mass - found) / others)[known].mean(axis=0)
