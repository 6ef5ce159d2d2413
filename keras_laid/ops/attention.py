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
        scale: Float greater than 0, the factor on `query @ key`.
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
        return self.of_each_head(self.key)

    def of_each_head(self, tensor):
        """What each head reads of a tensor like `key`, in float32."""
        tensor = ops.cast(tensor, "float32")
        repeats = self.query.shape[2] // tensor.shape[2]
        return ops.repeat(tensor, repeats, axis=2)


class AttentionMask(NamedTuple):
    """Which keys each row attends, in memory linear in length.

    Attributes:
        bidirectional: Boolean tensor of shape `(batch, keys)`: keys that every
            row attends (images and prompt).
        causal: Boolean tensor of shape `(batch, keys)`: keys that only their
            own and later rows attend (the response). Padding is in neither.
        row_index: Integer tensor of shape `(rows,)`, ascending: where in the
            sequence of keys each row stands.
        window: Integer or `None`. Rows attend only keys less than `window`
            places away, on either side.
        block: Integer tensor of shape `(batch, keys)`, or `None`. Rows attend
            keys of their own block, the tokens of an image, also later ones; 0
            is no block.
    """

    bidirectional: Any
    causal: Any
    row_index: Any
    window: int | None = None
    block: Any = None

    @classmethod
    def from_lengths(
        cls, key_length, lengths, prefix_lengths=0, row_index=None, window=None
    ):
        """Describes a mask by lengths: causal after an optional prefix.

        Args:
            key_length: Integer, keys with padding.
            lengths: Integer tensor of shape `(batch,)`: the first so many keys
                of an example are no padding.
            prefix_lengths: Integer, or integer tensor of shape `(batch,)`: of
                these, the first so many are attended by every row. Defaults
                to `0`, a causal mask.
            row_index: Integer tensor of shape `(rows,)`, ascending. Defaults to
                one row for each key.
            window: Integer or `None`, see above.

        Returns:
            An `AttentionMask`.
        """
        index = ops.arange(key_length)
        lengths = ops.reshape(ops.convert_to_tensor(lengths), (-1, 1))
        prefix = ops.reshape(ops.convert_to_tensor(prefix_lengths), (-1, 1))
        some = ops.less(index, ops.cast(lengths, index.dtype))
        first = ops.less(index, ops.cast(prefix, index.dtype))
        return cls(
            bidirectional=ops.logical_and(some, first),
            causal=ops.logical_and(some, ops.logical_not(first)),
            row_index=index if row_index is None else row_index,
            window=window,
        )

    def allowed(self):
        """Boolean tensor of shape `(batch, 1, rows, keys)`."""
        key_index = ops.arange(ops.shape(self.causal)[1])
        row_index = ops.cast(self.row_index, key_index.dtype)[:, None]
        later = ops.logical_and(self.causal[:, None], row_index >= key_index)
        allowed = ops.logical_or(self.bidirectional[:, None], later)
        if self.block is not None:
            of_rows = ops.take(self.block, row_index[:, 0], axis=1)
            same = self.block[:, None] == of_rows[:, :, None]
            inside = ops.logical_and(same, self.block[:, None] > 0)
            seen = ops.logical_and(inside, self.causal[:, None])
            allowed = ops.logical_or(allowed, seen)
        if self.window is not None:
            near = ops.abs(row_index - key_index) < self.window
            allowed = ops.logical_and(allowed, near)
        return allowed[:, None]


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
        share = distance / ops.maximum(self.span(), 1.0)[:, None, None]
        weights = 1.0 + self.strength * ops.power(share, self.exponent)
        return weights[:, None]

    def span(self):
        """Float32 tensor of shape `(batch or 1,)`, in tokens."""
        keys = ops.cast(self.key_positions, "float32")
        return ops.max(keys, axis=1) - ops.min(keys, axis=1)
