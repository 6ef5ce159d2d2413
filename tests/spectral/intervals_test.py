import numpy as np
import pytest

from keras_laid import spectral


def test_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(size=(400, 2)) + [3.0, 5.0]
    mean, low, high = spectral.mean_with_interval(values)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    expected = 1.96 * values.std(axis=0) / np.sqrt(400)
    np.testing.assert_allclose(high - mean, expected, rtol=0.1)
    np.testing.assert_allclose(mean - low, expected, rtol=0.1)


def test_seed_and_confidence():
    values = np.random.default_rng(1).normal(size=50)
    first, again, wider = (
        spectral.mean_with_interval(values, **arguments)
        for arguments in ({}, {}, dict(confidence=0.99))
    )
    assert first == again
    assert wider.low < first.low < first.high < wider.high
    assert spectral.mean_with_interval(values, seed=1) != first


@pytest.mark.parametrize(
    ("words", "values", "arguments"),
    [
        ("two examples or more", [1.0], {}),
        ("two examples or more", 1.0, {}),
        ("1 of 2 that are not", [1.0, np.nan], {}),
        ("`confidence` must be in", [1.0, 2.0], dict(confidence=95)),
    ],
)
def test_refuses(words, values, arguments):
    with pytest.raises(ValueError, match=words):
        spectral.mean_with_interval(values, **arguments)
