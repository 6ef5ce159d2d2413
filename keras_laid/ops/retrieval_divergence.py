"""Divergence of where a student looks from where a teacher does."""

from typing import Literal
from typing import NamedTuple

from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_shape
from keras_laid.ops.attention import Distance
from keras_laid.ops.attention_divergence.definition import TINY
from keras_laid.typing import Tensor

POOLINGS = ("none", "heads", "rows")


class Retrieval(NamedTuple):
    """Where rows look among segments, such as images, and how sure they are.

    Attributes:
        shares: Float tensor of shape `(batch, rows, segments)`: of the
            attention that goes to segments, the share of each. They sum to 1
            where a row attends any segment, else to 0.
        mass: Float tensor of shape `(batch, rows)` in `[0, 1]`: the share of a
            row's attention that goes to segments.
        sharpness: Float tensor of shape `(batch, rows)` in `[0, 1]`:
            `1 - entropy(shares) / log(segments)`, where only segments that the
            row can attend are counted: 0 for even shares, 1 if one segment
            gets all. With less than two segments it is 0.
    """

    shares: Tensor
    mass: Tensor
    sharpness: Tensor

    def row_weight(self) -> Tensor:
        """`mass * sharpness`: how much a row retrieves, in `[0, 1]`."""
        return self.mass * self.sharpness


def retrieval(log_shares: Tensor, head_weight: Tensor | None = None) -> Retrieval:
    """Where rows look, by the mean of some heads.

    Args:
        log_shares: Float tensor of shape `(batch, heads, rows, segments)`, what
            `keras_laid.ops.segment_attention` returns.
        head_weight: Optional float tensor of shape `(heads,)` that sums to 1.
            `None` weighs all heads alike.

    Returns:
        A `keras_laid.ops.Retrieval`.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If shapes do not fit.
    """
    check_shape(
        "log_shares", log_shares, batch=None, heads=None, rows=None, segments=None
    )
    shares = ops.exp(ops.cast(log_shares, "float32"))
    if head_weight is None:
        mean = ops.mean(shares, axis=1)
    else:
        check_shape("head_weight", head_weight, heads=log_shares.shape[1])
        # b = batch, h = head, i = row, g = segment
        mean = ops.einsum("bhig,h->big", shares, head_weight)
    seen = ops.any(shares > 0, axis=1)
    count = ops.sum(ops.cast(seen, "float32"), axis=-1)
    mass = ops.sum(mean, axis=-1)
    among = mean / ops.maximum(mass, TINY)[..., None]
    entropy = -ops.sum(among * ops.log(ops.maximum(among, TINY)), axis=-1)
    sharpness = 1.0 - entropy / ops.log(ops.maximum(count, 2.0))
    sharpness = ops.where(count > 1, ops.clip(sharpness, 0.0, 1.0), 0.0)
    return Retrieval(among, ops.minimum(mass, 1.0), sharpness)


def retrieval_divergence(
    student: Tensor,
    teacher: Retrieval,
    row_mask: Tensor,
    distance: Distance | None = None,
    head_weight: Tensor | None = None,
    pooling: Literal["none", "heads", "rows"] = "none",
) -> Tensor:
    """Divergence of where a student looks from where its teacher looks.

    For row `i`, teacher shares `p` and student shares `q` among segments `g`,

    `D_i = sum_g w_ig (p_ig log(p_ig / q_ig) - p_ig + q_ig)`,

    the generalised Kullback-Leibler divergence with weights that grow with the
    distance of a segment. Rows count as much as the teacher retrieves there:
    an example's divergence is `sum_i g_i D_i / sum_i g_i`, where `g_i` is the
    teacher's `row_weight()`, and 0 in rows outside `row_mask`.

    Args:
        student: Float tensor of shape `(batch, heads, rows, segments)`, what
            `keras_laid.ops.segment_attention` returns. Heads of several layers
            may be concatenated.
        teacher: `keras_laid.ops.Retrieval` of the teacher, of the same rows and
            segments. No gradient reaches it.
        row_mask: Boolean or float tensor of shape `(batch, rows)`: rows that
            count, and how much.
        distance: Optional `keras_laid.ops.Distance` from rows to segments:
            `key_positions` has shape `(batch or 1, segments)`. `None` gives
            every segment the weight 1.
        head_weight: Optional float tensor of shape `(heads,)` that sums to 1.
            `None` weighs all heads alike.
        pooling: What is averaged before it is compared. `"none"`: every head
            must look where the teacher does, and divergences are averaged over
            heads. `"heads"`: the mean of the heads' shares must, row by row.
            `"rows"`: the mean over heads and rows must; rows are weighed by
            `g_i` on both sides, and their distance likewise. Defaults to
            `"none"`.

    Returns:
        A tuple of two float32 tensors of shape `(batch,)`: the divergence of
        each example, in nats, and how much its teacher retrieves,
        `sum_i g_i`. An example without any counted row has divergence 0.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If shapes do not fit or `pooling` is unknown.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), "progressive
       distance-weighted attention matching"; the formula is ours.
    """
    check_choice("pooling", pooling, POOLINGS)
    check_shape(
        "student", student, batch=None, heads=None, rows=None, segments=None
    )
    batch, heads, rows, segments = student.shape
    check_shape(
        "teacher.shares",
        teacher.shares,
        batch=batch,
        rows=rows,
        segments=segments,
    )
    check_shape("row_mask", row_mask, batch=batch, rows=rows)
    if head_weight is None:
        head_weight = ops.ones((heads,)) / heads
    check_shape("head_weight", head_weight, heads=heads)
    # b = batch, h = head, i = row, g = segment
    log_q = ops.log_softmax(ops.cast(student, "float32"), axis=-1)
    p = ops.stop_gradient(ops.cast(teacher.shares, "float32"))
    row_weight = ops.cast(row_mask, "float32") * teacher.row_weight()
    row_weight = ops.stop_gradient(row_weight)
    total = ops.sum(row_weight, axis=-1)
    weights = ops.ones_like(p) if distance is None else distance.weights()[:, 0]
    if pooling == "none":
        divergence = divergence_of(p[:, None], log_q, weights[:, None])
        by_row = ops.einsum("bhi,h->bi", divergence, head_weight)
    else:
        q = ops.einsum("bhig,h->big", ops.exp(log_q), head_weight)
        if pooling == "rows":
            share = row_weight / ops.maximum(total, TINY)[:, None]
            p, q, weights = (
                ops.einsum("big,bi->bg", each, share)
                for each in (p, q, weights + ops.zeros_like(p))
            )
            log_q = ops.log(ops.maximum(q, TINY))
            return divergence_of(p, log_q, weights), total
        by_row = divergence_of(p, ops.log(ops.maximum(q, TINY)), weights)
    mean = ops.sum(by_row * row_weight, axis=-1) / ops.maximum(total, TINY)
    return mean, total


def divergence_of(p: Tensor, log_q: Tensor, weights: Tensor) -> Tensor:
    log_p = ops.log(ops.maximum(p, TINY))
    terms = p * (log_p - log_q) - p + ops.exp(log_q)
    # What rounding takes below 0 is 0.
    return ops.maximum(ops.sum(weights * terms, axis=-1), 0.0)
