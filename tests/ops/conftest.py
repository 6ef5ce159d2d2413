import pytest

from keras_laid.ops import row_blocks
from keras_laid.ops.fused_attention import tiles
from tests.ops.kernels import BACKEND
from tests.support import has_gpu


@pytest.fixture(scope="module")
def small_tiles():
    """Gives small tests several tiles, the last ones not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "ROWS", 5)
        patch.setattr(
            tiles,
            "choose_tiles",
            lambda kernel, *_, **__: tiles.Tiles(
                16, 16, 4, 1, by_key=kernel.startswith("key")
            ),
        )
        if BACKEND == "jax" and not has_gpu():
            from keras_laid.ops.fused_attention import pallas

            patch.setattr(pallas, "INTERPRET", True)
        yield


@pytest.fixture
def chosen_by(monkeypatch, small_tiles):
    """The width and count by which each kernel's tiles were chosen."""
    found, choose = {}, tiles.choose_tiles

    def note(kernel, width, count, *_, **__):
        found[kernel] = width, count
        return choose(kernel)

    monkeypatch.setattr(tiles, "choose_tiles", note)
    return found
