import keras
import numpy as np
import pytest

from keras_laid import spectral
from keras_laid.backbones import attention_layers
from keras_laid.spectral.attention_mass import signal_of
from keras_laid.spectral.frequency_shares import shares_of
from keras_laid.spectral.head_activations import activation_of
from tests.backbones import small_models
from tests.spectral.planted import planted
from tests.support import PALI_GEMMA_2
from tests.support import attention_of
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import to_numpy


def make_batch(images=6):
    return make_haystacks(make_preprocessor(), sizes=(images,))[0][0]


def random_rows(keys, heads=4, key_heads=2, features=8):
    rng = np.random.default_rng(0)
    return planted(
        rng.normal(size=(2, heads, features)),
        rng.normal(size=(2, keys, key_heads, features)),
    )


def test_shares_add_up_to_one():
    model = make_multi_image(PALI_GEMMA_2, vocabulary_size=60)
    shares = spectral.frequency_shares(model, make_batch(), (1, 3))
    assert shares.shape == (4, 2, 4, 4)
    np.testing.assert_allclose(shares.sum(-1), 1.0, rtol=1e-4)


@pytest.mark.parametrize("pair", [0, 2])
def test_pair_that_carries_all_logits_has_the_whole_share(pair):
    """Plants the pair in the weights: captured features are reordered."""
    model = make_multi_image(vocabulary_size=60)
    only = np.zeros(8, "float32")
    only[[pair, pair + 4]] = 1.0
    layer = attention_of(model)[-1]
    layer.query_dense.kernel.assign(to_numpy(layer.query_dense.kernel) * only)
    shares = spectral.frequency_shares(model, make_batch())
    expected = np.broadcast_to(np.eye(4)[pair], shares.shape)
    np.testing.assert_allclose(shares, expected, atol=1e-6)


def test_shares_are_covariances_of_parts_with_logits():
    rows = random_rows(keys=9)
    query = to_numpy(rows.attention.query)
    key = to_numpy(rows.attention.key_of_each_head())
    parts = np.einsum("bihd,bjhd->bhijd", query, key)
    parts = parts.reshape(*parts.shape[:-1], 4, 2).sum(-1)
    parts = parts - parts.mean(axis=3, keepdims=True)
    logits = parts.sum(-1, keepdims=True)
    expected = (parts * logits).sum((2, 3)) / (logits**2).sum((2, 3))
    np.testing.assert_allclose(to_numpy(shares_of(rows)), expected, rtol=1e-4)


def test_wavelengths_are_those_of_the_rotation():
    layer = attention_of(make_multi_image())[0]
    wavelengths = spectral.rotary_wavelengths(make_multi_image(), 0)
    content = np.ones((1, 1, 1, 8), "float32")
    start, turned = (
        to_numpy(layer._apply_rope(content, 0, positions=np.array([position])))
        for position in (0, wavelengths[1])
    )
    # The second pair has turned once. Captured pairs are adjacent features.
    np.testing.assert_allclose(turned[..., 2:4], start[..., 2:4], atol=1e-4)
    assert np.abs(turned - start).max() > 0.1


@pytest.mark.parametrize(
    "family",
    [
        small_models.gemma_3,
        small_models.gemma_4,
        small_models.qwen_3_5,
        small_models.llama,
        small_models.llama_3,
    ],
    ids=lambda family: family.__name__,
)
def test_wavelengths_of_other_families(family):
    model = family()
    layer = attention_layers(model)[-1]
    content = np.ones((1, 2, 1, layer.rotary_dim), "float32")
    one, other = np.split(to_numpy(layer.rotary(content))[0, 1, 0], 2)
    turns = np.arctan2(other - one, one + other) / (2 * np.pi)
    found = 1 / spectral.rotary_wavelengths(model)  # In turns per token.
    np.testing.assert_allclose(found, turns, atol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="reads the sizes off a jaxpr"
)
@pytest.mark.parametrize(
    "measure",
    [signal_of, shares_of, lambda rows: activation_of(rows, 0.5)],
    ids=["signal", "shares", "activations"],
)
def test_memory_is_linear(measure):
    import jax

    def largest(keys):
        rows = random_rows(keys)

        def from_tensors(query, key):
            attention = rows.attention._replace(query=query, key=key)
            return measure(rows._replace(attention=attention))

        jaxpr = jax.make_jaxpr(from_tensors)(
            rows.attention.query, rows.attention.key
        )
        return max(var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars)

    assert largest(4096) <= 2 * largest(2048)
