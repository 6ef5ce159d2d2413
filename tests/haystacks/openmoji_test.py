import itertools
import pathlib
import sys

import numpy as np
import pytest

import keras_laid
from keras_laid.haystacks import OpenMoji
from keras_laid.haystacks import openmoji


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("icons")


@pytest.fixture(scope="module")
def sources(cache_dir):
    return [
        OpenMoji(split, image_size=64, cache_dir=cache_dir)
        for split in ("train", "validation", "test")
    ]


def test_names_are_many_and_different():
    names = list(openmoji.names_of_icons().values())
    assert len(names) == len(set(names)) >= 600
    for name in names:
        assert 1 <= len(name.split()) <= 6
        assert name.replace(" ", "").replace("-", "").isalpha()


def test_splits_share_no_name_and_no_icon(sources):
    assert [len(source.names) for source in sources] == [494, 30, 90]
    assert len(sources[0].names) > 300
    for one, other in itertools.combinations(sources, 2):
        assert not set(one.names) & set(other.names)
        drawings = [{icon.tobytes() for icon in s._icons} for s in (one, other)]
        assert not drawings[0] & drawings[1]
    drawings = np.concatenate([source._icons for source in sources])
    assert len({icon.tobytes() for icon in drawings}) == 614
    assert (drawings.std(axis=(1, 2, 3)) > 10).all()  # None is blank.


def test_names_are_those_of_the_icons(sources):
    def mean_color(name):
        (source,) = (s for s in sources if name in s.names)
        icon = source._icons[source.names.index(name)].astype("float32")
        colored = icon[icon.std(axis=-1) > 20]
        return colored.mean(axis=0)

    # Red, green and blue, of things that have one colour.
    for name, channel in (("tomato", 0), ("frog", 1), ("whale", 2)):
        assert mean_color(name).argmax() == channel


def test_images_show_two_icons_of_the_right_kind(sources):
    source = sources[2]
    pairs = np.array([[7, 3], [0, 89], [3, 7]])
    images = source.render(pairs, np.random.default_rng(0))
    assert images.shape == (3, 64, 64, 3)
    assert images.dtype == np.uint8
    for image, pair in zip(images, pairs, strict=True):
        cells = image.reshape(2, 32, 2, 32, 3).transpose(0, 2, 1, 3, 4)
        cells = cells.reshape(4, 32, 32, 3)
        shown = [cell for cell in cells if (cell < 255).any()]
        assert len(shown) == 2
        found = {
            number
            for number, icon in enumerate(source._icons)
            for cell in shown
            if (cell == icon).all()
        }
        assert found == set(pair)


def test_icons_are_drawn_once(cache_dir, sources, monkeypatch):
    def refuse(path, side):
        raise AssertionError("Icons were drawn again.")

    monkeypatch.setattr(openmoji, "_raster", refuse)
    again = OpenMoji("train", image_size=64, cache_dir=cache_dir)
    np.testing.assert_array_equal(again._icons, sources[0]._icons)
    with pytest.raises(AssertionError, match="drawn again"):
        # Another size needs another file.
        OpenMoji("train", image_size=32, cache_dir=cache_dir)


def test_the_default_cache_is_that_of_tensorflow_datasets(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    OpenMoji("test", image_size=32)
    (file,) = (tmp_path / "downloads").iterdir()
    assert file.name.startswith("openmoji-16px-")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r'pip install "keras-laid\[haystack'):
        OpenMoji("test", cache_dir=tmp_path)


def test_licence_and_attribution_are_stated():
    package = pathlib.Path(keras_laid.__file__).parent
    notice = (package / "haystacks/LICENSE-openmoji").read_text()
    root = pathlib.Path(__file__).parents[2]
    readme = (root / "keras_laid/haystacks/README.md").read_text()
    for text in (openmoji.ATTRIBUTION, OpenMoji.__doc__, notice, readme):
        assert "All emojis designed by OpenMoji" in text
        assert "CC BY-SA 4.0" in text


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(split="dev"), r"`split` must be one of .*split='dev'"),
        (dict(split="test", image_size=33), "even number.*image_size=33"),
        (dict(split="test", image_size=30), "at least 32.*image_size=30"),
    ],
)
def test_bad_arguments_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        OpenMoji(**kwargs)
