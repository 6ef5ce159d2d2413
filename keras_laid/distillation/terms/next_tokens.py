"""The term of next tokens, from the teacher's logits and the labels."""

from collections.abc import Mapping
from typing import Any
from typing import Literal

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_number
from keras_laid.backbones.forward import Run
from keras_laid.distillation import checks
from keras_laid.distillation.description import Description
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.terms.term import check_weight
from keras_laid.ops.logits_divergence import logits_divergence
from keras_laid.ops.top_logits import TopLogits
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor


class NextTokens(Term):
    """`logits` and `supervised`: the teacher's answers and the labels.

    `logits` is the divergence of `keras_laid.ops.logits_divergence`, averaged
    over the tokens that `sample_weight` marks. `supervised` is the
    cross-entropy of the student's logits with the labels, averaged in the same
    way, or the loss that the distiller was compiled with.

    Args:
        logits_weight: Float of at least 0, or a
            `keras.optimizers.schedules.LearningRateSchedule` of training steps:
            the weight of `logits`. Defaults to `1.0`.
        supervised_weight: Float of at least 0, or a schedule of training steps:
            the weight of `supervised`. Defaults to `1.0`.
        temperature: Float greater than 0, by which `logits` divides both
            models' logits. Defaults to `1.0`.
        beta: Float in `[0, 1]`: `logits` is the forward Kullback-Leibler
            divergence at 0, the reverse one at 1, and the generalized
            Jensen-Shannon divergence in between. The forward one makes the
            student cover every answer of the teacher, the reverse one makes it
            avoid answers that the teacher would not give. Defaults to `0.0`.
        vocabulary: `"same"` if both models have as many tokens, or `"shared"`
            to compare the logits of only the first tokens, which both
            vocabularies have. Defaults to `"same"`.

    Attributes:
        loss: `keras.losses.Loss` of labels and logits, or `None` for the
            cross-entropy that is computed with the divergence.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is outside its range. When the distiller is
            made, if the vocabularies do not fit.
    """

    allows_other_prompt = True

    def __init__(
        self,
        logits_weight: Weight = 1.0,
        supervised_weight: Weight = 1.0,
        temperature: float = 1.0,
        beta: float = 0.0,
        vocabulary: Literal["same", "shared"] = "same",
    ) -> None:
        check_weight("logits_weight", logits_weight)
        check_weight("supervised_weight", supervised_weight)
        check_number("temperature", temperature, "(0, inf)")
        check_number("beta", beta, "[0, 1]")
        check_choice("vocabulary", vocabulary, ("same", "shared"))
        super().__init__(logits=logits_weight, supervised=supervised_weight)
        self.temperature = temperature
        self.beta = beta
        self.vocabulary = vocabulary
        self.loss: keras.losses.Loss | None = None

    def bind(
        self,
        student: Description,
        teacher: Description,
        store: StoredTeacher | None,
    ) -> None:
        if not self.needs_teacher:
            return
        checks.check_vocabularies(teacher, student, self.vocabulary)
        if store is not None:
            store.check(logits=True, temperature=self.temperature)

    @property
    def metrics(self) -> list[str]:
        return [*super().metrics, *(["kl"] if self.needs_teacher else [])]

    @property
    def needs_teacher(self) -> bool:
        return bool(self.weights["logits"])

    def targets(
        self, student: keras.Model, x: Mapping[str, Tensor], teacher: Run
    ) -> Unembedding | TopLogits | None:
        return teacher.tokens

    def stored_targets(
        self, store: StoredTeacher, x: Mapping[str, Tensor]
    ) -> TopLogits:
        return store.top_logits(x)

    def compute(
        self, step: Step, targets: Any
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        total: Tensor | float = 0.0
        terms = {}
        labels = step.y if self.weights["supervised"] else None
        if self.loss is not None and labels is not None:
            terms["supervised"] = supervised(self.loss, step)
            total = step.weights["supervised"] * terms["supervised"]
            labels = None
        if targets is None and labels is None:
            return total, terms
        losses = logits_divergence(
            step.run.tokens,
            targets,
            labels,
            step.sample_weight,
            divergence_weight=step.weights["logits"],
            cross_entropy_weight=step.weights["supervised"],
            temperature=self.temperature,
            beta=self.beta,
            vocabulary=self.vocabulary,
        )
        if targets is not None:
            terms |= {"logits": losses.divergence, "kl": losses.kl}
        if labels is not None:
            terms["supervised"] = losses.cross_entropy
        return total + losses.loss, terms


def supervised(loss: keras.losses.Loss, step: Step) -> Tensor:
    """A compiled loss; NaN if a marked label is not a token."""
    value = loss(step.y, step.logits, sample_weight=step.sample_weight)
    # As in `keras_laid.ops.logits_divergence`.
    outside = ops.logical_and(
        step.y >= ops.shape(step.logits)[-1], step.sample_weight > 0
    )
    return ops.where(ops.any(outside), float("nan"), value)
