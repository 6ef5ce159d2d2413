"""How rows of attention are split into blocks."""

import pytest
from keras import ops

from keras_laid.ops.row_blocks import ELEMENTS
from keras_laid.ops.row_blocks import ROWS
from keras_laid.ops.row_blocks import RowBlocks
from keras_laid.ops.row_blocks import rows_of_block


def test_blocks_have_fewer_rows_for_more_keys():
    assert rows_of_block(None) == rows_of_block(1) == ROWS
    assert rows_of_block(ELEMENTS // ROWS) == ROWS
    assert rows_of_block(4 * ELEMENTS // ROWS) == ROWS // 4
    assert rows_of_block(ELEMENTS + 1) == 1


def test_a_block_of_long_prompts_takes_some_megabytes():
    for keys in (2**13, 2**15, 2**17):
        of_head = 4 * keys * rows_of_block(keys)
        assert 2**18 <= of_head <= 2**22


@pytest.mark.parametrize("rows", [0, 1, 5, 7, 12])
@pytest.mark.parametrize("known", [True, False])
def test_blocks_have_no_more_rows_than_there_are(rows, known):
    blocks = RowBlocks(rows if known else ops.convert_to_tensor(rows), 7)
    assert int(blocks.size) == max(1, min(rows, 7))
    assert int(blocks.count) == -(-rows // int(blocks.size))
    assert int(blocks.filled) == int(blocks.count) * int(blocks.size)
