"""Whole attention maps, and queries and keys, of pairs of layers."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
from keras import ops

from keras_laid.backbones.forward import Run
from keras_laid.distillation import checks
from keras_laid.distillation.description import Description
from keras_laid.distillation.distance_weighting import DistanceWeighting
from keras_laid.distillation.layer_map import resolve_layer_map
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.terms.term import weighted_mean
from keras_laid.layers.head_mixer import HeadMixer
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import Distance
from keras_laid.ops.attention_divergence import attention_divergence
from keras_laid.ops.query_key_distance import query_key_distance
from keras_laid.typing import Tensor


class AttentionTerm(Term):
    """`attention_divergence` and `query_key_distance` of mixed heads.

    Both are means over the pairs of layers, and mix the teacher's heads by the
    same learned weights.

    Args:
        attention_weight: Float of at least 0, or a schedule of training steps.
        query_key_weight: The same, of the distance of queries and keys.
        distance_weighting: `keras_laid.DistanceWeighting`.
        layer_map: `"last"`, `"uniform"`, or pairs of indices
            `(student_layer, teacher_layer)`, as in
            `keras_laid.DistanceWeightedAttentionDistillation`.
        rows: `"text"` or `"all"`, whose attention is compared.
        mixer_sharpness: Float, as in `keras_laid.HeadMixer`.
        implementation: The name of an implementation of
            `keras_laid.ops.attention_divergence`, or `None` for the fastest one
            that can run.

    Attributes:
        layer_pairs: Pairs of integers `(student_layer, teacher_layer)`.
        mixers: List of `keras_laid.HeadMixer`, one for each pair; empty if the
            term is not used.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), equations 7, 8.
    """

    has_progress = True

    def __init__(
        self,
        attention_weight: Weight,
        query_key_weight: Weight,
        distance_weighting: DistanceWeighting,
        layer_map: str | Sequence[tuple[int, int]],
        rows: Literal["text", "all"],
        mixer_sharpness: float,
        implementation: Literal["pallas", "triton", "chunked", "definition"]
        | None,
    ) -> None:
        super().__init__(attention=attention_weight, query_key=query_key_weight)
        self.distance_weighting = distance_weighting
        self.layer_map = layer_map
        self.rows = rows
        self.mixer_sharpness = mixer_sharpness
        self.implementation = implementation
        self.mixers: list[HeadMixer] = []

    def bind(
        self,
        student: Description,
        teacher: Description,
        store: StoredTeacher | None,
    ) -> None:
        self.layer_pairs = resolve_layer_map(self.layer_map, student, teacher)
        if self.weights["query_key"]:
            checks.check_features(teacher, student, self.layer_pairs)
        if not self.is_used:
            return
        if store is not None:
            store.check(layers=self.teacher_layers(), rows=self.rows)
        self.mixers = [
            HeadMixer(
                student.layers[s].num_query_heads,
                teacher.layers[t].num_query_heads,
                sharpness=self.mixer_sharpness,
                name=f"mixer_{s}",
            )
            for s, t in self.layer_pairs
        ]

    def student_layers(self) -> set[int]:
        return {s for s, _ in self.layer_pairs}

    def teacher_layers(self) -> set[int]:
        return {t for _, t in self.layer_pairs}

    def targets(
        self, student: keras.Model, x: Mapping[str, Tensor], teacher: Run
    ) -> dict[int, Attention]:
        return {
            layer: teacher.attention[layer] for layer in self.teacher_layers()
        }

    def stored_targets(
        self, store: StoredTeacher, x: Mapping[str, Tensor]
    ) -> dict[int, Attention]:
        return store.attention(x, self.teacher_layers())

    def compute(
        self, step: Step, targets: Any
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        rows = step.rows(self.rows)
        distance = Distance(
            row_positions=rows.row_positions,
            key_positions=rows.key_positions,
            strength=self.distance_weighting.strength * step.progress,
            exponent=self.distance_weighting.exponent,
        )
        # [batch, 1]: an example counts as much as its most weighty token.
        example_weight = ops.max(step.sample_weight, axis=1, keepdims=True)
        row_weight = example_weight * ops.cast(rows.counted, "float32")
        by_layer: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        for mixer, (s, t) in zip(self.mixers, self.layer_pairs, strict=True):
            # A stored teacher has no other rows.
            student = rows.of(step.run.attention[s])
            teacher = rows.of(targets[t])
            mixture = mixer.mixture()
            if "attention" in by_layer:
                divergence = attention_divergence(
                    student,
                    teacher,
                    rows.mask,
                    distance,
                    mixture,
                    implementation=self.implementation,
                )
                by_layer["attention"].append(
                    weighted_mean(ops.mean(divergence, axis=1), row_weight)
                )
            if "query_key" in by_layer:
                distances = query_key_distance(
                    student,
                    teacher,
                    mixture,
                    row_mask=rows.counted,
                    key_mask=rows.attended,
                )
                by_layer["query_key"].append(
                    weighted_mean(distances, example_weight)
                )
        losses = {
            name: sum(values) / len(values) for name, values in by_layer.items()
        }
        weighted = [step.weights[name] * losses[name] for name in losses]
        return sum(weighted), losses
