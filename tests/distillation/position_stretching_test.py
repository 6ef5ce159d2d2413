import numpy as np
import pytest

from keras_laid import PositionStretching


def test_images_are_whole_sorted_and_before_the_text():
    stretching = PositionStretching(max_images=30, image_length=4)
    positions = stretching.positions(64, 5, 7, np.random.default_rng(0))
    assert positions.shape == (64, 27)
    assert positions.dtype == np.int32
    images = positions[:, :20].reshape(64, 5, 4)
    assert (images[..., 0] % 4 == 0).all()
    np.testing.assert_array_equal(
        images, images[..., :1] + np.arange(4)[None, None]
    )
    assert (np.diff(images[..., 0], axis=1) > 0).all()
    text = positions[:, 20:]
    assert (text[:, 0] > images[:, -1, -1]).all()
    np.testing.assert_array_equal(text, text[:, :1] + np.arange(7))


def test_windows_range_from_the_prompts_own_to_the_longest():
    stretching = PositionStretching(max_images=8, image_length=1)
    positions = stretching.positions(2000, 3, 1, np.random.default_rng(0))
    windows, counts = np.unique(positions[:, -1], return_counts=True)
    np.testing.assert_array_equal(windows, np.arange(3, 9))
    assert counts.min() > 0.8 * 2000 / 6
    shortest = positions[positions[:, -1] == 3]
    np.testing.assert_array_equal(
        shortest, np.tile(np.arange(4), (len(shortest), 1))
    )
    used = np.unique(positions[positions[:, -1] == 8][:, :3])
    np.testing.assert_array_equal(used, np.arange(8))


@pytest.mark.parametrize("name", ["max_images", "image_length"])
def test_bad_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        PositionStretching(**{"max_images": 2, "image_length": 2, name: 0})


def test_too_many_images_are_refused():
    with pytest.raises(ValueError, match="images=3, max_images=2"):
        PositionStretching(2, 4).positions(1, 3, 5, np.random.default_rng(0))


def test_images_among_text():
    stretching = PositionStretching(max_images=6, image_length=5)
    #                 b  <  i  i  >  t  <  i  i  >  <  i  i  >  q  q
    mask = np.array([[0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]] * 50)
    mask[0] = 0
    found = stretching.positions_in_text(mask, np.random.default_rng(0), 1)
    assert found.dtype == "int32"
    np.testing.assert_array_equal(found[0], np.arange(16))
    moved = (found - np.arange(16))[1:]
    assert (moved[:, 0] == 0).all() and (moved % 5 == 0).all()
    for with_marks, text in ((slice(1, 5), 5), (slice(6, 10), None)):
        assert (np.ptp(moved[:, with_marks], axis=1) == 0).all()
        if text:
            np.testing.assert_array_equal(moved[:, text], moved[:, text - 1])
    assert (np.ptp(moved[:, 10:14], axis=1) == 0).all()
    assert (np.ptp(moved[:, 14:], axis=1) == 0).all()
    assert (np.diff(moved, axis=1) >= 0).all()
    # Every window is drawn, from the prompt's own to the longest.
    assert set(moved[:, -1]) == {0, 5, 10, 15}
    with pytest.raises(ValueError, match="at most.*images=3, max_images=2"):
        PositionStretching(2, 5).positions_in_text(
            mask, np.random.default_rng(0)
        )
