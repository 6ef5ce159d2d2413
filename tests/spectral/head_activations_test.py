import numpy as np
import pytest

from keras_laid import spectral
from keras_laid.spectral.head_activations import activation_of
from tests.spectral.planted import attending
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import to_numpy

SIZES = (8, 16, 32, 64)


def planted_heads(size):
    """Heads that read one far token, the nearest four, and all evenly."""
    shares = np.zeros((2, 3, size))
    shares[:, 0, 1] = 1.0
    shares[:, 1, -4:] = 0.25
    shares[:, 2] = 1 / size
    return attending(shares)


def activations(beyond=0.5):
    return {
        size: to_numpy(activation_of(planted_heads(size), beyond))[:, None]
        for size in SIZES
    }


def test_heads_are_classed_as_planted():
    found = activations()
    assert found[8].shape == (2, 1, 3)
    np.testing.assert_allclose(
        found[64][:, 0], [[1.0, 0.0, 0.0]] * 2, atol=0.15
    )
    kinds = spectral.classify_heads(found)
    assert kinds.tolist() == [["global", "local", "local"]]


def test_with_all_far_near_tokens_count():
    found = activations(beyond=0.0)[64]
    assert (found[..., 1] > 0.4).all()


def test_keep_is_the_share_that_makes_a_head_global():
    falling = {
        size: np.full((3, 1, 1), 0.9 - 0.1 * np.log2(size / 8))
        for size in SIZES
    }  # 0.9 to 0.6: a line over the logarithm of the size.
    assert spectral.classify_heads(falling, keep=0.66) == "global"
    assert spectral.classify_heads(falling, keep=0.68) == "local"


def test_activations_of_a_model():
    model = make_multi_image(vocabulary_size=60)
    by_size = {
        size: make_haystacks(make_preprocessor(), sizes=(size,))[0][0]
        for size in (1, 4)
    }
    found = spectral.head_activations(model, by_size, (0, 1))
    assert found.keys() == {1, 4}
    for values in found.values():
        assert values.shape == (4, 2, 2)
        assert (values > 0).all() and (values < 1).all()


def test_refuses():
    with pytest.raises(ValueError, match="`beyond` must be in"):
        spectral.head_activations(None, {}, beyond=1.0)
    with pytest.raises(ValueError, match="two sizes or more"):
        spectral.classify_heads({8: np.ones((1, 1, 1))})
    with pytest.raises(ValueError, match="`keep` must be in"):
        spectral.classify_heads(activations(), keep=0.0)
