"""The retrieval term: the student looks at the images the teacher does."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_indices
from keras_laid.arguments import check_integer
from keras_laid.backbones.decoder import indices_of_global
from keras_laid.backbones.forward import Run
from keras_laid.backbones.head_examples import matters
from keras_laid.backbones.segments import Segments
from keras_laid.distillation.description import Description
from keras_laid.distillation.layer_map import resolve_index
from keras_laid.distillation.matched_rows import MatchedRows
from keras_laid.distillation.matched_rows import after_segments
from keras_laid.distillation.retrieval_shares import Heads
from keras_laid.distillation.retrieval_shares import check_heads
from keras_laid.distillation.retrieval_shares import layers_of
from keras_laid.distillation.retrieval_shares import resolve_heads
from keras_laid.distillation.retrieval_shares import segment_distance
from keras_laid.distillation.retrieval_shares import segments_for
from keras_laid.distillation.retrieval_shares import text_log_shares
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.terms.term import check_weight
from keras_laid.distillation.terms.term import weighted_mean
from keras_laid.layers.head_mixer import HeadMixer
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import Distance
from keras_laid.ops.retrieval_divergence import POOLINGS
from keras_laid.ops.retrieval_divergence import Retrieval
from keras_laid.ops.retrieval_divergence import retrieval
from keras_laid.ops.retrieval_divergence import retrieval_divergence
from keras_laid.ops.segment_attention import segment_attention
from keras_laid.typing import Tensor


class Match(NamedTuple):
    """The heads that one layer of the student learns from.

    Attributes:
        student_layer: Integer.
        teacher_heads: Pairs of integers `(layer, head)`.
    """

    student_layer: int
    teacher_heads: Heads


class RetrievalMatching(Term):
    """`retrieval`: the student looks where the teacher's retrieval heads look.

    The teacher's retrieval heads look at the image that a question is about.
    The student's attention over the images is compared with theirs, by
    `keras_laid.ops.retrieval_divergence`, weighted by distance.

    Args:
        weight: Float of at least 0, or a
            `keras.optimizers.schedules.LearningRateSchedule` of training steps,
            which can fade the term in or out. The term is 0 for prompts with
            less than two images or segments. Defaults to `1.0`.
        teacher_heads: `"auto"`, the heads that
            `keras_laid.find_retrieval_heads` finds on the first batches; or
            pairs of integers `(layer, head)`, where a negative layer counts
            from the last. Defaults to `"auto"`.
        student_layers: Optional sequence of integers, the layers of the student
            that learn from all of the heads. Defaults to `None`: without
            pooling, the student's layer at the same relative depth learns from
            the heads of each layer of the teacher; with pooling, every layer
            with full attention takes part.
        pooling: `"none"`: every head of the student's layers must look where
            the teacher does. `"heads"`: only a mean of the heads, with learned
            weights, must do so. `"rows"`: only the mean over heads and rows
            must do so, whichever of them contribute. Defaults to `"none"`.
        num_segments: Optional integer, the largest number of a segment. It is
            needed if inputs have `"segments"` without `"segment_numbers"`,
            which lists them, or if they do not say how many images a prompt
            has, as an `"image_grid_thw"` of shape `(images, 3)`. Defaults to
            `None`, the number of images or of listed segments.

    Attributes:
        heads: Pairs `(layer, head)` of the teacher that are matched; `None`
            until they are found. Without any, the term is 0.
        head_pooling: `keras_laid.HeadMixer`, or `None` without pooling.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is outside its range.

    Example:

    ```python
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=teacher,
        student=student,
        terms=[
            keras_laid.distillation.RetrievalMatching(teacher_heads=[(1, 0)]),
            keras_laid.distillation.NextTokens(),
        ],
    )
    ```
    """

    has_progress = True

    def __init__(
        self,
        weight: Weight = 1.0,
        teacher_heads: Literal["auto"] | Sequence[tuple[int, int]] = "auto",
        student_layers: Sequence[int] | None = None,
        pooling: Literal["none", "heads", "rows"] = "none",
        num_segments: int | None = None,
    ) -> None:
        check_weight("weight", weight)
        check_heads("teacher_heads", teacher_heads)
        if student_layers is not None:
            check_indices("student_layers", student_layers)
        check_choice("pooling", pooling, POOLINGS)
        if num_segments is not None:
            check_integer("num_segments", num_segments)
        super().__init__(retrieval=weight)
        self.teacher_heads = teacher_heads
        self.student_layers = student_layers
        self.pooling = pooling
        self.num_segments = num_segments
        self.heads: Heads | None = ()
        self.head_pooling: HeadMixer | None = None

    def bind(
        self,
        student: Description,
        teacher: Description,
        store: StoredTeacher | None,
    ) -> None:
        layers = self.pooled_layers(student)
        heads = self.named_heads(teacher)
        if not self.is_used:
            return
        if store is not None:
            heads = store.check_retrieval(heads)
        self.heads = heads
        self.descriptions = student, teacher
        if self.pooling != "none":
            known = student.layers_with_maps
            count = sum(known[layer].num_query_heads for layer in layers)
            self.head_pooling = HeadMixer(1, count, name="mixer_retrieval")

    def named_heads(self, teacher: Description) -> Heads | None:
        """The teacher's heads, or `None` if the first batches decide them.

        A subclass may choose others.
        """
        return resolve_heads("teacher_heads", self.teacher_heads, teacher)

    def pooled_layers(self, student: Description) -> list[int]:
        """The named layers, or if none are named, all with full attention."""
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

    @property
    def matches(self) -> tuple[Match, ...]:
        """Which layer of the student learns from which heads."""
        if self.heads is None:
            raise ValueError(
                "The teacher's retrieval heads must be known before a step. "
                "Received: a step outside of `fit`. Call "
                "`distiller.find_heads(batches)` first."
            )
        if not self.heads:
            return ()
        student, teacher = self.descriptions
        if self.student_layers is not None or self.pooling != "none":
            layers = self.pooled_layers(student)
            return tuple(Match(layer, self.heads) for layer in layers)
        allowed = indices_of_global(student.layers, student.model)
        groups: dict[int, list[tuple[int, int]]] = {}
        for layer, head in sorted(self.heads):
            depth = (layer + 0.5) / len(teacher.layers) * len(student.layers)
            nearest = min(allowed, key=lambda s: abs(s + 0.5 - depth))
            groups.setdefault(nearest, []).append((layer, head))
        return tuple(
            Match(s, tuple(heads)) for s, heads in sorted(groups.items())
        )

    @property
    def needs_teacher(self) -> bool:
        return bool(self.matches)

    @property
    def weighs_distance(self) -> bool:
        return bool(self.heads)

    def student_attention(self) -> set[int]:
        return {match.student_layer for match in self.matches}

    def teacher_attention(self) -> set[int]:
        return {
            layer for match in self.matches for layer, _ in match.teacher_heads
        }

    def targets(
        self, student: keras.Model, x: Mapping[str, Tensor], teacher: Run
    ) -> dict[int, Tensor]:
        """The mean attention of the heads of each layer, in logarithms."""
        attention = {
            layer: teacher.attention[layer]
            for layer in self.teacher_attention()
        }
        return text_log_shares(
            student, x, attention, self.heads or (), self.num_segments
        )

    def stored_targets(
        self, store: StoredTeacher, x: Mapping[str, Tensor]
    ) -> dict[int, Tensor]:
        return store.log_shares(x, self.teacher_attention())

    def teacher_retrieval(
        self,
        log_shares: Mapping[int, Tensor],
        heads: Heads,
        x: Mapping[str, Tensor],
    ) -> Retrieval:
        """Where the teacher looks; a subclass may set other targets.

        Args:
            log_shares: Dictionary from layer to log shares, as
                `log_shares_of_heads` returns it.
            heads: Pairs `(layer, head)` whose mean is taken.
            x: Dictionary of the batch's inputs.
        """
        layers = layers_of(heads)
        counts = [sum(each == layer for each, _ in heads) for layer in layers]
        stacked = ops.stack([log_shares[layer] for layer in layers], axis=1)
        weight = [count / len(heads) for count in counts]
        return retrieval(stacked, ops.convert_to_tensor(weight, "float32"))

    def compute(
        self, step: Step, targets: Any
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The mean over examples of the divergence of each example."""
        matches = self.matches
        if not matches:
            return 0.0, {"retrieval": ops.zeros(())}
        rows = step.rows("text")
        segments = segments_for(
            step.model, step.x, ops.shape(rows.attended)[1], self.num_segments
        )
        # Rows between segments attend only some of them, and rows after the
        # last marked token are part of no answer.
        counted = ops.logical_and(rows.counted, matters(step.sample_weight))
        counted = ops.logical_and(
            counted, after_segments(rows, segments.numbers)
        )
        divergence, weight = self.divergence(
            matches,
            step.run.attention,
            targets,
            rows._replace(counted=counted),
            step.x,
            segments,
            segment_distance(
                segments, step.distance(rows.row_positions, rows.key_positions)
            ),
        )
        # Examples in which the teacher retrieves nothing do not count.
        retrieves = ops.cast(weight > 0, "float32")
        mean = weighted_mean(
            divergence, retrieves * ops.max(step.sample_weight, axis=1)
        )
        return step.weights["retrieval"] * mean, {"retrieval": mean}

    def divergence(
        self,
        matches: Sequence[Match],
        student: Mapping[int, Attention],
        log_shares: Mapping[int, Tensor],
        rows: MatchedRows,
        x: Mapping[str, Tensor],
        segments: Segments,
        distance: Distance,
    ) -> tuple[Tensor, Tensor]:
        """The divergence and the weight of each example, as from the op.

        Without pooling, the weighted mean over the student's layers; with
        pooling, one divergence of all their heads together.
        """
        found = {
            match.student_layer: segment_attention(
                rows.select(student[match.student_layer]), rows.mask, *segments
            )
            for match in matches
        }
        if self.head_pooling is not None:
            (heads,) = {match.teacher_heads for match in matches}
            return retrieval_divergence(
                ops.concatenate(list(found.values()), axis=1),
                self.teacher_retrieval(log_shares, heads, x),
                rows.counted,
                distance,
                self.head_pooling.mixture()[0],
                self.pooling,
            )
        by_layer = [
            retrieval_divergence(
                found[match.student_layer],
                self.teacher_retrieval(log_shares, match.teacher_heads, x),
                rows.counted,
                distance,
            )
            for match in matches
        ]
        weight = sum(each for _, each in by_layer)
        total = sum(divergence * each for divergence, each in by_layer)
        return total / ops.maximum(weight, keras.backend.epsilon()), weight
