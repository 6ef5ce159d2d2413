"""Divergence of a student's logits from a teacher's, and from labels."""

from typing import Any
from typing import Literal
from typing import NamedTuple

from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_kind
from keras_laid.arguments import check_number
from keras_laid.arguments import check_scalar
from keras_laid.arguments import check_shape
from keras_laid.arguments import check_tokens
from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select
from keras_laid.ops.logits_divergence import chunked
from keras_laid.ops.logits_divergence import definition
from keras_laid.ops.top_logits import TopLogits
from keras_laid.ops.top_logits import check_top_logits
from keras_laid.ops.unembedding import Unembedding
from keras_laid.ops.unembedding import check_unembedding
from keras_laid.typing import Tensor

TINY = 1e-7  # Makes the mean over no tokens 0.


class LogitsLosses(NamedTuple):
    """Float32 scalars, in nats: means over the tokens that count.

    Attributes:
        loss: `divergence_weight * divergence + cross_entropy_weight *
            cross_entropy`, the only one with a gradient.
        divergence: `temperature ** 2` times the divergence of softened
            distributions that `beta` chooses; 0 without a teacher.
        cross_entropy: `-log` of the student's probability of the label; 0
            without labels.
        kl: `KL(teacher || student)` at temperature 1; 0 without a teacher.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    kl: Tensor


def why_not_chunked(
    student: Unembedding, teacher: Unembedding | TopLogits | None, *others: Any
) -> str | None:
    if student.kernel is None:
        return "`student.kernel` is `None`: the logits exist already."
    return None


# In order of preference.
IMPLEMENTATIONS = (
    Implementation("chunked", chunked.logits_divergence, why_not_chunked),
    Implementation("definition", definition.logits_divergence),
)


def logits_divergence(
    student: Unembedding,
    teacher: Unembedding | TopLogits | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    divergence_weight: float | Tensor = 1.0,
    cross_entropy_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    beta: float = 0.0,
    vocabulary: Literal["same", "shared"] = "same",
    implementation: Literal["chunked", "definition"] | None = None,
) -> LogitsLosses:
    """Divergence from a teacher and cross-entropy with labels, in one pass.

    Computes the means, over tokens `i` with weights `w_i`, of

    `temperature ** 2 * D(p_i, q_i)` and `-log q_i[label_i]`,

    where `q` are the student's next-token distributions and `p` the teacher's.
    In the divergence both are softened: their logits are divided by the
    temperature. The factor `temperature ** 2` keeps the size of the gradient
    about the same at every temperature. `D` is one of

    - `beta=0`: `KL(p || q)`, the forward divergence, which makes the student
      cover every answer of the teacher;
    - `beta=1`: `KL(q || p)`, the reverse divergence, which makes it avoid
      answers that the teacher would not give;
    - in between: `beta KL(p || m) + (1 - beta) KL(q || m)`, the generalized
      Jensen-Shannon divergence, with `m = beta p + (1 - beta) q`.

    Args:
        student: `keras_laid.ops.Unembedding` of the student, over
            `(batch, length)` tokens.
        teacher: `keras_laid.ops.Unembedding` of the teacher, over the same
            tokens, or a `keras_laid.ops.TopLogits` of its largest logits, or
            `None` for no divergence. No gradient reaches it.
        labels: Integer tensor of shape `(batch, length)`, the next tokens, or
            `None` for no cross-entropy. A label less than 0 means that the
            token has no label and does not count in the cross-entropy. Labels
            beyond the student's vocabulary raise an error if their values can
            be read at no cost, as in NumPy arrays and torch tensors on the
            CPU. Otherwise they make the cross-entropy NaN, unless their weight
            is 0.
        weights: Float tensor of shape `(batch, length)`, 0 or more: the weight
            of each token in the means. `"chunked"` saves the computation of
            most tokens of weight 0. Defaults to 1 for all tokens.
        divergence_weight: Float or scalar tensor, 0 or more: the factor of the
            divergence in the loss. Defaults to `1.0`.
        cross_entropy_weight: Float or scalar tensor, 0 or more: the factor of
            the cross-entropy in the loss. Defaults to `1.0`.
        temperature: Float greater than 0 that divides logits in the divergence.
            For a `TopLogits` teacher it must be `teacher.temperature`. Defaults
            to `1.0`.
        beta: Float in `[0, 1]`: 0 for the forward and 1 for the reverse
            Kullback-Leibler divergence, and in between the generalized
            Jensen-Shannon divergence, of which 0.5 is the symmetric one.
            Defaults to `0.0`.
        vocabulary: `"same"` requires equal vocabularies. `"shared"` computes
            the divergence over only the first tokens, those that both models
            have. Defaults to `"same"`.
        implementation: `"chunked"` (holds the logits of some tokens at a time,
            and needs a `student.kernel`) or `"definition"` (holds all logits).
            `None` takes the first of these that can run.

    Returns:
        A `LogitsLosses`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is neither a teacher nor labels, shapes or
            vocabularies do not fit, or an argument or a label is out of range.
        NotImplementedError: If the named `implementation` cannot run here.

    Reference:
     - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 2;
       [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), equation 8;
       `beta`: [Agarwal et al., 2024](https://arxiv.org/abs/2306.13649),
       equation 1.
    """
    check_scalar("divergence_weight", divergence_weight, "[0, inf)")
    check_scalar("cross_entropy_weight", cross_entropy_weight, "[0, inf)")
    check_number("temperature", temperature, "(0, inf)")
    check_number("beta", beta, "[0, 1]")
    check_choice("vocabulary", vocabulary, ("same", "shared"))
    check_models(student, teacher, temperature, vocabulary)
    check_shapes(student, teacher, labels, weights)
    if labels is not None:
        check_tokens("labels", labels, student.vocabulary, weights)
    if teacher is not None:
        shared = min(student.vocabulary, teacher.vocabulary)
        teacher = teacher.first(shared).constant()
    if weights is None:
        weights = ops.ones(ops.shape(student.hidden)[:2])
    weights = ops.stop_gradient(ops.cast(weights, "float32"))
    labelled = weights
    if labels is not None:
        labels = ops.where(weights > 0, ops.cast(labels, "int32"), -1)
        is_token = ops.logical_and(labels >= 0, labels < student.vocabulary)
        labelled = ops.where(is_token, weights, 0.0)
    means = [
        each / ops.maximum(ops.sum(each), TINY) for each in (weights, labelled)
    ]
    shares = [divergence_weight * means[0], cross_entropy_weight * means[1]]
    arguments = (
        student,
        teacher,
        labels,
        weights > 0,
        shares,
        temperature,
        float(beta),
    )
    chosen = select(
        "logits_divergence", IMPLEMENTATIONS, implementation, *arguments
    )
    loss, *token_losses = chosen.run(*arguments)
    return LogitsLosses(
        loss,
        *[
            ops.stop_gradient(ops.sum(mean * each))
            for mean, each in zip([*means, means[0]], token_losses, strict=True)
        ],
    )


def check_models(
    student: Unembedding,
    teacher: Unembedding | TopLogits | None,
    temperature: float,
    vocabulary: str,
) -> None:
    words = "a `keras_laid.ops.Unembedding`"
    check_kind("student", student, Unembedding, words)
    check_unembedding("student", student)
    if teacher is None:
        return
    words = f"{words}, a `keras_laid.ops.TopLogits` or `None`"
    check_kind("teacher", teacher, (Unembedding, TopLogits), words)
    if isinstance(teacher, TopLogits):
        check_top_logits("teacher", teacher)
        if temperature != teacher.temperature:
            raise ValueError(
                "`temperature` must be the one that the teacher's largest "
                f"logits were taken for. Received: temperature={temperature}, "
                f"teacher.temperature={teacher.temperature}"
            )
    else:
        check_unembedding("teacher", teacher)
    if vocabulary == "same" and student.vocabulary != teacher.vocabulary:
        raise ValueError(
            "Student and teacher must have the same vocabulary. Received: "
            f"{student.vocabulary} tokens for the student, "
            f"{teacher.vocabulary} for the teacher. "
            'Pass `vocabulary="shared"` to compare only the first tokens.'
        )


def check_shapes(
    student: Unembedding,
    teacher: Unembedding | TopLogits | None,
    labels: Tensor | None,
    weights: Tensor | None,
) -> None:
    if teacher is None and labels is None:
        raise ValueError(
            "There must be something to compare the student with. Received: "
            "teacher=None, labels=None. Pass one of them or both."
        )
    batch, length, _ = student.hidden.shape
    if teacher is not None:
        for name in ("hidden", "logits", "index", "others"):
            if name in teacher._fields:
                check_shape(
                    f"teacher.{name}",
                    getattr(teacher, name),
                    batch=batch,
                    length=length,
                    features=None,
                )
    for name, tensor in (("labels", labels), ("weights", weights)):
        if tensor is not None:
            check_shape(name, tensor, batch=batch, length=length)
    if labels is not None:
        check_dtype("labels", labels, "int")
