"""Splits the rows of attention into blocks of one size."""

from collections.abc import Callable

from keras import ops

from keras_laid.typing import Tensor

# Each block's maps have shape (batch, heads, block, keys).
ROWS = 128  # The most rows of a block.
ELEMENTS = 2**18  # The most rows times keys of a block of two or more rows.


def rows_of_block(rows: int | Tensor, keys: int | Tensor) -> int | Tensor:
    """The number of rows in a block: fewer for more keys."""
    size = ELEMENTS // clip(keys, 1, ELEMENTS)
    return clip(size, 1, clip(rows, 1, ROWS))


def clip(
    size: int | Tensor, least: int | Tensor, most: int | Tensor
) -> int | Tensor:
    """Clips a size to bounds; each may be an integer or a scalar tensor."""
    if all(isinstance(each, int) for each in (size, least, most)):
        return max(least, min(size, most))
    return ops.maximum(least, ops.minimum(size, most))


class RowBlocks:
    """A split of rows into blocks of one size.

    Args:
        rows: Integer or scalar tensor, the number of rows.
        size: Integer or scalar tensor, the number of rows in a block.
    """

    def __init__(self, rows: int | Tensor, size: int | Tensor) -> None:
        self.rows = rows
        self.size = size
        self.count = (rows + size - 1) // size
        self.filled = self.count * size

    def fill(self, tensor: Tensor, axis: int) -> Tensor:
        """Repeats the last row until all blocks are full."""
        index = ops.minimum(ops.arange(self.filled), self.rows - 1)
        return ops.take(tensor, index, axis=axis)

    def fill_zeros(self, tensor: Tensor, axis: int) -> Tensor:
        """Appends rows of zeros until all blocks are full."""
        shape = [1] * len(tensor.shape)
        shape[axis] = -1
        inside = ops.reshape(ops.arange(self.filled) < self.rows, shape)
        zeros = ops.zeros((), dtype=tensor.dtype)
        return ops.where(inside, self.fill(tensor, axis), zeros)

    def slicer(self, number: int | Tensor) -> Callable[[Tensor, int], Tensor]:
        """Returns `rows(tensor, axis)`, which takes the rows of one block."""

        def rows_of(tensor: Tensor, axis: int) -> Tensor:
            start, shape = [0] * len(tensor.shape), list(ops.shape(tensor))
            start[axis], shape[axis] = number * self.size, self.size
            return ops.slice(tensor, start, shape)

        return rows_of

    def put(
        self, whole: Tensor, number: int | Tensor, axis: int, part: Tensor
    ) -> Tensor:
        """Returns `whole` with the rows of one block replaced by `part`."""
        start = [0] * len(whole.shape)
        start[axis] = number * self.size
        return ops.slice_update(whole, start, part)
