"""The inputs of attention ops: queries and keys, masks and distances."""

from typing import NamedTuple
from typing import Self

from keras import ops

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_kind
from keras_laid.arguments import check_number
from keras_laid.arguments import check_scalar
from keras_laid.arguments import check_shape
from keras_laid.typing import Tensor

# Used in place of minus infinity: the difference of two infinities is NaN.
MASKED = -1e30
# A probability below this counts as 0 in `p * log(p)`.
TINY = 1e-30


class Attention(NamedTuple):
    """Queries and keys of one attention layer, after rotary embedding.

    Attributes:
        query: Tensor of shape `(batch, rows, heads, head_dim)`.
        key: Tensor of shape `(batch, keys, key_heads, head_dim)`. `key_heads`
            divides `heads`; head `h` reads key head
            `h // (heads // key_heads)`.
        scale: Float greater than 0, the factor on `query @ key`.
        soft_cap: Positive float or `None`. Logits `x` become
            `soft_cap * tanh(x / soft_cap)`. Defaults to `None`, no cap.
    """

    query: Tensor
    key: Tensor
    scale: float
    soft_cap: float | None = None

    def logits(self) -> Tensor:
        """Logits of shape `(batch, heads, rows, keys)`, in float32."""
        # b = batch, i = row, j = key, h = head, d = head dim
        # Queries are scaled, not logits: a compiler may fuse a factor on logits
        # with the subtraction of their normalizer, and would then round logits
        # differently than in the normalizer.
        query = ops.cast(self.query, "float32") * self.scale
        logits = ops.einsum("bihd,bjhd->bhij", query, self.key_of_each_head())
        if self.soft_cap is not None:
            logits = ops.tanh(logits / self.soft_cap) * self.soft_cap
        return logits

    def key_of_each_head(self) -> Tensor:
        """Keys of shape `(batch, keys, heads, head_dim)`, in float32."""
        return self.repeat_heads(self.key)

    def repeat_heads(self, tensor: Tensor) -> Tensor:
        """The part of a tensor like `key` that each head reads, in float32."""
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
        row_index: Integer tensor of shape `(rows,)`, ascending: the index of
            each row in the sequence of keys. Rows may be only a part of it.
        window: Integer or `None`. Rows attend only keys less than `window`
            places away, on either side. Defaults to `None`, no limit.
        block: Integer tensor of shape `(batch, keys)`, or `None`: the number of
            the block that each key belongs to, such as an image; 0 means no
            block. Rows also attend later causal keys of their own block.
            Defaults to `None`, no blocks.
    """

    bidirectional: Tensor
    causal: Tensor
    row_index: Tensor
    window: int | None = None
    block: Tensor | None = None

    @classmethod
    def from_lengths(
        cls,
        key_length: int,
        lengths: Tensor,
        prefix_lengths: int | Tensor = 0,
        row_index: Tensor | None = None,
        window: int | None = None,
    ) -> Self:
        """Describes a mask by lengths: causal after an optional prefix.

        Args:
            key_length: Integer, the number of keys, padding included.
            lengths: Integer tensor of shape `(batch,)`: the number of keys of
                each example that are not padding. They come first.
            prefix_lengths: Integer, or integer tensor of shape `(batch,)`: the
                number of keys at the start that every row attends. Defaults to
                `0`, a causal mask.
            row_index: Integer tensor of shape `(rows,)`, ascending: the index
                of each row in the sequence of keys. Defaults to one row for
                each key.
            window: Integer or `None`. Rows attend only keys less than `window`
                places away, on either side. Defaults to `None`, no limit.

        Returns:
            An `AttentionMask`.

        Raises:
            TypeError: If an argument does not consist of integers.
            ValueError: If `key_length` or `window` is less than 1, or `lengths`
                or `prefix_lengths` has the wrong shape.
        """
        check_integer("key_length", key_length)
        if window is not None:
            check_integer("window", window)
        lengths = ops.convert_to_tensor(lengths)
        check_shape("lengths", lengths, batch=None)
        check_dtype("lengths", lengths, "int")
        prefix = ops.convert_to_tensor(prefix_lengths)
        if len(prefix.shape):
            check_shape("prefix_lengths", prefix, batch=lengths.shape[0])
        check_dtype("prefix_lengths", prefix, "int")
        index = ops.arange(key_length)
        lengths = ops.reshape(lengths, (-1, 1))
        prefix = ops.reshape(prefix, (-1, 1))
        some = ops.less(index, ops.cast(lengths, index.dtype))
        first = ops.less(index, ops.cast(prefix, index.dtype))
        return cls(
            bidirectional=ops.logical_and(some, first),
            causal=ops.logical_and(some, ops.logical_not(first)),
            row_index=index if row_index is None else row_index,
            window=window,
        )

    def allowed(self) -> Tensor:
        """Boolean tensor of shape `(batch, 1, rows, keys)`."""
        key_index = ops.arange(ops.shape(self.causal)[1])
        row_index = ops.cast(self.row_index, key_index.dtype)[:, None]
        later = ops.logical_and(self.causal[:, None], row_index >= key_index)
        allowed = ops.logical_or(self.bidirectional[:, None], later)
        if self.block is not None:
            row_block = ops.take(self.block, row_index[:, 0], axis=1)
            same = self.block[:, None] == row_block[:, :, None]
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
        row_positions: Tensor of shape `(batch or 1, rows)`, the positions of
            rows, in tokens.
        key_positions: Tensor of shape `(batch or 1, keys)`, the positions of
            keys, in tokens. `span` is the distance between the first and the
            last position of an example, rows and keys together.
        strength: Float or scalar tensor, 0 or more: what the weight grows by
            over the whole span. Defaults to `0.0`, equal weights of 1.
        exponent: Float greater than 0. Below 1 weights grow mostly at short
            distances, above 1 mostly at long ones. Defaults to `1.0`.
    """

    row_positions: Tensor
    key_positions: Tensor
    strength: float | Tensor = 0.0
    exponent: float = 1.0

    def weights(self, span: Tensor | None = None) -> Tensor:
        """Float32 tensor of shape `(batch or 1, 1, rows, keys)`.

        Args:
            span: Tensor of shape `(batch or 1,)`, in tokens. Defaults to
                `self.span()`. If this `Distance` holds only some of the rows,
                pass the span of all of them.
        """
        rows = ops.cast(self.row_positions, "float32")
        keys = ops.cast(self.key_positions, "float32")
        distance = ops.abs(rows[:, :, None] - keys[:, None])
        span = self.span() if span is None else span
        share = distance / ops.maximum(span, 1.0)[:, None, None]
        weights = 1.0 + self.strength * ops.power(share, self.exponent)
        return weights[:, None]

    def span(self) -> Tensor:
        """Float32 tensor of shape `(batch or 1,)`, in tokens."""
        rows = ops.cast(self.row_positions, "float32")
        keys = ops.cast(self.key_positions, "float32")
        last = ops.maximum(ops.max(rows, axis=1), ops.max(keys, axis=1))
        first = ops.minimum(ops.min(rows, axis=1), ops.min(keys, axis=1))
        return last - first


def log_attention(attention: Attention, allowed: Tensor) -> Tensor:
    """Logarithm of attention maps, float32.

    Args:
        attention: `Attention`.
        allowed: Boolean tensor that broadcasts to
            `(batch, heads, rows, keys)`. Keys that are not allowed get the
            logarithm of a probability that rounds to 0. In a row without
            allowed keys all keys get equal probabilities.

    Returns:
        A tensor of shape `(batch, heads, rows, keys)`.
    """
    return ops.log_softmax(ops.where(allowed, attention.logits(), MASKED))


def check_attention(name: str, attention: Attention) -> None:
    """Refuses all but an `Attention` whose parts fit each other."""
    check_kind(name, attention, Attention, "a `keras_laid.ops.Attention`")
    check_number(f"{name}.scale", attention.scale, "(0, inf)")
    if attention.soft_cap is not None:
        check_number(f"{name}.soft_cap", attention.soft_cap, "(0, inf)")
    query, key = attention.query, attention.key
    check_shape(
        f"{name}.query", query, batch=None, rows=None, heads=None, head_dim=None
    )
    check_shape(
        f"{name}.key",
        key,
        batch=query.shape[0],
        keys=None,
        key_heads=None,
        head_dim=None,
    )
    if query.shape[2] % key.shape[2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "Query heads must be a multiple of key heads, and head dims "
            f"must be equal. Received: {name}.query.shape="
            f"{tuple(query.shape)}, {name}.key.shape={tuple(key.shape)}"
        )


def check_same_tokens(student: Attention, teacher: Attention) -> None:
    """Refuses two `Attention`s with unequal batch, rows or keys."""
    for name, one, other in (
        ("batch", student.query.shape[0], teacher.query.shape[0]),
        ("rows", student.query.shape[1], teacher.query.shape[1]),
        ("keys", student.key.shape[1], teacher.key.shape[1]),
    ):
        if None not in (one, other) and one != other:
            raise ValueError(
                f"Student and teacher must have the same {name}. "
                f"Received: student {name}={one}, teacher {name}={other}"
            )


def check_mask(mask: AttentionMask, attention: Attention) -> None:
    """Refuses all but an `AttentionMask` that fits `attention`."""
    check_kind("mask", mask, AttentionMask, "a `keras_laid.ops.AttentionMask`")
    batch, rows = attention.query.shape[:2]
    keys = attention.key.shape[1]
    for name in ("bidirectional", "causal"):
        tensor = getattr(mask, name)
        check_shape(f"mask.{name}", tensor, batch=batch, keys=keys)
        check_dtype(f"mask.{name}", tensor, "bool")
    check_shape("mask.row_index", mask.row_index, rows=rows)
    check_dtype("mask.row_index", mask.row_index, "int")
    if mask.window is not None:
        check_integer("mask.window", mask.window)
    if mask.block is not None:
        check_shape("mask.block", mask.block, batch=batch, keys=keys)
        check_dtype("mask.block", mask.block, "int")


def check_distance(distance: Distance, batch: int | None, **axes: int) -> None:
    """Refuses all but a `Distance` of the given shape.

    Args:
        distance: `Distance`.
        batch: Integer, or `None` where it is not known.
        **axes: Two integers, the numbers of rows and of keys, in that order.
            Their argument names appear in error messages.
    """
    check_kind("distance", distance, Distance, "a `keras_laid.ops.Distance`")
    check_number("distance.exponent", distance.exponent, "(0, inf)")
    check_scalar("distance.strength", distance.strength, "[0, inf)")
    for name, (axis, size) in zip(
        ("row_positions", "key_positions"), axes.items(), strict=True
    ):
        tensor = getattr(distance, name)
        shared = tuple(getattr(tensor, "shape", ()))[:1] == (1,)
        check_shape(
            f"distance.{name}",
            tensor,
            batch=1 if shared else batch,
            **{axis: size},
        )
