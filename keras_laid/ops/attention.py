"""What describes attention to an op: queries, keys, mask, distances."""

from typing import Any
from typing import NamedTuple

from keras import ops


class Attention(NamedTuple):
    """Queries and keys of one attention layer, after rotary embedding.

    Attributes:
        query: Tensor of shape `(batch, rows, heads, head_dim)`.
        key: Tensor of shape `(batch, keys, key_heads, head_dim)`. `key_heads`
            divides `heads`; head `h` reads key head
            `h // (heads // key_heads)`.
        scale: Float, the factor on `query @ key`.
        soft_cap: Positive float or `None`. Logits `x` become
            `soft_cap * tanh(x / soft_cap)`.
    """

    query: Any
    key: Any
    scale: float
    soft_cap: float | None = None

    def logits(self):
        """Logits of shape `(batch, heads, rows, keys)`, in float32."""
        # b = batch, i = row, j = key, h = head, d = head dim
        query = ops.cast(self.query, "float32")
        logits = ops.einsum("bihd,bjhd->bhij", query, self.key_of_each_head())
        logits = logits * self.scale
        if self.soft_cap is not None:
            logits = ops.tanh(logits / self.soft_cap) * self.soft_cap
        return logits

    def key_of_each_head(self):
        """Keys of shape `(batch, keys, heads, head_dim)`, in float32."""
        key = ops.cast(self.key, "float32")
        return ops.repeat(key, self.query.shape[2] // key.shape[2], axis=2)


class AttentionMask(NamedTuple):
    """Which keys each row attends, in memory linear in length.

    Attributes:
        bidirectional: Boolean tensor of shape `(batch, keys)`: keys that every
            row attends (images and prompt).
        causal: Boolean tensor of shape `(batch, keys)`: keys that only their
            own and later rows attend (the response). Padding is in neither.
        row_index: Integer tensor of shape `(rows,)`: where in the sequence of
            keys each row stands.
    """

    bidirectional: Any
    causal: Any
    row_index: Any

    def allowed(self):
        """Boolean tensor of shape `(batch, 1, rows, keys)`."""
        key_index = ops.arange(ops.shape(self.causal)[1])
        row_index = ops.cast(self.row_index, key_index.dtype)
        seen = row_index[:, None] >= key_index  # [rows, keys]
        later = ops.logical_and(self.causal[:, None], seen)
        return ops.logical_or(self.bidirectional[:, None], later)[:, None]


class Distance(NamedTuple):
    """Weights `w = 1 + strength * (distance / span) ** exponent`.

    Attributes:
        row_positions: Tensor of shape `(batch or 1, rows)`, in tokens.
        key_positions: Tensor of shape `(batch or 1, keys)`, in tokens. `span`
            is the distance between an example's first and last position.
        strength: Float or scalar tensor, 0 or more.
        exponent: Float, greater than 0.
    """

    row_positions: Any
    key_positions: Any
    strength: Any = 0.0
    exponent: float = 1.0

    def weights(self):
        """Float32 tensor of shape `(batch or 1, 1, rows, keys)`."""
        rows = ops.cast(self.row_positions, "float32")
        keys = ops.cast(self.key_positions, "float32")
        distance = ops.abs(rows[:, :, None] - keys[:, None])
        span = ops.max(keys, axis=1) - ops.min(keys, axis=1)
        share = distance / ops.maximum(span, 1.0)[:, None, None]
        weights = 1.0 + self.strength * ops.power(share, self.exponent)
        return weights[:, None]
