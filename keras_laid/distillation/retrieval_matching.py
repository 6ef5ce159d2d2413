"""What the student's retrieval is matched with: heads, layers and form."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import Self

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_indices
from keras_laid.arguments import check_integer
from keras_laid.backbones.decoder import indices_of_global
from keras_laid.backbones.segments import Segments
from keras_laid.backbones.segments import segments_of
from keras_laid.distillation.description import Description
from keras_laid.distillation.layer_map import is_pairs
from keras_laid.distillation.layer_map import resolve_index
from keras_laid.distillation.matched_rows import MatchedRows
from keras_laid.distillation.matched_rows import matched_rows
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
        student_layers: Optional sequence of integers, the layers of the student
            that learn from all of these heads. Defaults to `None`: without
            pooling, the student's layer at the same relative depth learns from
            the heads of each layer of the teacher; with pooling, every layer
            with full attention takes part.
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
        student_layers: Sequence[int] | None = None,
        pooling: Literal["none", "heads", "rows"] = "none",
        num_segments: int | None = None,
    ) -> None:
        if teacher_heads != "auto" and not is_pairs(teacher_heads):
            raise ValueError(
                '`teacher_heads` must be "auto" or pairs of indices (layer, '
                f"head). Received: teacher_heads={teacher_heads!r:.80}"
            )
        if student_layers is not None:
            check_indices("student_layers", student_layers)
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

    def resolve(
        self, student: Description, teacher: Description
    ) -> Heads | None:
        """The teacher's heads, if they are named; refuses what is not there."""
        if self.student_layers is not None:
            self.pooled_layers(student)
        if self.teacher_heads == "auto":
            return None
        allowed = indices_of_global(teacher.layers, teacher.model)
        heads = []
        for layer, head in self.teacher_heads:
            index = resolve_index(
                "teacher_heads", "teacher", teacher, allowed, layer
            )
            count = teacher.layers[index].num_query_heads
            if not 0 <= head < count:
                raise ValueError(
                    f"`teacher_heads` must name heads from 0 to {count - 1} of "
                    f"layer {layer}. Received: head {head}"
                )
            heads.append((index, head))
        return tuple(dict.fromkeys(heads))

    def pooled_layers(self, student: Description) -> list[int]:
        """The layers that are named, or else all with full attention."""
        allowed = indices_of_global(student.layers, student.model)
        if self.student_layers is None:
            return allowed
        layers = [
            resolve_index("student_layers", "student", student, allowed, index)
            for index in self.student_layers
        ]
        if not layers or len({*layers}) < len(layers):
            raise ValueError(
                "`student_layers` must name one layer or more, each once. "
                f"Received: student_layers={self.student_layers!r:.80}"
            )
        return layers

    def targets(
        self, heads: Heads, student: Description, teacher: Description
    ) -> tuple[Target, ...]:
        """Which layer of the student learns from which heads."""
        if not heads:
            return ()
        if self.student_layers is not None or self.pooling != "none":
            layers = self.pooled_layers(student)
            return tuple(Target(layer, heads) for layer in layers)
        allowed = indices_of_global(student.layers, student.model)
        groups: dict[int, list[tuple[int, int]]] = {}
        for layer, head in sorted(heads):
            depth = (layer + 0.5) / len(teacher.layers) * len(student.layers)
            nearest = min(allowed, key=lambda s: abs(s + 0.5 - depth))
            groups.setdefault(nearest, []).append((layer, head))
        return tuple(Target(s, tuple(of)) for s, of in sorted(groups.items()))

    def teacher_retrieval(
        self,
        log_shares: Mapping[int, Tensor],
        heads: Heads,
        x: Mapping[str, Tensor],
    ) -> Retrieval:
        """Where the teacher looks; a subclass may set other targets.

        Args:
            log_shares: Dictionary from layer to what `log_shares_of_heads`
                returns.
            heads: Pairs `(layer, head)` whose mean is taken.
            x: The batch's inputs.
        """
        layers = layers_of(heads)
        counts = [sum(of == layer for of, _ in heads) for layer in layers]
        stacked = ops.stack([log_shares[layer] for layer in layers], axis=1)
        weight = [count / len(heads) for count in counts]
        return retrieval(stacked, ops.convert_to_tensor(weight, "float32"))

    def divergence(
        self,
        targets: Sequence[Target],
        student: Mapping[int, Attention],
        log_shares: Mapping[int, Tensor],
        rows: MatchedRows,
        x: Mapping[str, Tensor],
        segments: Segments,
        distance: Distance,
        head_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The divergence of each example and its weight, as of the op.

        Without pooling, the mean over the student's layers; otherwise one
        divergence of all their heads together.
        """
        found = {
            target.student_layer: segment_attention(
                rows.of(student[target.student_layer]), rows.mask, *segments
            )
            for target in targets
        }
        if self.pooling != "none":
            (heads,) = {target.teacher_heads for target in targets}
            return retrieval_divergence(
                ops.concatenate(list(found.values()), axis=1),
                self.teacher_retrieval(log_shares, heads, x),
                rows.counted,
                distance,
                head_weight,
                self.pooling,
            )
        by_layer = [
            retrieval_divergence(
                found[target.student_layer],
                self.teacher_retrieval(log_shares, target.teacher_heads, x),
                rows.counted,
                distance,
            )
            for target in targets
        ]
        weight = sum(each for _, each in by_layer)
        total = sum(divergence * each for divergence, each in by_layer)
        return total / ops.maximum(weight, keras.backend.epsilon()), weight


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
        means[layer] = ops.logsumexp(log_shares, axis=1) - math.log(len(chosen))
    return means


def text_log_shares(
    model: keras.Model,
    x: Mapping[str, Tensor],
    attention: Mapping[int, Attention],
    heads: Heads,
    num_segments: int | None,
) -> dict[int, Tensor]:
    """`log_shares_of_heads` of all text rows of a batch."""
    first = attention[layers_of(heads)[0]]
    key_length = ops.shape(first.key)[1]
    rows = matched_rows(model, x, key_length, "text")
    return log_shares_of_heads(
        {layer: rows.of(each) for layer, each in attention.items()},
        heads,
        rows.mask,
        segments_for(model, x, key_length, num_segments),
    )


def segments_for(
    model: keras.Model,
    x: Mapping[str, Tensor],
    key_length: int | Tensor,
    num_segments: int | None,
) -> Segments:
    """The segments of a batch, which must have some."""
    segments = segments_of(model, x, key_length, num_segments)
    if segments is None:
        raise ValueError(
            "The retrieval term needs prompts with images or segments. "
            f"Received: inputs with {sorted(x)}. Add "
            '`"segments"` to the inputs, or pass `retrieval_weight=0`.'
        )
    return segments


def only_heads(attention: Attention, heads: Sequence[int]) -> Attention:
    """`attention` of some query heads, each with a key head of its own."""
    repeats = attention.query.shape[2] // attention.key.shape[2]
    return attention._replace(
        query=ops.take(attention.query, heads, axis=2),
        key=ops.take(attention.key, [h // repeats for h in heads], axis=2),
    )


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
