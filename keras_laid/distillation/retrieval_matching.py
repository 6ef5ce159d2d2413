"""What the student's retrieval is matched with: heads, layers and form."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import Self

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.backbones.decoder import indices_of_global
from keras_laid.backbones.segments import Segments
from keras_laid.distillation.description import Description
from keras_laid.distillation.layer_map import is_pairs
from keras_laid.distillation.layer_map import resolve_index
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import Distance
from keras_laid.ops.retrieval_divergence import POOLINGS
from keras_laid.ops.retrieval_divergence import Retrieval
from keras_laid.ops.retrieval_divergence import retrieval
from keras_laid.ops.retrieval_divergence import retrieval_divergence
from keras_laid.ops.segment_attention import segment_attention
from keras_laid.ops.segment_attention.definition import membership
from keras_laid.typing import Tensor

Heads = tuple[tuple[int, int], ...]  # Pairs (layer, head).


class Target(NamedTuple):
    """What one layer of the student learns from.

    Attributes:
        student_layer: Integer.
        teacher_heads: Pairs of integers `(layer, head)`.
    """

    student_layer: int
    teacher_heads: Heads


@keras.saving.register_keras_serializable(package="keras_laid")
class RetrievalMatching:
    """Which heads teach the student where to look, and which layers learn it.

    The teacher's retrieval heads look at the image that a question is about.
    The student's attention over the images is compared with theirs, by
    `keras_laid.ops.retrieval_divergence`.

    Args:
        teacher_heads: `"auto"`, the heads that
            `keras_laid.find_retrieval_heads` finds on the first batches; or
            pairs of integers `(layer, head)`, where a negative layer counts
            from the last. Defaults to `"auto"`.
        student_layers: Which layers of the student learn. `"matched"`: for each
            layer of the teacher with retrieval heads, the student's layer at
            the same relative depth learns from these heads. `"all"`: every
            layer with full attention learns from all of them. A sequence of
            integers: these layers do. Defaults to `"matched"`.
        pooling: `"none"`: every head of those layers must look where the
            teacher does. `"heads"`: a mean of the heads with learned weights
            must. `"rows"`: the mean over heads and rows must; nothing says
            which head or row has to do it. Defaults to `"none"`.
        num_segments: Optional integer, the largest number of a segment, where
            inputs have `"segments"` or the family does not tell how many
            images a prompt has. Defaults to `None`, the number of images.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        teacher_heads: Literal["auto"] | Sequence[tuple[int, int]] = "auto",
        student_layers: Literal["matched", "all"] | Sequence[int] = "matched",
        pooling: Literal["none", "heads", "rows"] = "none",
        num_segments: int | None = None,
    ) -> None:
        if teacher_heads != "auto" and not is_pairs(teacher_heads):
            raise ValueError(
                '`teacher_heads` must be "auto" or pairs of indices (layer, '
                f"head). Received: teacher_heads={teacher_heads!r:.80}"
            )
        check_choice("pooling", pooling, POOLINGS)
        if num_segments is not None:
            check_integer("num_segments", num_segments)
        self.teacher_heads = teacher_heads
        self.student_layers = student_layers
        self.pooling = pooling
        self.num_segments = num_segments

    def get_config(self) -> dict[str, Any]:
        return {
            "teacher_heads": self.teacher_heads,
            "student_layers": self.student_layers,
            "pooling": self.pooling,
            "num_segments": self.num_segments,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    def targets(
        self, heads: Heads, student: Description, teacher: Description
    ) -> tuple[Target, ...]:
        """Which layer of the student learns from which heads.

        Args:
            heads: Pairs `(layer, head)` of the teacher.
            student: The student's `Description`.
            teacher: The teacher's.
        """
        if self.student_layers in ("matched", "all"):
            of_student = indices_of_global(student.layers, student.model)
        else:
            of_student = [
                resolve_index("student_layers", "student", student, index)
                for index in self.student_layers
            ]
        if self.student_layers != "matched":
            return tuple(Target(layer, heads) for layer in of_student)
        groups: dict[int, list[tuple[int, int]]] = {}
        for layer, head in heads:
            depth = (layer + 0.5) / len(teacher.layers) * len(student.layers)
            nearest = min(of_student, key=lambda s: abs(s + 0.5 - depth))
            groups.setdefault(nearest, []).append((layer, head))
        return tuple(Target(s, tuple(of)) for s, of in sorted(groups.items()))


def layers_of(heads: Heads) -> list[int]:
    """The layers of some heads, each once."""
    return sorted({layer for layer, _ in heads})


def log_shares_of_heads(
    attention: Mapping[int, Attention],
    heads: Heads,
    mask: AttentionMask,
    segments: Segments,
) -> dict[int, Tensor]:
    """The teacher's side: the mean over the chosen heads of each layer.

    Returns:
        A dictionary from layer to a float32 tensor of shape
        `(batch, rows, segments)`, logarithms as in
        `keras_laid.ops.segment_attention`.
    """
    means = {}
    for layer in layers_of(heads):
        chosen = [head for of, head in heads if of == layer]
        log_shares = segment_attention(
            only_heads(attention[layer], chosen), mask, *segments
        )
        means[layer] = ops.logsumexp(log_shares, axis=1) - ops.log(
            float(len(chosen))
        )
    return means


def only_heads(attention: Attention, heads: Sequence[int]) -> Attention:
    """`attention` of some query heads, each with a key head of its own."""
    repeats = attention.query.shape[2] // attention.key.shape[2]
    return attention._replace(
        query=ops.take(attention.query, heads, axis=2),
        key=ops.take(attention.key, [h // repeats for h in heads], axis=2),
    )


def teacher_retrieval(
    log_shares: Mapping[int, Tensor], heads: Heads
) -> Retrieval:
    """Where the teacher looks, by the mean over `heads`."""
    layers = layers_of(heads)
    counts = [sum(of == layer for of, _ in heads) for layer in layers]
    stacked = ops.stack([log_shares[layer] for layer in layers], axis=1)
    weight = [count / len(heads) for count in counts]
    return retrieval(stacked, ops.convert_to_tensor(weight, "float32"))


def segment_distance(
    segments: Segments,
    row_positions: Tensor,
    key_positions: Tensor,
    strength: float | Tensor,
    exponent: float,
) -> Distance:
    """Distances from rows to segments: to the mean position of their keys."""
    is_member = ops.cast(membership(*segments), "float32")
    positions = ops.cast(key_positions, "float32")
    positions = ops.broadcast_to(positions, ops.shape(segments.numbers))
    # b = batch, j = key, g = segment
    count = ops.sum(is_member, axis=1)
    total = ops.einsum("bj,bjg->bg", positions, is_member)
    # Segments that an example lacks stand in the middle of those it has.
    middle = ops.sum(total, 1) / ops.maximum(ops.sum(count, 1), 1.0)
    mean = ops.where(
        count > 0, total / ops.maximum(count, 1.0), middle[:, None]
    )
    return Distance(row_positions, mean, strength, exponent)


def matched_divergence(
    targets: Sequence[Target],
    student: Mapping[int, Attention],
    log_shares: Mapping[int, Tensor],
    mask: AttentionMask,
    segments: Segments,
    row_mask: Tensor,
    distance: Distance,
    pooling: Literal["none", "heads", "rows"],
    head_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The divergence of each example and its weight, as the op returns them.

    Without pooling, the mean over the student's layers; otherwise one
    divergence of all their heads together.
    """
    found = {
        target.student_layer: segment_attention(
            student[target.student_layer], mask, *segments
        )
        for target in targets
    }
    if pooling != "none":
        heads = sum((target.teacher_heads for target in targets), ())
        return retrieval_divergence(
            ops.concatenate(list(found.values()), axis=1),
            teacher_retrieval(log_shares, tuple(dict.fromkeys(heads))),
            row_mask,
            distance,
            head_weight,
            pooling,
        )
    by_layer = [
        retrieval_divergence(
            found[target.student_layer],
            teacher_retrieval(log_shares, target.teacher_heads),
            row_mask,
            distance,
        )
        for target in targets
    ]
    weight = sum(each[1] for each in by_layer)
    total = sum(divergence * each for divergence, each in by_layer)
    return total / ops.maximum(weight, keras.backend.epsilon()), weight
