"""The largest next-token logits, used in place of all of them."""

from collections.abc import Callable
from typing import NamedTuple
from typing import Self

from keras import ops

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.arguments import check_shape
from keras_laid.typing import Tensor

NOTHING = -1e30  # The logarithm of 0, but finite, so that sums are finite.


class TopLogits(NamedTuple):
    """The largest logits of each token, and the log-sum-exp of all others.

    The divergence of a student from a `TopLogits` counts all other tokens as
    one: it does not prescribe how the student divides probability among them.
    It is at most the divergence from all logits, and equal to it if `logits`
    holds all of them.

    Attributes:
        logits: Float tensor of shape `(batch, length, count)`, the largest
            logits.
        index: Integer tensor of shape `(batch, length, count)`: the token that
            each of `logits` belongs to.
        others: Float tensor of shape `(batch, length, 2)`: the log-sum-exp of
            all other logits, divided by `temperature` and by 1.
        vocabulary: Integer, the number of logits that the largest were taken
            from.
        temperature: Float greater than 0, the temperature at which `logits`
            can be compared, besides 1. Defaults to `1.0`.
    """

    logits: Tensor
    index: Tensor
    others: Tensor
    vocabulary: int
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls, logits: Tensor, count: int, temperature: float = 1.0
    ) -> Self:
        """Takes the largest of all logits.

        Args:
            logits: Tensor of shape `(batch, length, vocabulary)`.
            count: Integer from 1 to `vocabulary`, how many logits to keep.
            temperature: Float greater than 0, the temperature at which a
                student will be compared. Defaults to `1.0`.

        Returns:
            A `TopLogits`.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a number is out of range, or `logits` does not have
                three axes.
        """
        check_shape("logits", logits, batch=None, length=None, vocabulary=None)
        check_number("temperature", temperature, "(0, inf)")
        check_integer("count", count)
        if count > logits.shape[-1]:
            raise ValueError(
                "`count` must be at most the number of logits. Received: "
                f"count={count}, logits.shape={tuple(logits.shape)}"
            )
        logits = ops.cast(logits, "float32")
        vocabulary = logits.shape[-1]
        top, index = ops.top_k(logits, count)
        rest = put(logits, index, ops.full_like(top, NOTHING))
        others = [ops.logsumexp(rest / t, axis=-1) for t in (temperature, 1.0)]
        return cls(
            top, index, ops.stack(others, axis=-1), vocabulary, temperature
        )

    def log_probabilities(self, log_q: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of next tokens, softened, in float32.

        Args:
            log_q: Tensor of shape `(batch, length, vocabulary)`, the student's
                log-probabilities. The other tokens divide their total
                probability in the same proportions as in the student.
            temperature: Float, either `self.temperature` or 1.
        """
        top = ops.cast(self.logits, "float32") / temperature
        column = 0 if temperature == self.temperature else 1
        others = ops.cast(self.others[..., column], "float32")
        total = ops.logaddexp(ops.logsumexp(top, axis=-1), others)[..., None]
        rest = put(log_q, self.index, ops.full_like(top, NOTHING))
        rest = rest - ops.logsumexp(rest, axis=-1, keepdims=True)
        return put(rest + others[..., None] - total, self.index, top - total)

    def computed(self) -> Self:
        return self

    def constant(self) -> Self:
        return self.map_tokens(ops.stop_gradient)

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._replace(
            logits=function(self.logits),
            index=function(self.index),
            others=function(self.others),
        )

    def first(self, vocabulary: int) -> Self:
        if vocabulary == self.vocabulary:
            return self
        raise ValueError(
            "The largest logits must be those of tokens that the student also "
            f"has. Received: the largest of {self.vocabulary}, {vocabulary} "
            f"shared. Take the largest of only the first {vocabulary} logits."
        )


def check_top_logits(name: str, top: TopLogits) -> None:
    """Refuses a `TopLogits` whose parts do not fit each other."""
    axes = dict(batch=None, length=None)
    check_shape(f"{name}.logits", top.logits, **axes, count=None)
    count = top.logits.shape[2]
    check_shape(f"{name}.index", top.index, **axes, count=count)
    check_dtype(f"{name}.index", top.index, "int")
    check_shape(f"{name}.others", top.others, **axes, temperatures=2)
    check_integer(f"{name}.vocabulary", top.vocabulary)
    check_number(f"{name}.temperature", top.temperature, "(0, inf)")


def put(tensor: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Returns `tensor` with `values` at `index` along its last axis."""
    *outer, size = ops.shape(tensor)
    count = index.shape[-1]
    column = ops.reshape(ops.cast(index, "int32"), (-1,))
    row = ops.repeat(ops.arange(ops.shape(column)[0] // count), count)
    flat = ops.scatter_update(
        ops.reshape(tensor, (-1, size)),
        ops.stack([ops.cast(row, "int32"), column], axis=-1),
        ops.reshape(values, (-1,)),
    )
    return ops.reshape(flat, (*outer, size))
