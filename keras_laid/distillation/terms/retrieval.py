"""Where the student looks among the images, as the teacher's heads do."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_laid.backbones.forward import Run
from keras_laid.backbones.head_examples import matters
from keras_laid.distillation.description import Description
from keras_laid.distillation.distance_weighting import DistanceWeighting
from keras_laid.distillation.matched_rows import after_segments
from keras_laid.distillation.retrieval_matching import Heads
from keras_laid.distillation.retrieval_matching import RetrievalMatching
from keras_laid.distillation.retrieval_matching import Target
from keras_laid.distillation.retrieval_matching import layers_of
from keras_laid.distillation.retrieval_matching import segment_distance
from keras_laid.distillation.retrieval_matching import segments_for
from keras_laid.distillation.retrieval_matching import text_log_shares
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.terms.term import weighted_mean
from keras_laid.layers.head_mixer import HeadMixer
from keras_laid.typing import Tensor


class RetrievalTerm(Term):
    """`keras_laid.ops.retrieval_divergence` from the teacher's heads.

    Args:
        weight: Float of at least 0, or a schedule of training steps.
        matching: `keras_laid.RetrievalMatching`.
        distance_weighting: `keras_laid.DistanceWeighting`.

    Attributes:
        heads: Pairs `(layer, head)` of the teacher that are matched; `None`
            until they are found. Without any, the term is 0.
        head_pooling: `keras_laid.HeadMixer`, or `None` without pooling.
    """

    has_progress = True

    def __init__(
        self,
        weight: Weight,
        matching: RetrievalMatching,
        distance_weighting: DistanceWeighting,
    ) -> None:
        super().__init__(retrieval=weight)
        self.matching = matching
        self.distance_weighting = distance_weighting
        self.heads: Heads | None = ()
        self.head_pooling: HeadMixer | None = None

    def bind(
        self,
        student: Description,
        teacher: Description,
        store: StoredTeacher | None,
    ) -> None:
        heads = self.matching.resolve(student, teacher)
        if not self.is_used:
            return
        if store is not None:
            heads = store.check_retrieval(heads)
        self.heads = heads
        self.descriptions = student, teacher
        if self.matching.pooling != "none":
            layers = self.matching.pooled_layers(student)
            count = sum(student.layers[s].num_query_heads for s in layers)
            self.head_pooling = HeadMixer(1, count, name="mixer_retrieval")

    @property
    def matches(self) -> tuple[Target, ...]:
        """Which layer of the student learns from which heads."""
        if self.heads is None:
            raise ValueError(
                "The teacher's retrieval heads must be known before a step. "
                "Received: a step outside of `fit`. Call "
                "`distiller.find_heads(batches)` first."
            )
        if not self.heads:
            return ()
        return self.matching.targets(self.heads, *self.descriptions)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.matches)

    @property
    def weighs_distance(self) -> bool:
        return bool(self.heads)

    def student_layers(self) -> set[int]:
        return {match.student_layer for match in self.matches}

    def teacher_layers(self) -> set[int]:
        return {*layers_of(self.heads)} if self.matches else set()

    def targets(
        self, student: keras.Model, x: Mapping[str, Tensor], teacher: Run
    ) -> dict[int, Tensor]:
        """The mean attention of the heads of each layer, in logarithms."""
        attention = {
            layer: teacher.attention[layer] for layer in self.teacher_layers()
        }
        return text_log_shares(
            student, x, attention, self.heads, self.matching.num_segments
        )

    def stored_targets(
        self, store: StoredTeacher, x: Mapping[str, Tensor]
    ) -> dict[int, Tensor]:
        return store.log_shares(x, self.teacher_layers())

    def compute(
        self, step: Step, targets: Any
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Mean over examples of the divergence of their rows."""
        matches = self.matches
        if not matches:
            return 0.0, {"retrieval": ops.zeros(())}
        rows = step.rows("text")
        segments = segments_for(
            step.model,
            step.x,
            ops.shape(rows.attended)[1],
            self.matching.num_segments,
        )
        # Rows between segments see some of them, and what stands after the
        # last marked token is part of no answer.
        counted = ops.logical_and(rows.counted, matters(step.sample_weight))
        counted = ops.logical_and(
            counted, after_segments(rows, segments.numbers)
        )
        divergence, weight = self.matching.divergence(
            matches,
            step.run.attention,
            targets,
            rows._replace(counted=counted),
            step.x,
            segments,
            segment_distance(
                segments,
                rows.row_positions,
                rows.key_positions,
                self.distance_weighting.strength * step.progress,
                self.distance_weighting.exponent,
            ),
            self.head_pooling and self.head_pooling.mixture()[0],
        )
        # Examples count alike, but for those in which nothing is retrieved.
        retrieves = ops.cast(weight > 0, "float32")
        mean = weighted_mean(
            divergence, retrieves * ops.max(step.sample_weight, axis=1)
        )
        return step.weights["retrieval"] * mean, {"retrieval": mean}
