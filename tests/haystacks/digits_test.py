import itertools

import numpy as np
import pytest

from keras_laid import Digits


def test_splits_share_no_drawing():
    drawings = {
        split: [d.tobytes() for digit in Digits(split)._drawings for d in digit]
        for split in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(drawings.values(), 2):
        assert not set(one) & set(other)
    counts = np.array([len(each) for each in drawings.values()])
    assert counts.sum() == 1797  # The whole data set.
    np.testing.assert_allclose(counts / 1797, [0.8, 0.05, 0.15], atol=0.01)


def test_images_show_two_digits_of_the_right_kind():
    source = Digits("test", image_size=32)
    pairs = np.array([[7, 3], [0, 9], [3, 7]])
    images = source.render(pairs, np.random.default_rng(0))
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.uint8
    for image, pair in zip(images, pairs, strict=True):
        small = image[::2, ::2, 0]
        cells = small.reshape(2, 8, 2, 8).transpose(0, 2, 1, 3).reshape(4, 8, 8)
        shown = [cell for cell in cells if cell.any()]
        found = {
            digit
            for digit, drawings in enumerate(source._drawings)
            for cell in shown
            if (drawings == cell).all(axis=(1, 2)).any()
        }
        assert found == set(pair)


def test_augmented_drawings_are_near_the_plain_ones():
    pairs = np.array([[1, 2]] * 50)
    plain, augmented = (
        Digits("train", augment=augment).render(pairs, np.random.default_rng(0))
        for augment in (False, True)
    )
    assert augmented.dtype == np.uint8
    brightness = augmented.mean(axis=(1, 2, 3)) / plain.mean(axis=(1, 2, 3))
    assert (brightness < 1.0).all()
    assert (brightness > 0.55).all()
    for one, other in zip(plain, augmented, strict=True):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert 0.85 < correlation < 1.0


def test_same_seed_same_images():
    source, pairs = Digits("train"), np.array([[1, 2]] * 9)
    one, two, other = (
        source.render(pairs, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(split="dev"), r"`split` must be one of .*split='dev'"),
        (dict(split="test", image_size=24), "multiple of 16.*image_size=24"),
        (dict(split="test", image_size=0), "image_size=0"),
    ],
)
def test_bad_arguments_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Digits(**kwargs)
