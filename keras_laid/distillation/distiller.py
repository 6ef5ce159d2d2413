"""Trains a small model to attend over a long window as a large one does."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import TypeVar

import keras
from keras.optimizers.schedules import LearningRateSchedule

from keras_laid.arguments import check_kind
from keras_laid.arguments import check_switch
from keras_laid.backbones import decoder
from keras_laid.backbones.forward import forward
from keras_laid.backbones.linear_memory import check_choice_of_memory
from keras_laid.backbones.linear_memory import check_linear_memory
from keras_laid.backbones.workers import BuiltBesideWorkers
from keras_laid.distillation import checks
from keras_laid.distillation.checked_entries import CheckedEntries
from keras_laid.distillation.compiled_loss import as_loss
from keras_laid.distillation.compiled_loss import scaling_the_loss
from keras_laid.distillation.description import Description
from keras_laid.distillation.distance_weighting import DistanceWeighting
from keras_laid.distillation.head_finding import HeadFinding
from keras_laid.distillation.objective import Objective
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.attention import AttentionMatching
from keras_laid.distillation.terms.next_tokens import NextTokens
from keras_laid.distillation.terms.retrieval import RetrievalMatching
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.terms.term import check_weight
from keras_laid.ops.attention_output import Name
from keras_laid.typing import Tensor

# For mypy, which reads all three, the first stands for the others.
if keras.backend.backend() == "jax":
    from keras_laid.distillation.jax_steps import Steps
elif keras.backend.backend() == "torch":
    from keras_laid.distillation.torch_steps import Steps  # type: ignore[assignment]
else:
    from keras_laid.distillation.tensorflow_steps import Steps  # type: ignore[assignment]

WEIGHTS = {
    "retrieval_weight": 1.0,
    "attention_weight": 0.0,
    "logits_weight": 1.0,
    "supervised_weight": 1.0,
}
T = TypeVar("T", bound=Term)


class DistanceWeightedAttentionDistillation(
    BuiltBesideWorkers,
    CheckedEntries,
    HeadFinding,
    Objective,
    Steps,
    keras.Model,
):
    """Long-window anchoring distillation (LAid) as a Keras model.

    A training step runs the student once and the teacher once, and minimises
    the weighted sum of terms, plus the student's regularization losses. Four
    terms are set by their weights:

    - `retrieval`: the divergence of the student's attention over the images
      (or other segments of a prompt) from that of the teacher's retrieval
      heads; see `keras_laid.distillation.RetrievalMatching`.
    - `attention`: the divergence of the student's attention maps from mixed
      maps of the teacher, as in the paper; see
      `keras_laid.distillation.AttentionMatching`.
    - `logits`: the divergence of the student's next-token predictions from the
      teacher's; and `supervised`: the cross-entropy of the student's
      predictions with the labels; see `keras_laid.distillation.NextTokens`.

    Pass `terms` instead to choose all settings of these terms, or other terms.

    A term of weight 0 is not computed, and a teacher that no term needs is not
    run. Each term is a metric, as are `kl` (the logits term at temperature 1)
    and `progress`. Progress needs the number of training steps: `fit` knows it
    from data with a length; for `train_on_batch`, a loop of your own around
    `train_step` or `compute_terms`, and data without a length, pass `steps` to
    `DistanceWeighting`; otherwise a training step raises a `ValueError`.
    In terms that compare attention or hidden states, each example is weighted
    by its largest `sample_weight`: an example without any marked token does
    not count. `sample_weight` must be 0 or more, which a compiled step does
    not check.

    Evaluation weights distances and terms as at the end of training, whatever
    the step, so that `val_loss` can be compared over epochs; `val_progress` is
    1. Schedules are taken at the last step of `fit`.

    Training updates the trainable variables of the student, the mixers and the
    other layers of the terms, never the teacher's, whatever the teacher's
    `trainable` says. `predict` and `generate` run only the student; `evaluate`
    computes the same losses as training. Weight files of the wrapper hold
    everything that training needs to resume, except the teacher. The result of
    training is the model `student`, which is trained in place.

    Args:
        teacher: A `keras_hub.models.CausalLM` of a family that
            `keras_laid.backbones.attention_layers` knows, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`; or a
            `keras_laid.StoredTeacher`, to train without the teacher in memory.
        student: A `keras_hub.models.CausalLM` or a
            `keras_laid.MultiImagePaliGemmaCausalLM`, as for `teacher`, of any
            size. It must have the same tokenizer, turn an image into the same
            tokens and read the same inputs; its family may be another one.
        distance_weighting: A `keras_laid.DistanceWeighting`: how much
            more distant images and tokens count in the retrieval and attention
            terms.
            Defaults to `DistanceWeighting()`.
        retrieval_weight: Float of at least 0, or a
            `keras.optimizers.schedules.LearningRateSchedule` of training steps,
            which can fade the term in or out: the weight of the retrieval
            term. The term is 0 for prompts with less than two images or
            segments. Defaults to `1.0`.
        attention_weight: Float of at least 0, or a schedule of training steps:
            the weight of the divergence of whole attention maps. Defaults to
            `0.0`.
        logits_weight: Float of at least 0, or a schedule of training steps: the
            weight of the divergence from the teacher's logits. Defaults to
            `1.0`.
        supervised_weight: Float of at least 0, or a schedule of training steps:
            the weight of the cross-entropy with the labels `y`. Defaults to
            `1.0`.
        terms: Optional sequence of `keras_laid.distillation.terms.Term`s, each
            made for only this distiller: all terms of the loss. The four
            weights must be left out then. Defaults to `None`, the terms that
            the weights describe.
        **kwargs: Passed to `keras.Model`.

    Call arguments:
        inputs: Dictionary of the student's inputs. An optional `"positions"`
            of shape `(batch, keys)`, where keys are tokens of images and text,
            replaces the positions of every rotary embedding, see
            `keras_laid.PositionStretching`.

    Returns:
        The student's logits.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the models do not fit each other, an argument is out of
            range, or weights are given together with `terms`. The models are
            unchanged then.

    Example:

    ```python
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=teacher, student=student
    )
    distiller.compile(optimizer=keras.optimizers.AdamW(1e-5))
    distiller.fit(haystacks, epochs=10)
    distiller.student.save_to_preset("student_long")
    ```

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), equations 7, 8.
    """

    def __init__(
        self,
        teacher: keras.Model | StoredTeacher,
        student: keras.Model,
        distance_weighting: DistanceWeighting | None = None,
        retrieval_weight: float | LearningRateSchedule | None = None,
        attention_weight: float | LearningRateSchedule | None = None,
        logits_weight: float | LearningRateSchedule | None = None,
        supervised_weight: float | LearningRateSchedule | None = None,
        terms: Sequence[Term] | None = None,
        **kwargs: Any,
    ) -> None:
        weights = {
            "retrieval_weight": retrieval_weight,
            "attention_weight": attention_weight,
            "logits_weight": logits_weight,
            "supervised_weight": supervised_weight,
        }
        if terms is None:
            terms = terms_of(**weights)
        else:
            checks.check_no_weights(weights)
            checks.check_terms(terms)
        if distance_weighting is None:
            distance_weighting = DistanceWeighting()
        check_kind(
            "distance_weighting",
            distance_weighting,
            DistanceWeighting,
            "a `keras_laid.DistanceWeighting`",
        )
        checks.check_task("student", student)
        store = teacher if isinstance(teacher, StoredTeacher) else None
        if store is not None:
            teacher_description = store.description
        else:
            checks.check_task("teacher", teacher)
            checks.check_two(teacher, student)
            teacher_description = Description.from_model(teacher)
        student_description = Description.from_model(student)
        checks.check_pair(teacher_description, student_description)
        for term in terms:
            term.bind(student_description, teacher_description, store)
            term.is_bound = True

        super().__init__(**kwargs)
        self.student = student
        # This hides the teacher from Keras, which would train and save it.
        self.__dict__["teacher"] = teacher
        self.descriptions = (student_description, teacher_description)
        self.distance_weighting = distance_weighting
        self.rematerialize = False
        self.linear_memory: bool | Name = False
        # Losses are added in this order.
        self.terms = [term for term in terms if term.is_used]
        # The layers that terms train, under the names that weight files use.
        attention = self.term(AttentionMatching)
        retrieval = self.term(RetrievalMatching)
        self.mixers = attention.mixers if attention else []
        self.head_pooling = retrieval and retrieval.head_pooling
        self.term_layers = [layer for term in terms for layer in term.layers]
        # The number of training steps done, and of all steps if `fit` knows it.
        # `progress` needs both: as variables, they change without compiling a
        # step again.
        self.fit_knows_steps = False
        self.step = self.add_weight(
            shape=(),
            initializer="zeros",
            dtype="int32",
            trainable=False,
            name="step",
        )
        self.total_steps = self.add_weight(
            shape=(),
            initializer="zeros",
            dtype="int32",
            trainable=False,
            name="total_steps",
        )
        names = [name for term in self.terms for name in term.metrics]
        if any(term.has_progress for term in self.terms):
            names.append("progress")
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.built = True

    def term(self, kind: type[T]) -> T | None:
        """The term in use that is of class `kind`, or `None`."""
        return next(
            (term for term in self.terms if isinstance(term, kind)), None
        )

    @property
    def supervised_loss(self) -> keras.losses.Loss | None:
        next_tokens = self.term(NextTokens)
        return next_tokens and next_tokens.loss

    @property
    def layer_pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs `(student_layer, teacher_layer)` of the attention term."""
        attention = self.term(AttentionMatching)
        return attention.layer_pairs if attention else ()

    def __dir__(self) -> list[str]:
        # Keras saves whatever model it finds here.
        return [name for name in super().__dir__() if name != "teacher"]

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        # A compiled step has to be given the teacher's as well.
        return [*super().non_trainable_variables, *self.teacher.variables]

    def compile(
        self,
        optimizer: str | keras.Optimizer = "rmsprop",
        loss: Literal["auto"]
        | keras.losses.Loss
        | Callable[[Tensor, Tensor], Tensor] = "auto",
        auto_scale_loss: bool = True,
        rematerialize: bool = False,
        linear_memory: bool | Name = False,
        **kwargs: Any,
    ) -> None:
        """Configures training.

        Args:
            optimizer: A `keras.Optimizer` or its name; or the result of
                `keras_laid.group_optimizer`, for different learning rates of
                the student, the mixers and the gains. Defaults to `"rmsprop"`.
            loss: The supervised loss: a `keras.losses.Loss` of labels and
                logits, or a function of them, averaged over the tokens that
                `sample_weight` marks. Defaults to `"auto"`: cross-entropy,
                averaged in the same way over those whose label is 0 or more.
            auto_scale_loss: Boolean, whether the loss is scaled for a student
                that computes in float16 and keeps its weights in float32, as
                with `dtype="mixed_float16"`: small gradients would become 0.
                The optimizer is wrapped in a
                `keras.optimizers.LossScaleOptimizer`, unless it is one or has
                a `loss_scale_factor`. Defaults to `True`.
            rematerialize: Boolean, whether the student's blocks run again
                in the backward pass. That is about a third more work, but
                only one block's activations are kept at a time. Defaults to
                `False`.
            linear_memory: Boolean, whether both models' attention is computed
                as in `keras_laid.linear_memory_attention`, for prompts whose
                masks and maps would not fit; or the name of the implementation
                of `keras_laid.ops.attention_output` that computes it. Defaults
                to `False`.
            **kwargs: Passed to `keras.Model.compile`.

        Raises:
            TypeError: If an argument is of another kind.
            ValueError: If there is no optimizer or no loss; if `loss` is a
                name, has no reduction, or no term takes it; if `loss_weights`
                are given, since arguments of the distiller weight its terms;
                or if a model supports no `rematerialize` or `linear_memory`.

        With the default loss and without metrics, logits are computed only for
        the tokens that `sample_weight` marks, a block of tokens at a time.
        """
        if optimizer is None or loss is None:
            raise ValueError(
                "`optimizer` and `loss` must not be `None`. Received: "
                f"optimizer={optimizer}, loss={loss}. To leave out the "
                "supervised term, pass `supervised_weight=0` to the distiller."
            )
        if kwargs.get("loss_weights") is not None:
            raise ValueError(
                "`loss_weights` must be left out. Received: loss_weights="
                f"{kwargs['loss_weights']}. Terms are weighted by arguments of "
                "the distiller, such as `attention_weight`."
            )
        supervised_loss = as_loss(loss)
        next_tokens = self.term(NextTokens)
        if next_tokens is None and supervised_loss is not None:
            raise ValueError(
                "`loss` needs a term that takes it. Received: "
                f"loss={loss!r:.80}, and `terms` without a `NextTokens`. Add "
                "one, or leave out `loss`."
            )
        check_switch("rematerialize", rematerialize)
        check_choice_of_memory(linear_memory)
        if rematerialize:
            checks.check_dropout(self.student)
        if linear_memory:
            check_linear_memory(self.student)
            if not isinstance(self.teacher, StoredTeacher):
                check_linear_memory(self.teacher)
        optimizer = keras.optimizers.get(optimizer)
        if auto_scale_loss and decoder.is_mixed_float16(self.student):
            optimizer = scaling_the_loss(optimizer)
        if next_tokens is not None:
            next_tokens.loss = supervised_loss
        self.rematerialize = rematerialize
        self.linear_memory = linear_memory
        # Keras would decide this by the distiller's own dtype policy.
        super().compile(optimizer=optimizer, auto_scale_loss=False, **kwargs)
        # Such a loss, and metrics, take the logits of all tokens.
        self.needs_logits = (
            self.supervised_loss is not None
            or self._compile_metrics is not None
        )

    def call(
        self, inputs: dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        return forward(self.student, inputs, training=training)[0].logits()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with the student; see `keras_hub.models.CausalLM`."""
        decoder.check_values(self.student)
        return self.student.generate(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError(
            "The whole distiller cannot be saved, since the teacher is not "
            "part of it. Save the result with "
            "`distiller.student.save_to_preset()`, or the state of training "
            "with `distiller.save_weights()`."
        )


def terms_of(**given: Weight | None) -> list[Term]:
    """The usual terms with these weights; `None` stands for a default."""
    weights = {
        name: default if given[name] is None else given[name]
        for name, default in WEIGHTS.items()
    }
    for name, weight in weights.items():
        check_weight(name, weight)
    checks.check_any_weight(weights)
    retrieval, attention, logits, supervised = weights.values()
    return [
        RetrievalMatching(retrieval),
        AttentionMatching(attention),
        NextTokens(logits, supervised),
    ]
