import numpy as np
import pytest

from keras_laid import spectral
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.spectral.attention_mass import signal_of
from tests.spectral.planted import attending
from tests.spectral.planted import planted
from tests.support import PALI_GEMMA_2
from tests.support import attention_of
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import to_numpy

LENGTH = 64
DISTANCE = np.arange(LENGTH)


def cosines(*frequencies):
    """Attention that rises and falls over distance at these frequencies."""
    waves = [np.cos(2 * np.pi * f * DISTANCE) for f in frequencies]
    return (1 + 0.4 * np.sum(waves, axis=0)) / LENGTH


def make_batch(images=6):
    return make_haystacks(make_preprocessor(), sizes=(images,))[0][0]


@pytest.mark.parametrize("length", [2, 7, 64, 101])
def test_energies_add_up_to_that_of_the_signal(length):
    signal = np.random.default_rng(0).normal(size=(2, 3, length))
    frequency, power = spectral.power_spectrum(signal)
    assert power.shape == (2, 3, len(frequency))
    np.testing.assert_allclose(power.sum(-1), (signal**2).sum(-1))


def test_planted_frequencies_are_found_in_attention():
    shares = np.stack([cosines(4 / LENGTH), cosines(9 / LENGTH, 20 / LENGTH)])
    # Keys are in order of the sequence: the farthest comes first.
    rows = attending(shares[None, :, ::-1])
    signal = to_numpy(signal_of(rows))
    np.testing.assert_allclose(signal[0], shares, atol=1e-6)
    _, power = spectral.power_spectrum(signal)
    power = power[0, :, 1:]
    assert np.flatnonzero(power[0] > 0.01 * power[0].max()).tolist() == [3]
    assert np.flatnonzero(power[1] > 0.01 * power[1].max()).tolist() == [8, 19]


def test_low_frequency_share_of_what_is_known():
    needle = np.eye(LENGTH)[17]
    decay = np.exp(-DISTANCE / LENGTH)
    two = cosines(2 / LENGTH, 30 / LENGTH)
    share = spectral.low_frequency_share([needle, decay, two], 0.125)
    white = 2 * 8 / (LENGTH - 1)
    np.testing.assert_allclose(share[[0, 2]], [white, 0.5])
    assert share[1] > 0.9


def test_constant_signal_has_no_share():
    even = np.full(LENGTH, np.float32(1 / LENGTH))
    rounded = even * (1 + 6e-8 * np.resize([0, 1], LENGTH))
    assert np.isnan(spectral.low_frequency_share([even, rounded], 0.1)).all()


def test_agreement_is_band_by_band():
    one = cosines(3 / LENGTH, 20 / LENGTH)
    other = 7 * cosines(3 / LENGTH)
    other = other - 2 * np.cos(2 * np.pi * 20 / LENGTH * DISTANCE)
    bands = (0.0, 0.1, 0.4)
    found = spectral.signal_agreement([one, one], [one, other], bands)
    np.testing.assert_allclose(found, [[1.0, 1.0], [1.0, -1.0]], atol=1e-9)
    found = spectral.signal_agreement(one, one - 10.0, bands)
    np.testing.assert_allclose(found, [1.0, 1.0], atol=1e-9)
    shifted = np.cos(2 * np.pi * 3 / LENGTH * DISTANCE + np.pi / 2)
    found = spectral.signal_agreement(cosines(3 / LENGTH), shifted, (0, 0.1))
    np.testing.assert_allclose(found, [0.0], atol=1e-9)


def test_band_without_energy_has_no_agreement():
    wave = cosines(3 / LENGTH)
    found = spectral.signal_agreement(wave, wave, (0.0, 0.1, 0.5))
    np.testing.assert_array_equal(np.isnan(found), [False, True])


@pytest.mark.parametrize("heads", ["mean", "best"])
def test_model_agrees_with_itself(heads):
    model = make_multi_image(vocabulary_size=60)
    bands = (0.0, 0.1, 0.3, 0.5)
    layers = dict(teacher_layers=(0, 1), student_layers=range(2))
    found = spectral.band_agreement(
        model, model, make_batch(), bands, heads=heads, **layers
    )
    np.testing.assert_allclose(found, np.ones((4, 3)), atol=1e-6)


def test_best_match_ignores_the_order_of_heads():
    model = make_multi_image(vocabulary_size=60, num_query_heads=4)
    other = make_multi_image(vocabulary_size=60, num_query_heads=4)
    last = attention_of(other)[-1].query_dense
    last.kernel.assign(np.asarray(to_numpy(last.kernel))[[2, 0, 3, 1]])
    found = spectral.band_agreement(
        model, other, make_batch(), (0.0, 0.2, 0.5), heads="best"
    )
    np.testing.assert_allclose(found, np.ones((4, 2)), atol=1e-5)


def test_signal_is_that_of_whole_maps():
    model = make_multi_image(vocabulary_size=60)
    batch = make_batch(images=5)
    with captured_attention(model, (0,)) as captured:
        model(batch)
    logits = to_numpy(captured[0].logits())
    prompt = (batch["padding_mask"] - batch["response_mask"]).astype(bool)
    keys = np.concatenate([np.ones((4, 20), bool), prompt], axis=1)
    maps = np.exp(logits) * keys[:, None, None]
    maps = maps / maps.sum(axis=-1, keepdims=True)
    expected = [
        example_maps[:, 20:][:, rows].mean(axis=1)[:, 19::-1]
        for example_maps, rows in zip(maps, prompt, strict=True)
    ]
    found = spectral.attention_by_distance(model, batch, (0,))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    found = spectral.attention_by_distance(model, batch, (0,), per="image")
    by_image = np.reshape(expected, (4, 2, 5, 4)).sum(axis=-1)
    np.testing.assert_allclose(found[:, 0], by_image, rtol=1e-4)


def test_rotary_frequency_shows_at_its_wavelength():
    """The query and key are constant and use only one pair of features."""
    layer = attention_of(make_multi_image(head_dim=16))[0]
    wavelengths = spectral.rotary_wavelengths(make_multi_image(head_dim=16))
    for pair in (1, 2):
        content = np.zeros((1, 200, 1, 16), "float32")
        content[..., [pair, pair + 8]] = 0.3
        key = to_numpy(layer._apply_rope(content, 0))
        rows = planted(key[:, -1], key)
        frequency, power = spectral.power_spectrum(to_numpy(signal_of(rows)))
        peak = frequency[1 + np.argmax(power[0, 0, 1:])]
        assert abs(peak - 1 / wavelengths[pair]) <= 1 / 200


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("two distances or more", lambda: spectral.power_spectrum([1.0])),
        (
            "`cutoff` must be in",
            lambda: spectral.low_frequency_share(np.ones(8), 0.1),
        ),
        (
            "as many distances",
            lambda: spectral.signal_agreement(
                np.ones(8), np.ones(9), (0.0, 0.5)
            ),
        ),
        (
            "must hold a frequency",
            lambda: spectral.signal_agreement(
                np.ones(8), np.ones(8), (0.0, 0.1)
            ),
        ),
        (
            "`heads` must be one of",
            lambda: spectral.band_agreement(None, None, {}, (), heads="all"),
        ),
        (
            "`per` must be one of",
            lambda: spectral.attention_by_distance(None, {}, per="patch"),
        ),
        (
            "must have no positions",
            lambda: spectral.attention_by_distance(None, {"positions": 0}),
        ),
    ],
)
def test_refuses(words, call):
    with pytest.raises(ValueError, match=words):
        call()


def test_refuses_layers_without_full_attention():
    model = make_multi_image(PALI_GEMMA_2)
    with pytest.raises(ValueError, match="full attention are \\[1, 3\\]"):
        spectral.attention_by_distance(model, make_batch(), (0, 1))
    for layers in ((), (4,), (-5,)):
        with pytest.raises(ValueError, match="the model's 4 decoder layers"):
            spectral.frequency_shares(model, make_batch(), layers)
