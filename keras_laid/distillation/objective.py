"""The distiller's loss: both models run once, and the terms are added up."""

from collections.abc import Iterable
from typing import Any

from keras import ops

from keras_laid.backbones.forward import forward
from keras_laid.backbones.teacher_inputs import at_students_tokens
from keras_laid.backbones.teacher_inputs import inputs_of_teacher
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Weight
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor


class Objective:
    """A base class of the distiller: what a step minimises and reports."""

    @property
    def term_weights(self) -> dict[str, Weight]:
        return {
            name: weight
            for term in self.terms
            for name, weight in term.weights.items()
        }

    def run_teacher(self, x: dict[str, Tensor]) -> list[Any] | None:
        """Each term's targets from the teacher; `None` if no term has one."""
        needs = [term.needs_teacher for term in self.terms]
        if not any(needs):
            return None
        if isinstance(self.teacher, StoredTeacher):
            self.teacher.check_inputs(x)
            return [
                term.stored_targets(self.teacher, x) if needed else None
                for term, needed in zip(self.terms, needs, strict=True)
            ]
        run = forward(
            self.teacher,
            inputs_of_teacher(x),
            union(term.teacher_attention() for term in self.terms),
            linear_memory=self.linear_memory,
            hidden_layers=union(
                term.teacher_hidden_states() for term in self.terms
            ),
        )
        run = run._replace(tokens=at_students_tokens(run.tokens, x))
        return [
            term.targets(self.student, x, run) if needed else None
            for term, needed in zip(self.terms, needs, strict=True)
        ]

    def compute_terms(
        self,
        x: dict[str, Tensor],
        y: Tensor,
        sample_weight: Tensor | None,
        targets: list[Any] | None,
        training: bool,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Runs the student and computes every loss term.

        Losses are defined only here, for all backends.

        Args:
            x: Dictionary of the student's inputs.
            y: Integer tensor of shape `(batch, length)`, the next tokens.
            sample_weight: Float tensor of shape `(batch, length)`, 0 or more,
                or `None` to mark every token.
            targets: The result of `run_teacher(x)`.
            training: Boolean, whether this is a training step, or evaluation.

        Returns:
            A tuple of the student's logits, or `None` if no loss or metric
            takes them, and a dictionary of scalars: the terms in use,
            unweighted, and `"loss"`.
        """
        if training:
            self.check_progress()
        run = forward(
            self.student,
            x,
            union(term.student_attention() for term in self.terms),
            training,
            self.rematerialize,
            self.linear_memory,
            union(term.student_hidden_states() for term in self.terms),
        )
        y_pred = None
        if self.needs_logits:
            y_pred = run.tokens.logits()
            run = run._replace(tokens=Unembedding(y_pred))
        if sample_weight is None:
            sample_weight = ops.ones_like(y)
        progress, weights = self.schedule(training)
        step = Step(
            self.student,
            x,
            y,
            ops.cast(sample_weight, "float32"),
            run,
            y_pred,
            self.distance_weighting.strength * progress,
            self.distance_weighting.exponent,
            weights,
        )
        terms: dict[str, Tensor] = {}
        loss: Tensor | float = sum(self.losses)
        if "progress" in self.trackers:
            terms["progress"] = progress
        if targets is None:
            targets = [None] * len(self.terms)
        for term, target in zip(self.terms, targets, strict=True):
            weighted, values = term.compute(step, target)
            terms.update(values)
            loss = loss + weighted
        terms["loss"] = loss
        if training:
            self.step.assign(self.step + 1)
        return y_pred, terms

    def schedule(
        self, training: bool
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Progress, and the weight of each term.

        In evaluation, both are those of the end of training, whatever the step,
        so that the losses of two epochs can be compared.
        """
        weighting = self.distance_weighting
        step, progress = self.total_steps, ops.ones(())
        if training:
            step = self.step
            progress = weighting.progress(
                step, weighting.steps or self.total_steps
            )
        weights = {
            name: weight(step) if callable(weight) else weight
            for name, weight in self.term_weights.items()
        }
        return progress, weights

    def check_progress(self) -> None:
        """Refuses a training step if it needs an unknown number of steps."""
        weighting = self.distance_weighting
        if weighting.schedule == "constant" or weighting.steps is not None:
            return
        weighted = any(term.weighs_distance for term in self.terms)
        if weighted and not self.fit_knows_steps:
            raise ValueError(
                "The number of training steps must be known, since "
                "`distance_weighting` grows over them. Received: "
                f"schedule={weighting.schedule!r}, steps=None, and a step "
                "outside of `fit`, or data without a length. Pass `steps` to "
                "`DistanceWeighting`, or `steps_per_epoch` to `fit`."
            )

    def check_end_is_known(self) -> None:
        """Refuses to evaluate a schedule whose last step is not known."""
        names = [
            f"{name}_weight"
            for name, weight in self.term_weights.items()
            if callable(weight)
        ]
        if names and not int(self.total_steps):
            raise ValueError(
                "To evaluate schedules, the number of training steps must be "
                "known, since terms are weighted as at the end of training. "
                f"Received: {names} before `fit`. Call `fit` first; for data "
                "without a length, with `steps_per_epoch` or "
                "`DistanceWeighting(steps=...)`."
            )

    def update_metrics(
        self,
        x: dict[str, Tensor],
        y: Tensor,
        sample_weight: Tensor | None,
        y_pred: Tensor | None,
        terms: dict[str, Tensor],
    ) -> dict[str, float]:
        """Updates every metric; returns the logs of a step."""
        batch = ops.shape(y)[0]
        self._loss_tracker.update_state(terms["loss"], sample_weight=batch)
        for name, tracker in self.trackers.items():
            tracker.update_state(terms[name], sample_weight=batch)
        return self.compute_metrics(x, y, y_pred, sample_weight)


def union(sets: Iterable[set[int]]) -> list[int]:
    return sorted(set().union(*sets))
