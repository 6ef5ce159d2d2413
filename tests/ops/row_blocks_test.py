"""How rows of attention are split into blocks."""

from keras_laid.ops.row_blocks import ELEMENTS
from keras_laid.ops.row_blocks import ROWS
from keras_laid.ops.row_blocks import rows_of_block


def test_blocks_have_fewer_rows_for_more_keys():
    assert rows_of_block(None) == rows_of_block(1) == ROWS
    assert rows_of_block(ELEMENTS // ROWS) == ROWS
    assert rows_of_block(4 * ELEMENTS // ROWS) == ROWS // 4
    assert rows_of_block(ELEMENTS + 1) == 1
