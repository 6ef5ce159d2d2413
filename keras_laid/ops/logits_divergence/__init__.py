"""Divergence of a student's next tokens from a teacher's, and from labels."""

from typing import Any
from typing import NamedTuple

from keras import ops

from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select
from keras_laid.ops.logits_divergence import chunked
from keras_laid.ops.logits_divergence import definition
from keras_laid.ops.top_logits import TopLogits

TINY = 1e-7  # Of no token at all, the mean is 0.


class LogitsLosses(NamedTuple):
    """Float32 scalars, in nats: means over the tokens that count.

    Attributes:
        loss: The weighted sum of the next two, the only one with a gradient.
        divergence: `temperature ** 2 * KL(teacher || student)` of softened
            distributions; 0 without a teacher.
        cross_entropy: `-log` of what the student gives the labels; 0 without.
        kl: The divergence at temperature 1.
    """

    loss: Any
    divergence: Any
    cross_entropy: Any
    kl: Any


def why_not_chunked(student, teacher, *others):
    if student.kernel is None:
        return "the student's logits exist already."
    return None


# In order of preference.
IMPLEMENTATIONS = (
    Implementation("chunked", chunked.logits_divergence, why_not_chunked),
    Implementation("definition", definition.logits_divergence),
)


def logits_divergence(
    student,
    teacher=None,
    labels=None,
    weights=None,
    divergence_weight=1.0,
    cross_entropy_weight=1.0,
    temperature=1.0,
    vocabulary="same",
    implementation=None,
):
    """Divergence from a teacher and cross-entropy with labels, in one pass.

    The means over tokens `i` with weights `w_i` of

    `temperature ** 2 * KL(p_i || q_i)` and `-log q_i[label_i]`,

    where `q` are the student's next-token distributions and `p` the teacher's,
    in the first one softened: logits are divided by the temperature, and the
    factor keeps the gradient's size from depending on it.

    Args:
        student: `keras_laid.ops.Unembedding` of the student, over
            `(batch, length)` tokens.
        teacher: `keras_laid.ops.Unembedding` of the teacher, over the same
            tokens, or a `keras_laid.ops.TopLogits` of what it said, or `None`.
            No gradient reaches it.
        labels: Integer tensor of shape `(batch, length)`, the next tokens, or
            `None`. A token with a label less than 0 has none, and does not
            count in the cross-entropy.
        weights: Float tensor of shape `(batch, length)`, 0 or more. Tokens of
            weight 0 are not computed. Defaults to 1 for all.
        divergence_weight: Float or scalar tensor. Defaults to `1.0`.
        cross_entropy_weight: Float or scalar tensor. Defaults to `1.0`.
        temperature: Float greater than 0. Defaults to `1.0`.
        vocabulary: `"same"`, or `"shared"` to compare the distributions over
            the first tokens that both have. Defaults to `"same"`.
        implementation: `None` for the first that can, or one of `"chunked"`
            (holds the logits of some tokens at a time) and `"definition"`
            (holds all of them).

    Returns:
        A `LogitsLosses`.

    Raises:
        ValueError: If there is neither a teacher nor labels, shapes or
            vocabularies do not fit, or an argument is out of range.
        NotImplementedError: If the named `implementation` cannot run here.

    Reference:
     - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 2;
       [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), equation 8.
    """
    check_arguments(student, teacher, labels, weights, temperature, vocabulary)
    if teacher is not None:
        shared = min(student.vocabulary, teacher.vocabulary)
        teacher = teacher.first(shared).constant()
    if weights is None:
        weights = ops.ones(ops.shape(student.hidden)[:2])
    weights = ops.stop_gradient(ops.cast(weights, "float32"))
    labelled = weights
    if labels is not None:
        labels = ops.cast(labels, "int32")
        labelled = ops.where(labels < 0, 0.0, weights)
    means = [
        each / ops.maximum(ops.sum(each), TINY) for each in (weights, labelled)
    ]
    shares = [divergence_weight * means[0], cross_entropy_weight * means[1]]
    arguments = (student, teacher, labels, weights > 0, shares, temperature)
    chosen = select(
        "logits_divergence", IMPLEMENTATIONS, implementation, *arguments
    )
    loss, *of_tokens = chosen.run(*arguments)
    return LogitsLosses(
        loss,
        *[
            ops.stop_gradient(ops.sum(mean * each))
            for mean, each in zip([*means, means[0]], of_tokens, strict=True)
        ],
    )


def check_arguments(student, teacher, labels, weights, temperature, vocabulary):
    if teacher is None and labels is None:
        raise ValueError(
            "There must be something to compare the student with. Received: "
            "teacher=None, labels=None"
        )
    if temperature <= 0:
        raise ValueError(
            "`temperature` must be greater than 0. Received: "
            f"temperature={temperature}"
        )
    if vocabulary not in ("same", "shared"):
        raise ValueError(
            '`vocabulary` must be "same" or "shared". Received: '
            f"vocabulary={vocabulary!r}"
        )
    if teacher is not None and vocabulary == "same":
        if student.vocabulary != teacher.vocabulary:
            raise ValueError(
                "Student and teacher must have the same vocabulary. Received: "
                f"{student.vocabulary} tokens for the student, "
                f"{teacher.vocabulary} for the teacher. "
                'Pass `vocabulary="shared"` to compare the first ones.'
            )
    if isinstance(teacher, TopLogits) and temperature != teacher.temperature:
        raise ValueError(
            "`temperature` must be the one that the largest logits were taken "
            f"at. Received: temperature={temperature}, "
            f"teacher.temperature={teacher.temperature}"
        )
    expected = tuple(student.hidden.shape[:2])
    tensors = [(3, "student.hidden", student.hidden)]
    if teacher is not None:
        tensors += [
            (3, f"teacher.{name}", getattr(teacher, name))
            for name in ("hidden", "logits", "index", "others")
            if name in teacher._fields
        ]
    tensors += [(2, "labels", labels), (2, "weights", weights)]
    for rank, name, tensor in tensors:
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        fits = all(
            None in (one, other) or one == other
            for one, other in zip(expected, shape, strict=False)
        )
        if len(shape) != rank or not fits:
            raise ValueError(
                f"`{name}` must have {rank} axes and be over the student's "
                f"tokens, (batch, length)={expected}. "
                f"Received: {name}.shape={shape}"
            )
