"""The losses over blocks of tokens: only a block's logits ever exist.

A block has the same number of tokens of each example, so that the work is
divided evenly where devices divide a batch. Tokens that count come first, and
blocks without any of them are skipped. The share of each token in the loss is
known beforehand, so losses and their gradients are computed together. This
takes as many matrix products as the plain form, and keeps nothing for a
backward pass.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_laid.ops.logits_divergence import definition
from keras_laid.ops.own_gradient import with_own_gradient
from keras_laid.ops.row_blocks import clip
from keras_laid.ops.top_logits import TopLogits
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor

ELEMENTS = 2**22  # About the number of logits of one model in a block.
ROWS = 16  # The fewest tokens in a block of a long sequence.
UNITS = (2.0 ** np.arange(-100, 101)).astype("float32")


class Block(NamedTuple):
    """The op's arguments for some of the tokens of each example."""

    student: Unembedding
    teacher: Unembedding | TopLogits | None
    labels: Tensor | None
    shares: list[Tensor]

    def map(self, function):
        """A copy with `function` applied to each tensor over tokens."""

        return Block(
            student=self.student.map_tokens(function),
            teacher=self.teacher and self.teacher.map_tokens(function),
            labels=None if self.labels is None else function(self.labels),
            shares=[function(each) for each in self.shares],
        )

    def losses(self, temperature, beta):
        """Losses of each token, and the loss's slope at each logit."""
        logits = self.student.logits()
        divergence = cross_entropy = kl = ops.zeros_like(logits[..., 0])
        slope = ops.zeros_like(logits)
        if self.teacher is not None:
            shared = logits[..., : self.teacher.vocabulary]
            teacher = self.teacher.computed()
            softened = definition.softened(shared, teacher, temperature)
            divergence = definition.jensen_shannon(*softened, beta)
            divergence = temperature**2 * divergence
            slope = temperature * slope_of_divergence(*softened, beta)
            slope = slope * self.shares[0][..., None]
            others = logits.shape[-1] - shared.shape[-1]
            slope = ops.pad(slope, ((0, 0), (0, 0), (0, others)))
            if temperature != 1.0:
                softened = definition.softened(shared, teacher, 1.0)
            kl = definition.kl_divergence(*softened)
        if self.labels is not None:
            log_q = ops.log_softmax(logits)
            cross_entropy = -definition.label_log_probabilities(
                log_q, self.labels
            )
            is_label = ops.arange(logits.shape[-1]) == self.labels[..., None]
            cross_entropy_slope = ops.exp(log_q) - ops.cast(is_label, "float32")
            slope = slope + cross_entropy_slope * self.shares[1][..., None]
        soft_cap = self.student.soft_cap
        if soft_cap is not None:
            slope = slope * (1.0 - ops.square(logits / soft_cap))
        return (divergence, cross_entropy, kl), slope


def logits_divergence(
    student, teacher, labels, counted, shares, temperature, beta
):
    batch, length, width = ops.shape(student.hidden)
    rows = rows_of_block(batch, length, student.vocabulary)
    if isinstance(rows, int) and length <= rows:
        return definition.logits_divergence(
            student, teacher, labels, counted, shares, temperature, beta
        )
    trained = student.hidden, student.kernel
    hidden, kernel = map(ops.stop_gradient, trained)
    student = student._replace(hidden=hidden, kernel=kernel)
    unit = unit_of(
        [
            share
            for share, target in zip(shares, (teacher, labels), strict=True)
            if target is not None
        ]
    )
    every = Block(student, teacher, labels, [each / unit for each in shares])
    counted = ops.cast(counted, "int32")
    count = ops.sum(counted, axis=1, keepdims=True)
    # In each example, the tokens that count come first.
    order = ops.argsort(-counted, axis=1)

    def add_block(number, sums):
        slot = number * rows + ops.arange(rows)
        index = ops.take(order, ops.minimum(slot, length - 1), axis=1)
        block = every.map(lambda tensor: tokens_at(tensor, index))
        # Blocks are filled up with tokens that have no share.
        block = block._replace(
            shares=[ops.where(slot < count, each, 0.0) for each in block.shares]
        )
        token_losses, slope = block.losses(temperature, beta)
        hidden_gradient = ops.matmul(
            ops.cast(slope, kernel.dtype), ops.transpose(kernel)
        )
        # In float32: in a smaller dtype the sum over blocks would be rounded.
        kernel_gradient = ops.einsum(
            "bid,biv->dv", ops.cast(block.student.hidden, "float32"), slope
        )
        *columns, kernels = sums
        columns = [
            ops.slice_update(
                column, [0, number * rows] + [0] * (len(found.shape) - 2), found
            )
            for column, found in zip(
                columns, [*token_losses, hidden_gradient], strict=True
            )
        ]
        return [*columns, kernels + kernel_gradient]

    slots = (length + rows - 1) // rows * rows
    *columns, kernel_gradient = ops.fori_loop(
        0,
        (ops.max(count) + rows - 1) // rows,
        add_block,
        [
            *[ops.zeros((batch, slots)) for _ in range(3)],
            ops.zeros((batch, slots, width), dtype=hidden.dtype),
            ops.zeros(kernel.shape),
        ],
    )
    place = ops.argsort(order, axis=1)  # The slot of each token.
    *token_losses, hidden_gradient = [
        tokens_at(column, place) for column in columns
    ]

    value = sum(
        ops.sum(share * each)
        for share, each in zip(shares, token_losses[:2], strict=True)
    )
    constants = value, unit, hidden_gradient, kernel_gradient
    return with_own_gradient(loss, list(trained), constants), *token_losses


def slope_of_divergence(log_q, log_p, beta):
    """The slope of `definition.jensen_shannon` at each softened logit."""
    q = ops.exp(log_q)
    if beta == 0:
        return q - ops.exp(log_p)
    if beta == 1:
        return q * centered(log_q - log_p, q)
    log_m = definition.log_mixture(log_q, log_p, beta)
    return (1 - beta) * q * centered(log_q - log_m, q)


def centered(x, q):
    """`x` less its mean over the vocabulary by probabilities `q`."""
    return x - ops.sum(q * x, axis=-1, keepdims=True)


def loss(constants, hidden, kernel):
    value, unit, hidden_gradient, kernel_gradient = constants

    def gradients(upstream):
        scale = upstream * unit
        return [
            ops.cast(ops.multiply(scale, hidden_gradient), hidden.dtype),
            ops.cast(scale * kernel_gradient, kernel.dtype),
        ]

    return value, gradients


def rows_of_block(batch, length, vocabulary):
    """The number of tokens of each example in a block."""
    rows = max(ROWS, ELEMENTS // vocabulary)
    return clip(rows // clip(batch, 1, rows), 1, length)


def unit_of(shares):
    """The unit that gradients of hidden states are stored in.

    It is the largest share, rounded down to a power of 2: gradients may be too
    small for float16, and a power of 2 does not round them.
    """
    largest = ops.max(ops.stack(shares))
    units = ops.convert_to_tensor(UNITS)
    return ops.max(ops.where(units <= largest, units, units[0]))


def tokens_at(tensor, index):
    """The tokens of each example that `index` names."""
    if len(tensor.shape) == 3:
        index = index[:, :, None]
    return ops.take_along_axis(tensor, index, axis=1)
