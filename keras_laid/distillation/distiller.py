"""Trains a small model to attend over a long window as a large one does."""

import contextlib
import logging
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_kind
from keras_laid.arguments import check_number
from keras_laid.arguments import check_switch
from keras_laid.arguments import check_tokens
from keras_laid.backbones import decoder
from keras_laid.backbones.forward import forward
from keras_laid.backbones.linear_memory import check_choice_of_memory
from keras_laid.backbones.linear_memory import check_linear_memory
from keras_laid.backbones.linear_memory import linear_blocks
from keras_laid.backbones.linear_memory import named
from keras_laid.backbones.retrieval_heads import RetrievalHeads
from keras_laid.backbones.retrieval_heads import find_retrieval_heads
from keras_laid.backbones.workers import BuiltBesideWorkers
from keras_laid.backbones.workers import check_workers
from keras_laid.distillation import checks
from keras_laid.distillation.compiled_loss import as_loss
from keras_laid.distillation.compiled_loss import scaling_the_loss
from keras_laid.distillation.description import Description
from keras_laid.distillation.distance_weighting import DistanceWeighting
from keras_laid.distillation.first_batches import first_batches
from keras_laid.distillation.retrieval_matching import Heads
from keras_laid.distillation.retrieval_matching import RetrievalMatching
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms.attention import AttentionTerm
from keras_laid.distillation.terms.next_tokens import NextTokens
from keras_laid.distillation.terms.retrieval import RetrievalTerm
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term
from keras_laid.distillation.terms.term import Weight
from keras_laid.distillation.total_steps import TotalSteps
from keras_laid.ops.attention_divergence import IMPLEMENTATIONS
from keras_laid.ops.attention_output import Name
from keras_laid.ops.dispatch import check_requested
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor

# For mypy, which reads all three, the first stands for the others.
if keras.backend.backend() == "jax":
    from keras_laid.distillation.jax_steps import Steps
elif keras.backend.backend() == "torch":
    from keras_laid.distillation.torch_steps import Steps  # type: ignore[assignment]
else:
    from keras_laid.distillation.tensorflow_steps import Steps  # type: ignore[assignment]

HEADS = "retrieval_heads"  # Their name in weight files.
logger = logging.getLogger("keras_laid")


class DistanceWeightedAttentionDistillation(
    BuiltBesideWorkers, Steps, keras.Model
):
    """Long-window anchoring distillation (LAid) as a Keras model.

    A training step runs the student once and the teacher once, and minimises

    `retrieval_weight * retrieval + attention_weight * attention
    + query_key_weight * query_key + logits_weight * logits
    + supervised_weight * supervised`:

    - `retrieval`: `keras_laid.ops.retrieval_divergence` of where the student's
      heads look among the images, or other segments of a prompt, from where
      the teacher's retrieval heads look, weighted by distance.
    - `attention`: `keras_laid.ops.attention_divergence` of the student's maps
      from mixed maps of the teacher, weighted by distance, averaged over heads
      and rows.
    - `query_key`: `keras_laid.ops.query_key_distance`, averaged in the same
      way.
    - `logits`: the divergence of `keras_laid.ops.logits_divergence`, averaged
      over the tokens that `sample_weight` marks.
    - `supervised`: its cross-entropy with the labels, averaged in the same way,
      or another compiled loss; plus the student's regularization losses.

    `terms` adds others, such as
    `keras_laid.distillation.terms.HiddenStates`.

    A term of weight 0 is not computed, and a teacher that no term needs is not
    run. Each term is a metric, as are `kl` (the logits term at temperature 1)
    and `progress`. Progress needs the number of training steps: `fit` knows it
    from data with a length; for `train_on_batch`, a loop of your own around
    `train_step` or `compute_terms`, and data without a length, pass `steps` to
    `DistanceWeighting`, or a training step raises a `ValueError`.
    `sample_weight` also weighs whole examples in the attention
    terms: an example without any marked token does not count. It must be 0 or
    more, which a compiled step does not check.

    Evaluation weights distances and terms as at the end of training, whatever
    the step, so that `val_loss` can be compared over epochs; `val_progress` is
    1. Schedules are taken at the last step of `fit`.

    The wrapper learns the student's trainable variables and the mixers', never
    the teacher's, whatever the teacher's `trainable` says. `predict`,
    `evaluate` and `generate` are the student's. Weight files of the wrapper
    hold everything that training needs to resume, without the teacher; the
    result is `student` itself.

    Args:
        teacher: A `keras_hub.models.CausalLM` of a family that
            `keras_laid.backbones.attention_layers` knows, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`; or a
            `keras_laid.StoredTeacher`, to train without it in memory.
        student: Another, of the same tokenizer and with the same tokens for an
            image; of any size, and of any family that reads the same inputs.
        distance_weighting: A `keras_laid.DistanceWeighting`: how much more far
            images and tokens count in the retrieval and attention terms.
            Defaults to `DistanceWeighting()`.
        retrieval_weight: Float of at least 0, or a
            `keras.optimizers.schedules.LearningRateSchedule` of training steps,
            which can fade the term in or out: the weight of the retrieval
            term. The term is 0 for prompts with less than two images or
            segments. Defaults to `1.0`.
        attention_weight: Float of at least 0, or a schedule of training steps:
            the weight of the divergence of whole attention maps, the paper's
            form. Defaults to `0.0`.
        query_key_weight: Float of at least 0, or a schedule of training steps:
            the weight of the distance between queries and keys. Start with 0.1
            or less. Defaults to `0.0`.
        logits_weight: Float of at least 0, or a schedule of training steps: the
            weight of the divergence from the teacher's logits. Defaults to
            `1.0`.
        supervised_weight: Float of at least 0, or a schedule of training steps:
            the weight of the cross-entropy with the labels `y`. Defaults to
            `1.0`.
        retrieval: A `keras_laid.RetrievalMatching`: which heads of the teacher
            are matched, by which layers of the student, and how. Defaults to
            `RetrievalMatching()`.
        temperature: Float greater than 0, of the logits term. Defaults to
            `1.0`.
        layer_map: Which layers the attention and query/key terms compare:
            `"last"`, the last layer of each model; `"uniform"`, every layer of
            the student with the one at the same relative depth; or pairs of
            indices `(student_layer, teacher_layer)`. Defaults to `"last"`.
        rows: Whose attention the attention term compares: `"text"`, the rows of
            text tokens, or `"all"`, those of image tokens too. Defaults to
            `"text"`.
        mixer_sharpness: Float, how far the mixers start from uniform; see
            `keras_laid.HeadMixer`. Defaults to `0.0`.
        vocabulary: `"same"`, or `"shared"` to compare the logits of the first
            tokens that both vocabularies have. Defaults to `"same"`.
        rematerialize: Boolean, whether the student's blocks run once more in
            the backward pass: about a third more work, for activations of one
            block in place of all. Defaults to `False`.
        linear_memory: Boolean, whether both models' attention is computed as in
            `keras_laid.linear_memory_attention`, for prompts whose masks and
            maps would not fit; or the name of the implementation of
            `keras_laid.ops.attention_output` that does. Defaults to `False`.
        implementation: The name of an implementation of
            `keras_laid.ops.attention_divergence`, or `None` for the fastest one
            that can run. Defaults to `None`.
        terms: Sequence of further `keras_laid.distillation.terms.Term`s, each
            made for only this distiller. Defaults to `()`.
        **kwargs: Passed to `keras.Model`.

    Call arguments:
        inputs: The student's inputs, a dictionary; `"positions"` of shape
            `(batch, keys)`, where keys are tokens of images and text, replaces
            the positions of every rotary embedding, see
            `keras_laid.PositionStretching`.

    Returns:
        The student's logits.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the models do not fit each other or an argument is out of
            range; before anything is changed.

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
        retrieval_weight: float | LearningRateSchedule = 1.0,
        attention_weight: float | LearningRateSchedule = 0.0,
        query_key_weight: float | LearningRateSchedule = 0.0,
        logits_weight: float | LearningRateSchedule = 1.0,
        supervised_weight: float | LearningRateSchedule = 1.0,
        retrieval: RetrievalMatching | None = None,
        temperature: float = 1.0,
        layer_map: Literal["last", "uniform"]
        | Sequence[tuple[int, int]] = "last",
        rows: Literal["text", "all"] = "text",
        mixer_sharpness: float = 0.0,
        vocabulary: Literal["same", "shared"] = "same",
        rematerialize: bool = False,
        linear_memory: bool | Name = False,
        implementation: Literal["pallas", "triton", "chunked", "definition"]
        | None = None,
        terms: Sequence[Term] = (),
        **kwargs: Any,
    ) -> None:
        checks.check_terms(terms)
        checks.check_weights(
            retrieval=retrieval_weight,
            attention=attention_weight,
            query_key=query_key_weight,
            logits=logits_weight,
            supervised=supervised_weight,
            **{k: w for term in terms for k, w in term.weights.items()},
        )
        check_number("temperature", temperature, "(0, inf)")
        if distance_weighting is None:
            distance_weighting = DistanceWeighting()
        check_kind(
            "distance_weighting",
            distance_weighting,
            DistanceWeighting,
            "a `keras_laid.DistanceWeighting`",
        )
        if retrieval is None:
            retrieval = RetrievalMatching()
        check_kind(
            "retrieval",
            retrieval,
            RetrievalMatching,
            "a `keras_laid.RetrievalMatching`",
        )
        check_choice("rows", rows, ("text", "all"))
        check_number("mixer_sharpness", mixer_sharpness, "(-inf, inf)")
        check_choice("vocabulary", vocabulary, ("same", "shared"))
        check_switch("rematerialize", rematerialize)
        check_choice_of_memory(linear_memory)
        check_requested("attention_divergence", IMPLEMENTATIONS, implementation)
        checks.check_task("student", student)
        store = teacher if isinstance(teacher, StoredTeacher) else None
        if store is not None:
            of_teacher = store.description
        else:
            checks.check_task("teacher", teacher)
            checks.check_two(teacher, student)
            of_teacher = Description.of(teacher)
        of_student = Description.of(student)
        checks.check_pair(of_teacher, of_student)
        if rematerialize:
            checks.check_dropout(student)
        if linear_memory:
            check_linear_memory(student)
            if store is None:
                check_linear_memory(teacher)
        retrieval_term = RetrievalTerm(
            retrieval_weight, retrieval, distance_weighting
        )
        attention_term = AttentionTerm(
            attention_weight,
            query_key_weight,
            distance_weighting,
            layer_map,
            rows,
            mixer_sharpness,
            implementation,
        )
        next_tokens = NextTokens(
            logits_weight, supervised_weight, temperature, vocabulary
        )
        for term in (attention_term, next_tokens, retrieval_term, *terms):
            term.bind(of_student, of_teacher, store)
            term.is_bound = True

        super().__init__(**kwargs)
        self.student = student
        # Past Keras's tracking: the teacher is neither trained nor saved.
        self.__dict__["teacher"] = teacher
        self.descriptions = (of_student, of_teacher)
        self.distance_weighting = distance_weighting
        self.rematerialize = rematerialize
        self.linear_memory = linear_memory
        self.retrieval_term = retrieval_term
        self.attention_term = attention_term
        self.next_tokens = next_tokens
        self.further_terms = (*terms,)
        # What they learn, under the names that weight files have.
        self.mixers = attention_term.mixers
        self.head_pooling = retrieval_term.head_pooling
        self.term_layers = [layer for term in terms for layer in term.layers]
        # Training steps done, and in all, as far as `fit` knows: they drive
        # `progress` as tensors, so that a step is never compiled again.
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

    @property
    def terms(self) -> list[Term]:
        """Those in use, in the order in which their losses are added."""
        terms = (
            self.retrieval_term,
            self.attention_term,
            self.next_tokens,
            *self.further_terms,
        )
        return [term for term in terms if term.is_used]

    @property
    def term_weights(self) -> dict[str, Weight]:
        return {
            name: weight
            for term in self.terms
            for name, weight in term.weights.items()
        }

    @property
    def supervised_loss(self) -> keras.losses.Loss | None:
        return self.next_tokens.loss

    @property
    def retrieval_heads(self) -> Heads | None:
        """Pairs `(layer, head)` that are matched; `None` until found."""
        return self.retrieval_term.heads

    @property
    def layer_pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs `(student_layer, teacher_layer)` of the attention terms."""
        return self.attention_term.layer_pairs

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
        **kwargs: Any,
    ) -> None:
        """Configures training.

        Args:
            optimizer: Optimizer of every group, or the result of
                `keras_laid.group_optimizer` for a learning rate each.
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
            **kwargs: Passed to `keras.Model.compile`.

        Raises:
            TypeError: If `loss` is of another kind.
            ValueError: If there is no optimizer or no loss, if `loss` is a name
                or has no reduction, or if `loss_weights` are given, which are
                arguments of the distiller.

        With the default loss and without metrics, logits are computed for the
        tokens that `sample_weight` marks, and for no others, some at a time.
        """
        if optimizer is None or loss is None:
            raise ValueError(
                "`optimizer` and `loss` must not be `None`. Received: "
                f"optimizer={optimizer}, loss={loss}. Leave out the supervised "
                "term by `supervised_weight=0` of the distiller."
            )
        if kwargs.get("loss_weights") is not None:
            raise ValueError(
                "`loss_weights` must be left out. Received: loss_weights="
                f"{kwargs['loss_weights']}. Terms are weighted by arguments of "
                "the distiller, such as `attention_weight`."
            )
        supervised_loss = as_loss(loss)
        optimizer = keras.optimizers.get(optimizer)
        if auto_scale_loss and decoder.is_mixed_float16(self.student):
            optimizer = scaling_the_loss(optimizer)
        self.next_tokens.loss = supervised_loss
        # Keras would look at the distiller's dtype policy.
        super().compile(optimizer=optimizer, auto_scale_loss=False, **kwargs)
        # Somebody else wants to see all of them.
        self.needs_logits = (
            self.supervised_loss is not None
            or self._compile_metrics is not None
        )

    def find_heads(self, data: Iterable[Any]) -> RetrievalHeads | None:
        """Finds the teacher's retrieval heads, and matches these from now on.

        `fit`, `evaluate` and their kin on single batches do so on the first
        batches that they get, unless the heads are known. Call it where these
        are not typical, or can be read only once.

        Args:
            data: Iterable of batches, as in `keras_laid.find_retrieval_heads`,
                of which the first 4 are read, or more until there are 32
                examples.

        Returns:
            What `keras_laid.find_retrieval_heads` found, or `None` if no prompt
            has two images or segments: the term is 0 then.
        """
        batches = first_batches(data)
        for batch in batches:
            self.check_tokens(*keras.utils.unpack_x_y_sample_weight(batch))
        with contextlib.ExitStack() as scopes:
            if self.linear_memory:
                scopes.enter_context(
                    linear_blocks(self.teacher, named(self.linear_memory))
                )
            found = find_retrieval_heads(
                self.teacher,
                batches,
                max(1, len(batches)),
                num_segments=self.retrieval_term.matching.num_segments,
            )
        if found is None:
            warnings.warn(
                "The retrieval term is 0: the first batches have no prompt "
                'with two images or `"segments"`, and text after them. Pass '
                "`retrieval_weight=0` to leave it out.",
                stacklevel=2,
            )
        self.set_heads(found.heads if found else ())
        logger.info(
            "Retrieval heads (layer, head) of the teacher: %s",
            self.retrieval_heads,
        )
        return found

    def check_progress(self) -> None:
        """Refuses a training step where nothing tells how many there are."""
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

    def set_heads(self, heads: Heads) -> None:
        if heads == self.retrieval_heads:
            return
        self.retrieval_term.heads = heads
        # What was compiled for others.
        if self.train_function is not None:
            self.make_train_function(force=True)
        if self.test_function is not None:
            self.make_test_function(force=True)

    def find_heads_once(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
    ) -> None:
        if self.retrieval_heads is None:
            self.find_heads(first_batches(x, y, sample_weight, batch_size))

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.retrieval_heads:
            store[HEADS] = np.asarray(self.retrieval_heads, "int32")

    def load_own_variables(self, store: Any) -> None:
        if HEADS in store.keys() and self.retrieval_term.is_used:
            self.set_heads(tuple(map(tuple, np.asarray(store[HEADS]).tolist())))
        super().load_own_variables(
            {name: store[name] for name in store.keys() if name != HEADS}
        )

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        *args: Any,
        sample_weight: Any = None,
        callbacks: Sequence[keras.callbacks.Callback]
        | keras.callbacks.Callback
        | None = None,
        initial_epoch: int = 0,
        class_weight: None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        checks.check_no_class_weight(class_weight)
        check_workers(x, kwargs)
        self.check_tokens(x, y, sample_weight)
        self.find_heads_once(x, y, sample_weight, batch_size)
        callbacks = [
            *keras.tree.flatten(callbacks or []),
            TotalSteps(initial_epoch),
        ]
        try:
            return super().fit(
                x,
                y,
                batch_size,
                *args,
                sample_weight=sample_weight,
                callbacks=callbacks,
                initial_epoch=initial_epoch,
                **kwargs,
            )
        finally:
            self.fit_knows_steps = False

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.check_tokens(x, y, sample_weight)
        self.check_end_is_known()
        self.find_heads_once(x, y, sample_weight, batch_size)
        return super().evaluate(
            x, y, batch_size, verbose, sample_weight, *args, **kwargs
        )

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: None = None,
        return_dict: bool = False,
    ) -> Any:
        checks.check_no_class_weight(class_weight)
        self.check_tokens(x, y, sample_weight)
        self.find_heads_once([(x, y, sample_weight)])
        self.check_progress()
        return super().train_on_batch(
            x, y, sample_weight, return_dict=return_dict
        )

    def test_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        self.check_tokens(x, y, sample_weight)
        self.check_end_is_known()
        self.find_heads_once([(x, y, sample_weight)])
        return super().test_on_batch(x, y, sample_weight, return_dict)

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
            "The distiller cannot be saved whole, since the teacher is no part "
            "of it. Save the result with `distiller.student.save_to_preset()`, "
            "or the state of training with `distiller.save_weights()`."
        )

    def run_teacher(self, x: dict[str, Tensor]) -> list[Any] | None:
        """What each term needs of the teacher; `None` if none does."""
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
            x,
            union(term.teacher_layers() for term in self.terms),
            linear_memory=self.linear_memory,
            hidden_layers=union(
                term.teacher_hidden_states() for term in self.terms
            ),
        )
        return [
            term.targets(self.student, x, run) if needed else None
            for term, needed in zip(self.terms, needs, strict=True)
        ]

    def unpack(self, data: Any) -> tuple[Any, Any, Any]:
        """A batch as `(x, y, sample_weight)`, checked."""
        batch = keras.utils.unpack_x_y_sample_weight(data)
        checks.check_batch(self.student, batch)
        self.check_tokens(*batch)
        return batch

    def check_tokens(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Refuses ids and labels of no token, where values are at hand."""
        student, teacher = [each.vocabulary_size for each in self.descriptions]
        is_stored = isinstance(self.teacher, StoredTeacher)
        if isinstance(x, dict) and "token_ids" in x:
            read_by_all = student if is_stored else min(student, teacher)
            check_tokens("token_ids", x["token_ids"], read_by_all, least=0)
        checks.check_labels(student, self.supervised_loss, y, sample_weight)

    def compute_terms(
        self,
        x: dict[str, Tensor],
        y: Tensor,
        sample_weight: Tensor | None,
        targets: list[Any] | None,
        training: bool,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Runs the student and computes every loss term.

        The one place where losses are defined, on every backend.

        Args:
            x: The student's inputs.
            y: Integer tensor of shape `(batch, length)`, the next tokens.
            sample_weight: Float tensor of shape `(batch, length)`, 0 or more,
                or `None` to mark every token.
            targets: What `run_teacher(x)` returned.
            training: Boolean.

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
            union(term.student_layers() for term in self.terms),
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
            progress,
            weights,
        )
        terms: dict[str, Tensor] = {}
        loss: Tensor | float = sum(self.losses)
        if "progress" in self.trackers:
            terms["progress"] = progress
        if targets is None:
            targets = [None] * len(self.terms)
        for term, of_teacher in zip(self.terms, targets, strict=True):
            weighted, values = term.compute(step, of_teacher)
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

        In evaluation those of the end of training, at every step, so that the
        losses of two epochs can be compared.
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

    def check_end_is_known(self) -> None:
        """Refuses to evaluate a schedule whose last step is not known."""
        names = [
            f"{name}_weight"
            for name, weight in self.term_weights.items()
            if callable(weight)
        ]
        if names and not int(self.total_steps):
            raise ValueError(
                "Evaluation weights terms as at the end of training, so that "
                "the number of steps must be known for schedules. Received: "
                f"{names} before `fit`. Call `fit` first; where the data has "
                "no length, with `steps_per_epoch` or "
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
