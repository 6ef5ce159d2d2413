"""Splits the rows of attention into blocks of one size."""

from collections.abc import Callable

from keras import ops

from keras_laid.typing import Tensor

# Each block's maps have shape (batch, heads, block, keys).
ROWS = 128  # The most a block has.
ELEMENTS = 2**18  # About how many rows times keys it has, over long prompts.


def rows_of_block(rows: int | Tensor, keys: int | Tensor) -> int | Tensor:
    """How many of so many rows a block takes: fewer for more keys."""
    size = ELEMENTS // clip(keys, 1, ELEMENTS)
    return clip(size, 1, clip(rows, 1, ROWS))


def clip(
    size: int | Tensor, least: int | Tensor, most: int | Tensor
) -> int | Tensor:
    """A size within bounds, of which any may be known only later."""
    if all(isinstance(each, int) for each in (size, least, most)):
        return max(least, min(size, most))
    return ops.maximum(least, ops.minimum(size, most))


class RowBlocks:
    """How so many rows are split.

    Args:
        rows: Integer, or a scalar tensor.
        size: As `rows`, of a block.
    """

    def __init__(self, rows: int | Tensor, size: int | Tensor) -> None:
        self.rows = rows
        self.size = size
        self.count = (rows + size - 1) // size
        self.filled = self.count * size

    def fill(self, tensor: Tensor, axis: int) -> Tensor:
        """Rows for full blocks: the last row is repeated."""
        index = ops.minimum(ops.arange(self.filled), self.rows - 1)
        return ops.take(tensor, index, axis=axis)

    def fill_zeros(self, tensor: Tensor, axis: int) -> Tensor:
        """Rows for full blocks: zeros follow the last."""
        shape = [1] * len(tensor.shape)
        shape[axis] = -1
        inside = ops.reshape(ops.arange(self.filled) < self.rows, shape)
        zeros = ops.zeros((), dtype=tensor.dtype)
        return ops.where(inside, self.fill(tensor, axis), zeros)

    def of(self, number: int | Tensor) -> Callable[[Tensor, int], Tensor]:
        """`rows(tensor, axis)`, which takes the rows of a block."""

        def rows_of(tensor: Tensor, axis: int) -> Tensor:
            start, shape = [0] * len(tensor.shape), list(ops.shape(tensor))
            start[axis], shape[axis] = number * self.size, self.size
            return ops.slice(tensor, start, shape)

        return rows_of

    def put(
        self, whole: Tensor, number: int | Tensor, axis: int, part: Tensor
    ) -> Tensor:
        """`whole` with the rows of a block replaced."""
        start = [0] * len(whole.shape)
        start[axis] = number * self.size
        return ops.slice_update(whole, start, part)
