"""The base class of the loss terms, and the inputs of a step."""

from collections.abc import Mapping
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import TypeAlias

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_laid.arguments import check_number
from keras_laid.backbones.forward import Run
from keras_laid.distillation.description import Description
from keras_laid.distillation.matched_rows import MatchedRows
from keras_laid.distillation.matched_rows import matched_rows
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.ops.attention import Distance
from keras_laid.typing import Tensor

Weight: TypeAlias = float | LearningRateSchedule


class Step(NamedTuple):
    """The inputs of all terms in one step.

    Attributes:
        model: The student.
        x: Dictionary of the student's inputs.
        y: Integer tensor of shape `(batch, length)`, the next tokens.
        sample_weight: Float tensor of shape `(batch, length)`, 0 or more.
        run: The student's `Run`.
        logits: Float tensor of shape `(batch, length, vocabulary)`, or `None`
            if no loss or metric takes them.
        strength: Float scalar of at least 0, how much more the most distant
            tokens count at this step.
        exponent: Float, of distance; see `keras_laid.DistanceWeighting`.
        weights: Dictionary from the name of a loss to its weight at this step.
    """

    model: keras.Model
    x: Mapping[str, Tensor]
    y: Tensor
    sample_weight: Tensor
    run: Run
    logits: Tensor | None
    strength: Tensor
    exponent: float
    weights: Mapping[str, float | Tensor]

    def rows(self, rows: Literal["text", "all"]) -> MatchedRows:
        """The rows of text, or all rows, of the layers that were read."""
        return matched_rows(self.model, self.x, self.run.key_length, rows)

    def distance(
        self, row_positions: Tensor, key_positions: Tensor
    ) -> Distance:
        """The distances of rows and keys, with the weighting of this step."""
        return Distance(
            row_positions, key_positions, self.strength, self.exponent
        )


class Term:
    """A part of the loss.

    The distiller asks each term which layers it reads, runs each model once,
    and adds up what `compute` returns.

    Args:
        **weights: The weight of each loss of this term by its name, which is
            the name of its metric: a float of at least 0, or a schedule of
            training steps. Losses of weight 0 are not computed.

    Attributes:
        has_progress: Boolean, whether the term's losses change with the
            progress of training. If so, `progress` is a metric.
        layers: List of `keras.layers.Layer`, which are trained with the
            student.
        is_bound: Boolean, whether the term belongs to a distiller.
        allows_other_prompt: Boolean, whether the teacher may read another
            prompt than the student, since only next tokens are compared.
    """

    has_progress = False
    allows_other_prompt = False

    def __init__(self, **weights: Weight) -> None:
        self.weights = weights
        self.layers: list[keras.layers.Layer] = []
        self.is_bound = False

    def bind(
        self,
        student: Description,
        teacher: Description,
        store: StoredTeacher | None,
    ) -> None:
        """Refuses models that do not fit, and makes the term's layers.

        Args:
            student: The student's `Description`.
            teacher: The teacher's `Description`.
            store: The `keras_laid.StoredTeacher` that is used in place of a
                teacher, or `None`.

        Raises:
            ValueError: If the models or the store lack what the term needs.
        """

    @property
    def is_used(self) -> bool:
        return any(bool(weight) for weight in self.weights.values())

    @property
    def metrics(self) -> list[str]:
        """Names of the scalars that `compute` returns."""
        return [name for name, weight in self.weights.items() if weight]

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to run for this term."""
        return self.is_used

    @property
    def weighs_distance(self) -> bool:
        """Whether a step needs to know the progress of training."""
        return self.has_progress and self.is_used

    def student_attention(self) -> set[int]:
        """Layers of the student whose attention the term reads."""
        return set()

    def teacher_attention(self) -> set[int]:
        """Layers of the teacher whose attention the term reads."""
        return set()

    def student_hidden_states(self) -> set[int]:
        """Layers of the student whose output the term reads."""
        return set()

    def teacher_hidden_states(self) -> set[int]:
        """Layers of the teacher whose output the term reads."""
        return set()

    def targets(
        self, student: keras.Model, x: Mapping[str, Tensor], teacher: Run
    ) -> Any:
        """The part of a run of the teacher that this term needs.

        Args:
            student: The student.
            x: Dictionary of the inputs.
            teacher: The teacher's `Run`.
        """
        raise NotImplementedError

    def stored_targets(
        self, store: StoredTeacher, x: Mapping[str, Tensor]
    ) -> Any:
        """The targets of this term from a stored teacher.

        Args:
            store: `keras_laid.StoredTeacher`.
            x: Dictionary of the inputs, which hold the stored targets.
        """
        raise NotImplementedError

    def compute(
        self, step: Step, targets: Any
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            step: `Step`.
            targets: The result of `targets` or `stored_targets`, or `None` if
                the teacher did not run.

        Returns:
            A tuple of the weighted sum of the term's losses, and a dictionary
            of scalars: each loss without its weight, and further metrics.
        """
        raise NotImplementedError


def check_weight(name: str, weight: object) -> None:
    """Refuses what is neither a schedule nor a number of at least 0."""
    if not isinstance(weight, LearningRateSchedule):
        check_number(name, weight, "[0, inf)")


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values`; `weights` have its shape or broadcast to it."""
    weights = ops.broadcast_to(weights, ops.shape(values))
    total = ops.maximum(ops.sum(weights), keras.backend.epsilon())
    return ops.sum(values * weights) / total
