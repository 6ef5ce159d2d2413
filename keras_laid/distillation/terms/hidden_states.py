"""The term of hidden states: the student's blocks learn the teacher's."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.backbones.forward import Run
from keras_laid.distillation.description import Description
from keras_laid.distillation.layer_map import resolve_layer_map
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.terms.term import check_weight
from keras_laid.distillation.terms.term import weighted_mean
from keras_laid.typing import Tensor


class HiddenStates(Term):
    """`hidden_states`: squared error of projected outputs of some layers.

    A learned projection `P` takes the student's hidden states `h` to the
    teacher's `t`. For each pair of layers

    `loss = mean |P h - t|^2 / mean |t - mean(t)|^2`,

    where means are over the tokens of a batch that count. The loss is 0 if the
    states are equal, and 1 if `P h` is always the mean of the teacher's states.
    The term is the mean over the pairs.

    Args:
        weight: Float of at least 0, or a
            `keras.optimizers.schedules.LearningRateSchedule` of training steps:
            the weight of the term. Defaults to `1.0`.
        layer_map: Which layers are compared: `"last"`, the last layer of each
            model; `"uniform"`, every layer of the student with the one at the
            same relative depth; or pairs of indices `(student_layer,
            teacher_layer)`. Defaults to `"last"`.
        rows: Whose states are compared: `"text"`, those of text tokens, or
            `"all"`, those of image tokens too. Defaults to `"all"`.

    Raises:
        ValueError: If an argument is outside its range. When the distiller is
            made, if `layer_map` is of another kind, a layer does not exist, or
            the teacher is a `keras_laid.StoredTeacher`, which has no hidden
            states.

    Example:

    ```python
    from keras_laid.distillation import HiddenStates
    from keras_laid.distillation import NextTokens
    from keras_laid.distillation import RetrievalMatching

    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=teacher,
        student=student,
        terms=[RetrievalMatching(), NextTokens(), HiddenStates(0.1)],
    )
    ```

    Reference:
     - [Romero et al., 2015](https://arxiv.org/abs/1412.6550), equation 3.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        layer_map: Literal["last", "uniform"]
        | Sequence[tuple[int, int]] = "last",
        rows: Literal["text", "all"] = "all",
    ) -> None:
        check_weight("weight", weight)
        check_choice("rows", rows, ("text", "all"))
        super().__init__(hidden_states=weight)
        self.layer_map = layer_map
        self.rows = rows

    def bind(
        self,
        student: Description,
        teacher: Description,
        store: StoredTeacher | None,
    ) -> None:
        self.layer_pairs = resolve_layer_map(self.layer_map, student, teacher)
        if store is not None:
            raise ValueError(
                "`HiddenStates` needs a teacher in memory: a store holds no "
                "hidden states. Received: a `keras_laid.StoredTeacher`. "
                "Pass the teacher itself, or leave the term out."
            )
        if not self.is_used:
            return
        for student_layer, _ in self.layer_pairs:
            projection = keras.layers.Dense(
                teacher.hidden_dim,
                dtype="float32",
                name=f"projection_{student_layer}",
            )
            projection.build((None, None, student.hidden_dim))
            self.layers.append(projection)

    def student_hidden_states(self) -> set[int]:
        return {s for s, _ in self.layer_pairs}

    def teacher_hidden_states(self) -> set[int]:
        return {t for _, t in self.layer_pairs}

    def targets(
        self, student: keras.Model, x: Mapping[str, Tensor], teacher: Run
    ) -> dict[int, Tensor]:
        return {
            layer: teacher.hidden_states[layer]
            for layer in self.teacher_hidden_states()
        }

    def compute(
        self, step: Step, targets: Any
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        rows = step.rows(self.rows)
        counted = ops.cast(rows.counted, "float32")
        # [batch, rows, 1]: the weight of an example is that of its token with
        # the largest weight.
        weight = counted * ops.max(step.sample_weight, axis=1, keepdims=True)
        weight = weight[:, :, None]
        losses = []
        for projection, (s, t) in zip(
            self.layers, self.layer_pairs, strict=True
        ):
            hidden, teacher = (
                ops.cast(states[:, -rows.num_rows :], "float32")
                for states in (step.run.hidden_states[s], targets[t])
            )
            total = ops.maximum(ops.sum(weight), keras.backend.epsilon())
            mean = ops.sum(weight * teacher, axis=(0, 1)) / total
            error = weighted_mean(
                ops.square(projection(hidden) - teacher), weight
            )
            variance = weighted_mean(ops.square(teacher - mean), weight)
            losses.append(
                error / ops.maximum(variance, keras.backend.epsilon())
            )
        loss = sum(losses) / len(losses)
        return step.weights["hidden_states"] * loss, {"hidden_states": loss}
