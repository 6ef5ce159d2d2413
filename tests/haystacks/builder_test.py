import json
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

import keras_laid.haystacks
from keras_laid.haystacks import HaystackConfig
from keras_laid.haystacks import VisualHaystacks
from tests.support import COCO
from tests.support import make_coco

FEW = {"train": 6, "validation": 2, "test": 4}
ORACLE = "single_needle_visual_haystack_oracle"
ON_JAX = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="The same on every backend."
)


class BuilderTest(tfds.testing.DatasetBuilderTestCase):
    """Base of the following, each for one source."""

    __test__ = False
    DATASET_CLASS = VisualHaystacks
    SPLITS = FEW

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.EXAMPLE_DIR = folder.name
        cls.fill(pathlib.Path(folder.name))
        super().setUpClass()

    @classmethod
    def fill(cls, folder):
        (folder / "nothing").touch()


class DigitsTest(BuilderTest):
    __test__ = True
    BUILDER_CONFIG_NAMES_TO_TEST = [
        HaystackConfig(sizes=(1, 3), num_questions=FEW),
        HaystackConfig(sizes=(4, 6), needles=(2, 3), num_questions=FEW),
    ]


class OpenMojiTest(BuilderTest):
    __test__ = True
    BUILDER_CONFIG_NAMES_TO_TEST = [
        HaystackConfig(
            source="openmoji", sizes=(1, 3), image_size=32, num_questions=FEW
        )
    ]


class CocoTest(BuilderTest):
    __test__ = True
    SPLITS = {**FEW, ORACLE: 1}
    BUILDER_CONFIG_NAMES_TO_TEST = [
        HaystackConfig(
            source="coco", sizes=(1, 2), image_size=32, num_questions=FEW
        )
    ]

    @classmethod
    def fill(cls, folder):
        make_coco(folder)


def load(data_dir, manual_dir=None, **config):
    """The splits of a config, without TensorFlow, as lists of examples."""
    config = HaystackConfig(num_questions=FEW, **config)
    builder = tfds.builder(
        "visual_haystacks",
        data_dir=data_dir,
        config=config,
        file_format="array_record",
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=manual_dir and str(manual_dir)
        )
    )
    sources = builder.as_data_source()
    return {split: list(sources[split]) for split in sources}


def texts(example, key):
    return [text.decode() for text in example[key]]


def test_ten_photographs_and_a_question_file(tmp_path):
    root = tmp_path / "coco"
    make_coco(root)
    splits = load(tmp_path, root, source="coco", sizes=(1, 2), image_size=32)
    used = {
        split: {path for e in examples for path in texts(e, "paths")}
        for split, examples in splits.items()
    }
    assert used[ORACLE] == {"train2017/000000000003.jpg"}
    together = [path for paths in used.values() for path in paths]
    assert len(together) == len(set(together))
    for examples in splits.values():
        answers = [example["answer"] for example in examples]
        for example in examples:
            paths = texts(example, "paths")
            assert np.shape(example["images"]) == (len(paths), 32, 32, 3)
            shown = [COCO[p.split("/")[0]][int(p[-16:-4])] for p in paths]
            anchor = example["anchor"].decode()
            (needle,) = (i for i, s in enumerate(shown) if anchor in s)
            assert list(example["needles"]) == [needle]
            truth = example["target"].decode() in shown[needle]
            assert example["answer"] == (b"yes" if truth else b"no")
        if len(examples) > 1:
            assert answers.count(b"yes") == len(examples) // 2
    (published,) = splits[ORACLE]
    assert published["id"] == b"VKJ5QTnAcX"
    assert published["question"] == b"For the image with a cat, is there a bus?"


def test_stored_haystacks_are_those_that_are_drawn(tmp_path):
    splits = load(tmp_path, sizes=(2, 5), image_size=32)
    for number, (split, count) in enumerate(FEW.items()):
        drawn = keras_laid.haystacks.draw_haystacks(
            keras_laid.Digits(split, image_size=32),
            count,
            sizes=(2, 5),
            seed=(0, number),
        )
        stored = {int(example["id"]): example for example in splits[split]}
        for index, haystack in enumerate(drawn):
            example = stored[index]
            np.testing.assert_array_equal(example["images"], haystack.images)
            assert example["question"].decode() == haystack.question
            assert example["answer"].decode() == haystack.answer
            assert tuple(example["needles"]) == haystack.needles


def test_coco_without_a_root_says_what_it_needs(tmp_path):
    with pytest.raises(AssertionError, match="the root of COCO 2017"):
        load(tmp_path, source="coco")


def test_a_bad_question_file_stops_the_preparation(tmp_path):
    root = tmp_path / "coco"
    make_coco(root)
    path = root / "questions/single_needle/visual_haystack_oracle.json"
    (entry,) = json.loads(path.read_text())
    path.write_text(json.dumps([{**entry, "pos_image": ["../secret.jpg"]}]))
    with pytest.raises(ValueError, match="must be relative"):
        load(tmp_path, root, source="coco", sizes=(1,), image_size=32)


@pytest.mark.parametrize(
    "name", ["test.json", "single_needle_visual_haystack_oracle.json"]
)
def test_a_second_split_of_a_name_is_refused(tmp_path, name):
    root = tmp_path / "coco"
    make_coco(root)
    (root / "questions" / name).write_text("[]")
    with pytest.raises(ValueError, match="names of their own.*Rename it"):
        load(tmp_path, root, source="coco", sizes=(1,), image_size=32)


def test_configs_are_listed():
    assert "visual_haystacks" in tfds.list_builders()
    configs = VisualHaystacks.builder_configs
    assert list(configs) == [
        "digits",
        "digits_multi",
        "openmoji",
        "openmoji_multi",
        "coco",
        "coco_multi",
    ]
    assert configs["digits"].sizes[0] == 1
    assert configs["digits"].sizes[-1] == 150


def test_different_configs_have_different_folders():
    changes = [
        {},
        dict(source="openmoji"),
        dict(sizes=(1, 200)),
        dict(needles=(1, 2)),
        dict(image_size=32),
        dict(num_questions={"test": 9}),
        dict(seed=1),
    ]
    assert len({HaystackConfig(**c).name for c in changes}) == len(changes)


def test_licences_are_stated(tmp_path):
    info = tfds.builder("visual_haystacks/openmoji", data_dir=tmp_path).info
    assert "All emojis designed by OpenMoji" in info.description
    assert "CC BY-SA 4.0" in info.redistribution_info.license


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(source="mnist"), "`source` must be one of.*source='mnist'"),
        (dict(num_questions={"dev": 3}), r"splits must be among.*\['dev'\]"),
    ],
)
def test_bad_configs_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        HaystackConfig(**kwargs)


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@ON_JAX
@pytest.mark.parametrize(
    "imports",
    [
        "import keras_laid.haystacks\n"
        # It takes long to import, so only those who need it import it.
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "import tensorflow_datasets as tfds\n",
        "import tensorflow_datasets as tfds\nimport keras_laid.haystacks\n",
        "from keras_laid.haystacks import VisualHaystacks\n"
        "import tensorflow_datasets as tfds\n",
    ],
    ids=["before", "after", "by name"],
)
def test_importing_the_package_registers_the_dataset(tmp_path, imports):
    output = run_python(
        f"import sys\n{imports}"
        "info = tfds.builder('visual_haystacks/digits',"
        f" data_dir={str(tmp_path)!r}).info\n"
        "print(info.full_name, 'visual_haystacks' in tfds.list_builders())\n"
    )
    assert output.endswith("visual_haystacks/digits/1.0.0 True\n")


@ON_JAX
def test_load(tmp_path):
    data = tfds.load("visual_haystacks/digits", data_dir=tmp_path)
    assert {split: len(data[split]) for split in data} == {
        "train": 1600,
        "validation": 160,
        "test": 800,
    }
    (example,) = data["test"].take(1).as_numpy_iterator()
    assert example["images"].shape[1:] == (16, 16, 3)


@ON_JAX
def test_without_tensorflow_datasets_the_builder_says_what_to_install():
    output = run_python(
        "import sys\n"
        "sys.modules['tensorflow_datasets'] = None\n"
        "import keras_laid.haystacks\n"
        "try:\n"
        "    keras_laid.haystacks.VisualHaystacks\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert 'Run `pip install "keras-laid[haystacks]"`.' in output
