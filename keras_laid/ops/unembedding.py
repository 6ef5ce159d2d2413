"""Next-token logits, described by hidden states and a kernel."""

from collections.abc import Callable
from typing import NamedTuple
from typing import Self

from keras import ops

from keras_laid.arguments import check_number
from keras_laid.arguments import check_shape
from keras_laid.typing import Tensor


class Unembedding(NamedTuple):
    """Hidden states, and the kernel that turns them into next-token logits.

    Attributes:
        hidden: Tensor of shape `(batch, length, hidden_dim)`, the last hidden
            states of a model. If `kernel` is `None`, logits of shape
            `(batch, length, vocabulary)`.
        kernel: Tensor of shape `(hidden_dim, vocabulary)`, or `None` if
            `hidden` already holds logits. Defaults to `None`.
        soft_cap: Positive float or `None`. Logits `x` become
            `soft_cap * tanh(x / soft_cap)`. Defaults to `None`, no cap.
    """

    hidden: Tensor
    kernel: Tensor | None = None
    soft_cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Integer, the number of tokens that have logits."""
        return (self.hidden if self.kernel is None else self.kernel).shape[-1]

    def logits(self) -> Tensor:
        """Logits of shape `(batch, length, vocabulary)`, in float32."""
        logits = self.hidden
        if self.kernel is not None:
            logits = ops.matmul(logits, self.kernel)
        logits = ops.cast(logits, "float32")
        if self.soft_cap is not None:
            logits = ops.tanh(logits / self.soft_cap) * self.soft_cap
        return logits

    def log_probabilities(self, log_q: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of next tokens, softened, in float32.

        Args:
            log_q: Log-probabilities of another model. Not used here, but
                needed by the method of the same name of `TopLogits`.
            temperature: Float greater than 0.
        """
        del log_q
        return ops.log_softmax(self.logits() / temperature)

    def computed(self) -> "Unembedding":
        """A copy that holds the computed logits, for repeated use."""
        return Unembedding(self.logits())

    def constant(self) -> Self:
        """A copy that no gradient reaches."""
        kernel = self.kernel
        if kernel is not None:
            kernel = ops.stop_gradient(kernel)
        return self._replace(
            hidden=ops.stop_gradient(self.hidden), kernel=kernel
        )

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `function` applied to each tensor over tokens."""
        return self._replace(hidden=function(self.hidden))

    def first(self, vocabulary: int) -> Self:
        """A copy with the logits of only the first `vocabulary` tokens."""
        if vocabulary == self.vocabulary:
            return self
        if self.kernel is None:
            return self._replace(hidden=self.hidden[..., :vocabulary])
        return self._replace(kernel=self.kernel[:, :vocabulary])


def check_unembedding(name: str, unembedding: Unembedding) -> None:
    """Refuses an `Unembedding` whose parts do not fit each other."""
    hidden, kernel, soft_cap = unembedding
    axes = dict(batch=None, length=None, features=None)
    check_shape(f"{name}.hidden", hidden, **axes)
    if kernel is not None:
        check_shape(
            f"{name}.kernel",
            kernel,
            hidden_dim=hidden.shape[2],
            vocabulary=None,
        )
    if soft_cap is not None:
        check_number(f"{name}.soft_cap", soft_cap, "(0, inf)")
