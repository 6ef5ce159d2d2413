"""Whole attention maps, and queries and keys, of pairs of layers."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_number
from keras_laid.backbones.forward import Run
from keras_laid.distillation import checks
from keras_laid.distillation.description import Description
from keras_laid.distillation.layer_map import resolve_layer_map
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.terms.term import check_weight
from keras_laid.distillation.terms.term import weighted_mean
from keras_laid.layers.head_mixer import HeadMixer
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention_divergence import IMPLEMENTATIONS
from keras_laid.ops.attention_divergence import attention_divergence
from keras_laid.ops.dispatch import check_requested
from keras_laid.ops.query_key_distance import query_key_distance
from keras_laid.typing import Tensor


class AttentionMatching(Term):
    """`attention` and `query_key`: whole attention maps, as in the paper.

    `attention` is `keras_laid.ops.attention_divergence` of the student's maps
    from mixed maps of the teacher, weighted by distance, averaged over heads
    and rows; `query_key` is `keras_laid.ops.query_key_distance`, averaged in
    the same way. Both are means over the pairs of layers, and use the same
    learned mixtures of the teacher's heads.

    Args:
        weight: Float of at least 0, or a
            `keras.optimizers.schedules.LearningRateSchedule` of training steps:
            the weight of `attention`. Defaults to `1.0`.
        query_key_weight: Float of at least 0, or a schedule of training steps:
            the weight of `query_key`. Start with 0.1 or less. Defaults to
            `0.0`.
        layer_map: Which layers are compared: `"last"`, the last layer of each
            model; `"uniform"`, every layer of the student with the one at the
            same relative depth; or pairs of indices `(student_layer,
            teacher_layer)`. Defaults to `"last"`.
        rows: Whose attention is compared: `"text"`, the rows of text tokens, or
            `"all"`, those of image tokens too. Defaults to `"text"`.
        mixer_sharpness: Float, how far the mixers start from uniform; see
            `keras_laid.HeadMixer`. Defaults to `0.0`.
        implementation: The name of an implementation of
            `keras_laid.ops.attention_divergence`, or `None` for the fastest one
            that can run. Defaults to `None`.

    Attributes:
        layer_pairs: Pairs of integers `(student_layer, teacher_layer)`.
        mixers: List of `keras_laid.HeadMixer`, one for each pair; empty if the
            term is not used.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is outside its range. When the distiller is
            made, if a layer does not exist, or its attention does not fit.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), equations 7, 8.
    """

    has_progress = True

    def __init__(
        self,
        weight: Weight = 1.0,
        query_key_weight: Weight = 0.0,
        layer_map: Literal["last", "uniform"]
        | Sequence[tuple[int, int]] = "last",
        rows: Literal["text", "all"] = "text",
        mixer_sharpness: float = 0.0,
        implementation: Literal["pallas", "triton", "chunked", "definition"]
        | None = None,
    ) -> None:
        check_weight("weight", weight)
        check_weight("query_key_weight", query_key_weight)
        check_choice("rows", rows, ("text", "all"))
        check_number("mixer_sharpness", mixer_sharpness, "(-inf, inf)")
        check_requested("attention_divergence", IMPLEMENTATIONS, implementation)
        super().__init__(attention=weight, query_key=query_key_weight)
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
            store.check(layers=self.teacher_attention(), rows=self.rows)
        self.mixers = [
            HeadMixer(
                student.layers_with_maps[s].num_query_heads,
                teacher.layers_with_maps[t].num_query_heads,
                sharpness=self.mixer_sharpness,
                name=f"mixer_{s}",
            )
            for s, t in self.layer_pairs
        ]

    def student_attention(self) -> set[int]:
        return {s for s, _ in self.layer_pairs}

    def teacher_attention(self) -> set[int]:
        return {t for _, t in self.layer_pairs}

    def targets(
        self, student: keras.Model, x: Mapping[str, Tensor], teacher: Run
    ) -> dict[int, Attention]:
        return {
            layer: teacher.attention[layer]
            for layer in self.teacher_attention()
        }

    def stored_targets(
        self, store: StoredTeacher, x: Mapping[str, Tensor]
    ) -> dict[int, Attention]:
        return store.attention(x, self.teacher_attention())

    def compute(
        self, step: Step, targets: Any
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        rows = step.rows(self.rows)
        distance = step.distance(rows.row_positions, rows.key_positions)
        # [batch, 1]: the weight of an example is that of its token with the
        # largest weight.
        example_weight = ops.max(step.sample_weight, axis=1, keepdims=True)
        row_weight = example_weight * ops.cast(rows.counted, "float32")
        by_layer: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        for mixer, (s, t) in zip(self.mixers, self.layer_pairs, strict=True):
            # The queries of a stored teacher are those of only these rows.
            student = rows.select(step.run.attention[s])
            teacher = rows.select(targets[t])
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
