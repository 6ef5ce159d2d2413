"""Checks of the arguments and models of a distiller."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule

from keras_laid.arguments import at_hand
from keras_laid.arguments import check_shape
from keras_laid.arguments import check_tokens
from keras_laid.backbones import decoder
from keras_laid.backbones import teacher_inputs
from keras_laid.distillation.description import Description
from keras_laid.distillation.terms.term import Term

# Names of the distiller's own metrics.
NAMES = ("loss", "progress", "kl")


def check_no_weights(weights: Mapping[str, object]) -> None:
    """Refuses weights beside `terms`, which have their own."""
    given = {k: w for k, w in weights.items() if w is not None}
    if given:
        raise ValueError(
            "Weights must be left out where `terms` are given, which have "
            f"their own. Received: terms and {given}. Pass each weight to its "
            "term, such as `NextTokens(logits_weight=0.5)`."
        )


def check_terms(terms: object) -> None:
    """Refuses objects that are not terms, and terms of another distiller."""
    if not isinstance(terms, (list, tuple)) or not all(
        isinstance(term, Term) for term in terms
    ):
        raise TypeError(
            "`terms` must be a list of `keras_laid.distillation.terms.Term`s. "
            f"Received: terms={terms!r:.80}"
        )
    bound = [type(term).__name__ for term in terms if term.is_bound]
    if bound:
        raise ValueError(
            "Each of `terms` must be new: a term belongs to one distiller. "
            f"Received: {bound} of another distiller. Make new ones."
        )
    names = [name for term in terms for name in term.weights]
    if {*NAMES} & {*names} or len({*names}) < len(names):
        raise ValueError(
            "Each loss of `terms` must have a name of its own, other than "
            f"{NAMES}. Received: {names}"
        )
    check_any_weight({k: w for term in terms for k, w in term.weights.items()})


def check_any_weight(
    weights: Mapping[str, float | LearningRateSchedule],
) -> None:
    if not any(weights.values()):
        raise ValueError(
            "At least one term must have a weight greater than 0. Received: "
            + ", ".join(f"{name}={weight}" for name, weight in weights.items())
        )


def check_task(name: str, model: keras.Model) -> None:
    if not hasattr(model, "generate"):
        raise ValueError(
            f"`{name}` must be a task with logits, such as "
            "`keras_hub.models.PaliGemmaCausalLM`. "
            f"Received: {type(model).__name__}"
        )


def check_two(teacher: keras.Model, student: keras.Model) -> None:
    """Refuses two models that are the same, or share weights."""
    if teacher is student:
        raise ValueError(
            "`teacher` and `student` must be two models. Received: twice the "
            f"model {student.name}. Load the preset once for each."
        )
    shared = {id(v) for v in decoder.backbone_of(teacher).variables} & {
        id(v) for v in decoder.backbone_of(student).variables
    }
    if shared:
        raise ValueError(
            "`teacher` and `student` must not share weights. Received: "
            f"{len(shared)} shared variables. Load the preset once for each."
        )


def check_pair(teacher: Description, student: Description) -> None:
    """Refuses two `Description`s whose sequences of tokens are not the same."""
    if teacher.image_layout != student.image_layout:
        raise ValueError(
            "Both models must turn an image into the same tokens. "
            f"Received: teacher {teacher.image_layout}, student "
            f"{student.image_layout}. Choose presets of one resolution."
        )
    if teacher.several_images != student.several_images:
        raise ValueError(
            "Both models must take several images in a prompt, or both one. "
            f"Received: teacher {teacher.model}, student {student.model}. "
            "Make both with "
            "`keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm`."
        )
    if teacher.tokens and student.tokens:
        shortest = min(len(teacher.tokens), len(student.tokens))
        if teacher.tokens[:shortest] != student.tokens[:shortest]:
            raise ValueError(
                "Both models must have the same tokenizer: the student is "
                "taught token by token. Received: vocabularies that differ. "
                "Choose presets of one family."
            )


def check_vocabularies(
    teacher: Description, student: Description, vocabulary: str
) -> None:
    sizes = [model.vocabulary_size for model in (teacher, student)]
    if vocabulary == "same" and sizes[0] != sizes[1]:
        raise ValueError(
            "The logits term needs one vocabulary. Received: teacher "
            f"vocabulary_size={sizes[0]}, student vocabulary_size={sizes[1]}. "
            'Pass `NextTokens(vocabulary="shared")` in `terms` to compare the '
            f"first {min(sizes)} tokens, or `logits_weight=0` to leave it out."
        )


def check_features(
    teacher: Description,
    student: Description,
    layer_pairs: Sequence[tuple[int, int]],
) -> None:
    """Refuses pairs of layers whose queries have different features."""
    for student_layer, teacher_layer in layer_pairs:
        kinds = [
            teacher.layer_types[teacher_layer],
            student.layer_types[student_layer],
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "The query/key term needs models of one family: families "
                "order a query's features differently. Received: teacher "
                f"with {kinds[0]}, student with {kinds[1]}. "
                "Pass `query_key_weight=0`: attention maps can still be "
                "matched."
            )
        head_dims = [
            teacher.layers_with_maps[teacher_layer].head_dim,
            student.layers_with_maps[student_layer].head_dim,
        ]
        if head_dims[0] != head_dims[1]:
            raise ValueError(
                "The query/key term needs equal head dims. Received: teacher "
                f"head_dim={head_dims[0]}, student head_dim={head_dims[1]}. "
                "Pass `query_key_weight=0`: attention maps can still be "
                "matched."
            )


def check_dropout(student: keras.Model) -> None:
    """Refuses dropout, which differs when a block runs again."""
    dropout = getattr(decoder.backbone_of(student), "dropout", 0.0)
    if dropout:
        raise ValueError(
            "`rematerialize` needs a student without dropout: a random state "
            "must not change inside a block that runs again. "
            f"Received: student.backbone.dropout={dropout}"
        )


def check_no_class_weight(class_weight: object) -> None:
    if class_weight is not None:
        raise ValueError(
            "`class_weight` must be left out: examples have a label for each "
            f"token, and no class. Received: class_weight={class_weight!r:.80}."
            " Weigh tokens by `sample_weight` of shape (batch, length)."
        )


def check_labels(
    vocabulary: int, loss: keras.losses.Loss | None, y: Any, sample_weight: Any
) -> None:
    """Refuses labels that are not tokens, unless the loss ignores them.

    Args:
        vocabulary: Integer, the size of the student's vocabulary.
        loss: The compiled loss, or `None` for that of the distiller, which
            ignores all labels less than 0.
        y: Labels of shape `(batch, length)`.
        sample_weight: Weights of shape `(batch, length)`, or `None`.
    """
    least = None
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        least = 0
        if loss.ignore_class is not None and at_hand(y):
            y = y * (y != loss.ignore_class)
    check_tokens("labels", y, vocabulary, sample_weight, least)


def check_batch(model: keras.Model, batch: tuple[Any, Any, Any]) -> None:
    """Refuses a batch from which the losses cannot be computed.

    Looks only at shapes, which are known while a step is compiled.
    """
    x, y, sample_weight = batch
    decoder.check_inputs(model, x)
    size, length = x["token_ids"].shape
    if y is None:
        raise ValueError(
            "Data must be batches `(x, y)` or `(x, y, sample_weight)`. "
            "Received: batches without `y`, the next tokens"
        )
    check_shape("y", y, batch=size, length=length)
    if sample_weight is not None:
        check_shape("sample_weight", sample_weight, batch=size, length=length)


def check_teacher_inputs(
    x: Mapping[str, Any], is_stored: bool, terms: Sequence[Term]
) -> None:
    """Refuses inputs of the teacher's own that it or a term cannot use."""
    if teacher_inputs.TEACHER not in x:
        return
    teacher_inputs.check_teacher_inputs(x)
    if is_stored:
        teacher_inputs.check_none(x)
    others = [
        name
        for term in terms
        if not term.allows_other_prompt
        for name in term.weights
    ]
    if teacher_inputs.reads_other_prompt(x) and others:
        raise ValueError(
            "Of a teacher that reads another prompt, only next tokens can be "
            f"compared. Received: terms {others}. Leave them out, as with "
            "`retrieval_weight=0`."
        )
