"""How rows of attention are split into blocks."""

import pytest
from keras import ops

from keras_laid.ops.row_blocks import ELEMENTS
from keras_laid.ops.row_blocks import ROWS
from keras_laid.ops.row_blocks import rows_of_block


def test_blocks_have_fewer_rows_for_more_keys():
    rows = 2 * ROWS
    assert rows_of_block(rows, 1) == ROWS
    assert rows_of_block(rows, ELEMENTS // ROWS) == ROWS
    assert rows_of_block(rows, 4 * ELEMENTS // ROWS) == ROWS // 4
    assert rows_of_block(rows, ELEMENTS + 1) == 1


def test_a_block_of_long_prompts_takes_some_megabytes():
    for keys in (2**13, 2**15, 2**17):
        head_bytes = 4 * keys * rows_of_block(keys, keys)
        assert 2**18 <= head_bytes <= 2**22


@pytest.mark.parametrize("known", [True, False])
def test_blocks_have_no_more_rows_than_there_are(known):
    for rows, keys, expected in (
        (0, 0, 1),
        (1, 9, 1),
        (ROWS - 1, 9, ROWS - 1),
        (ROWS + 1, 9, ROWS),
        (ROWS, 2 * ELEMENTS // ROWS, ROWS // 2),
    ):
        sizes = rows, keys
        if not known:
            sizes = map(ops.convert_to_tensor, sizes)
        found = rows_of_block(*sizes)
        assert int(found) == expected
        assert isinstance(found, int) == known
