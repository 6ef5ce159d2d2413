"""Divergence of where a student looks from where its teacher looks."""

import math
from typing import Literal
from typing import NamedTuple

from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_kind
from keras_laid.arguments import check_shape
from keras_laid.ops.attention import MASKED
from keras_laid.ops.attention import TINY
from keras_laid.ops.attention import Distance
from keras_laid.ops.attention import check_distance
from keras_laid.typing import Tensor

POOLINGS = ("none", "heads", "rows")


class Retrieval(NamedTuple):
    """Where rows look among segments, such as images, and how sure they are.

    Attributes:
        shares: Float tensor of shape `(batch, rows, segments)`: the share of
            each segment in the attention that the row gives to segments. The
            shares of a row sum to 1, or to 0 if the row attends no segment.
        mass: Float tensor of shape `(batch, rows)` in `[0, 1]`: the share of a
            row's attention that goes to segments.
        sharpness: Float tensor of shape `(batch, rows)` in `[0, 1]`:
            `1 - entropy(shares) / log(segments)`, where only segments that the
            row can attend are counted: 0 for even shares, 1 if one segment
            gets all the attention. With fewer than two segments it is 0.
    """

    shares: Tensor
    mass: Tensor
    sharpness: Tensor

    def row_weight(self) -> Tensor:
        """`mass * sharpness`: how much a row retrieves, in `[0, 1]`."""
        return self.mass * self.sharpness


def retrieval(
    log_shares: Tensor, head_weight: Tensor | None = None
) -> Retrieval:
    """Where each row looks among segments, averaged over heads.

    Args:
        log_shares: Float tensor of shape `(batch, heads, rows, segments)`, as
            returned by `keras_laid.ops.segment_attention`.
        head_weight: Optional float tensor of shape `(heads,)` that sums to 1:
            the weight of each head in the mean. `None` gives all heads equal
            weights.

    Returns:
        A `keras_laid.ops.Retrieval`.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If shapes do not fit.
    """
    check_shape(
        "log_shares",
        log_shares,
        batch=None,
        heads=None,
        rows=None,
        segments=None,
    )
    head_weight = weight_of_heads(head_weight, log_shares.shape[1])
    # b = batch, h = head, i = row, g = segment
    log_shares = in_float32(log_shares)
    attended = is_attended(log_shares)
    # Taken relative to the largest, small shares do not underflow.
    largest = ops.stop_gradient(ops.max(log_shares, axis=(1, 3)))  # [b, i]
    relative = ops.exp(log_shares - largest[:, None, :, None])
    relative = ops.where(attended, relative, 0.0)
    mean = ops.einsum("bhig,h->big", relative, head_weight)
    total = ops.sum(mean, axis=-1)
    shares = mean / ops.where(total > 0, total, 1.0)[..., None]
    mass = ops.minimum(total * ops.exp(largest), 1.0)
    entropy = -ops.sum(shares * ops.log(ops.maximum(shares, TINY)), axis=-1)
    count = ops.cast(ops.any(attended, axis=1), "float32")
    count = ops.sum(count, axis=-1)
    sharpness = 1.0 - entropy / ops.log(ops.maximum(count, 2.0))
    sharpness = ops.where(count > 1, ops.clip(sharpness, 0.0, 1.0), 0.0)
    return Retrieval(shares, mass, sharpness)


def retrieval_divergence(
    student: Tensor,
    teacher: Retrieval,
    row_mask: Tensor,
    distance: Distance | None = None,
    head_weight: Tensor | None = None,
    pooling: Literal["none", "heads", "rows"] = "none",
) -> tuple[Tensor, Tensor]:
    """Divergence of where a student looks from where its teacher looks.

    For row `i`, teacher shares `p` and student shares `q` among segments `g`,

    `D_i = sum_g w_ig (p_ig log(p_ig / q_ig) - p_ig + q_ig)`,

    the generalised Kullback-Leibler divergence with weights that grow with the
    distance of a segment. Each row is weighted by how much the teacher
    retrieves there: an example's divergence is `sum_i r_i D_i / sum_i r_i`,
    where `r_i` is the teacher's `row_weight()` times `row_mask`.

    A segment that a student's row cannot attend counts as if it had a share of
    1e-30, and has a gradient of 0.

    Args:
        student: Float tensor of shape `(batch, heads, rows, segments)`, as
            returned by `keras_laid.ops.segment_attention`. Heads of several
            layers may be concatenated.
        teacher: `keras_laid.ops.Retrieval` of the teacher, over the same rows
            and segments. No gradient reaches it.
        row_mask: Boolean or float tensor of shape `(batch, rows)`: a factor on
            the weight of each row. `False` or 0 leaves a row out.
        distance: Optional `keras_laid.ops.Distance` from rows to segments:
            `key_positions` has shape `(batch or 1, segments)`. `None` gives
            every segment the weight 1.
        head_weight: Optional float tensor of shape `(heads,)` that sums to 1:
            the weight of each student head. `None` gives all heads equal
            weights.
        pooling: The axes over which shares are averaged before they are
            compared. `"none"` compares each row of each head with the teacher,
            and averages the divergences over heads. `"heads"` averages the
            student's shares over heads and compares each row. `"rows"` averages
            shares over heads and rows and compares one distribution per
            example; rows of the student's and the teacher's shares and of the
            distance weights are then weighted by `r_i`. Defaults to `"none"`.

    Returns:
        A tuple of two float32 tensors of shape `(batch,)`: the divergence of
        each example, in nats, and how much its teacher retrieves,
        `sum_i r_i`. An example without any counted row has divergence 0.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit or `pooling` is unknown.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), "progressive
       distance-weighted attention matching"; the formula is ours.
    """
    check_arguments(student, teacher, row_mask, distance, pooling)
    head_weight = weight_of_heads(head_weight, student.shape[1])
    # b = batch, h = head, i = row, g = segment
    student = in_float32(student)
    attended = is_attended(student)
    log_q = ops.where(attended, ops.log_softmax(student), math.log(TINY))
    p = ops.stop_gradient(ops.cast(teacher.shares, "float32"))
    row_weight = ops.cast(teacher.row_weight(), "float32")
    row_weight = ops.stop_gradient(ops.cast(row_mask, "float32") * row_weight)
    total = ops.sum(row_weight, axis=-1)
    row_weight = row_weight / ops.where(total > 0, total, 1.0)[:, None]
    weights = ops.ones_like(p)
    if distance is not None:
        weights = weights * distance.weights()[:, 0]
    if pooling == "none":
        by_head = divergence_of(p[:, None], log_q, weights[:, None])
        by_row = ops.einsum("bhi,h->bi", by_head, head_weight)
        return ops.sum(row_weight * by_row, axis=-1), total
    q = ops.where(attended, ops.exp(log_q), 0.0)
    q = ops.einsum("bhig,h->big", q, head_weight)
    if pooling == "rows":
        p, q, weights = (
            ops.einsum("big,bi->bg", each, row_weight)
            for each in (p, q, weights)
        )
    divergence = divergence_of(p, ops.log(ops.maximum(q, TINY)), weights)
    if pooling == "heads":
        divergence = ops.sum(row_weight * divergence, axis=-1)
    return divergence, total


def divergence_of(p: Tensor, log_q: Tensor, weights: Tensor) -> Tensor:
    log_p = ops.log(ops.maximum(p, TINY))
    terms = p * (log_p - log_q) - p + ops.exp(log_q)
    # The sum is never negative; rounding may make it so.
    return ops.maximum(ops.sum(weights * terms, axis=-1), 0.0)


def in_float32(log_shares: Tensor) -> Tensor:
    """Casts to float32, where -1e30 replaces float16's minus infinity."""
    return ops.maximum(ops.cast(log_shares, "float32"), MASKED)


def is_attended(log_shares: Tensor) -> Tensor:
    """Whether each row attends any key of each segment."""
    return log_shares > MASKED


def weight_of_heads(head_weight: Tensor | None, heads: int) -> Tensor:
    """The given weights, or equal ones, in float32."""
    if head_weight is None:
        return ops.ones((heads,), "float32") / heads
    check_shape("head_weight", head_weight, heads=heads)
    return ops.cast(head_weight, "float32")


def check_arguments(
    student: Tensor,
    teacher: Retrieval,
    row_mask: Tensor,
    distance: Distance | None,
    pooling: str,
) -> None:
    check_choice("pooling", pooling, POOLINGS)
    check_shape(
        "student", student, batch=None, heads=None, rows=None, segments=None
    )
    batch, _, rows, segments = student.shape
    check_kind(
        "teacher",
        teacher,
        Retrieval,
        "a `keras_laid.ops.Retrieval`",
        "Pass what `keras_laid.ops.retrieval` returns.",
    )
    sizes = dict(batch=batch, rows=rows)
    check_shape("teacher.shares", teacher.shares, **sizes, segments=segments)
    check_shape("teacher.mass", teacher.mass, **sizes)
    check_shape("teacher.sharpness", teacher.sharpness, **sizes)
    check_shape("row_mask", row_mask, **sizes)
    if distance is not None:
        check_distance(distance, **sizes, segments=segments)
