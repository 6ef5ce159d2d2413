import dataclasses
import json
import os
import pathlib
import re
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_laid.haystacks import read_questions
from keras_laid.haystacks.files import image_path
from tests.support import coco_entry
from tests.support import make_coco

REPOSITORY = pathlib.Path(__file__).parents[2]
# `single_needle` and `multi_needle` of the benchmark.
BENCHMARK = pathlib.Path(
    os.environ.get(
        "VISUAL_HAYSTACKS", REPOSITORY.parent / "shared" / "data" / "vhs"
    )
)
NOT_RELATIVE = [
    "../val2017/1.jpg",
    "train2017/../../1.jpg",
    "/etc/passwd",
    "C:\\1.jpg",
    "./1.jpg",
    "train2017//1.jpg",
    "",
    "1.jpg\0",
]


def write(folder, *entries):
    path = folder / "questions.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.skipif(
    not BENCHMARK.is_dir(),
    reason="The benchmark's files are not there: name their folder in "
    "VISUAL_HAYSTACKS.",
)
@pytest.mark.parametrize(
    ("file", "count", "needles", "images"),
    [
        ("single_needle/visual_haystack_oracle.json", 100, {1}, 1),
        ("single_needle/visual_haystack_3.json", 100, {1}, 3),
        ("single_needle/visual_haystack_10.json", 100, {1}, 10),
        ("multi_needle/visual_haystack_5.json", 1000, {2, 3}, 5),
    ],
)
def test_the_published_files(file, count, needles, images):
    questions = read_questions(BENCHMARK / file)
    assert len(questions) == count
    for question in questions:
        assert len(question.pos_image) in needles
        assert len(question.pos_image + question.neg_image) == images
        assert question.needle in question.question
        assert question.target in question.question


def test_every_field_is_kept(tmp_path):
    entry = coco_entry(neg_image=["val2017/1.jpg", "val2017/2.jpg"])
    (question,) = read_questions(write(tmp_path, entry))
    assert question.question == entry["conversations"][0]["value"]
    assert question.answer == "yes"
    for key in ("id", "needle", "target"):
        assert getattr(question, key) == entry[key]
    assert question.pos_image == ("train2017/000000000003.jpg",)
    assert question.neg_image == ("val2017/1.jpg", "val2017/2.jpg")
    with pytest.raises(dataclasses.FrozenInstanceError):
        question.answer = "no"


def test_needles_are_found_after_shuffling(tmp_path):
    entry = coco_entry(
        pos_image=["a.jpg", "b.jpg"], neg_image=["c.jpg", "d.jpg", "e.jpg"]
    )
    (question,) = read_questions(write(tmp_path, entry))
    seen = set()
    for seed in range(200):
        haystack = question.haystack(np.random.default_rng(seed))
        assert sorted(haystack.images) == [f"{c}.jpg" for c in "abcde"]
        shown = [haystack.images[place] for place in haystack.needles]
        assert sorted(shown) == ["a.jpg", "b.jpg"]
        seen.add(haystack.needles)
    assert len(seen) == 10
    assert (haystack.anchor, haystack.target) == ("cat", "bus")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hint="x"), r"no other.*unknown \['hint'\] in .*json, entry 1"),
        (dict(id=7), "`id` must be of type str. Received: 7 of type int"),
        (dict(id=" "), "id must not be empty"),
        (dict(target=None), "`target` must be of type str.*NoneType"),
        (dict(needle=""), "needle must not be empty"),
        (dict(pos_image="a.jpg"), "`pos_image` must be of type list"),
        (dict(pos_image=[]), "at least one needle"),
        (dict(neg_image=[3]), "path of an image must be of type str"),
        (dict(neg_image=["a.jpg"] * 2), "each image once"),
        (dict(neg_image=["train2017/000000000003.jpg"]), "each image once"),
        (dict(conversations=[]), "a question and its answer. Received: 0"),
        (dict(conversations={}), "`conversations` must be of type list"),
        (dict(conversations=["a", "b"]), "The question must be of type dict"),
    ],
)
def test_entries_out_of_the_schema_are_refused(tmp_path, changes, words):
    path = write(tmp_path, coco_entry(), coco_entry(**changes))
    with pytest.raises(ValueError, match=words):
        read_questions(path)


@pytest.mark.parametrize("key", sorted(coco_entry()))
def test_missing_keys_are_refused(tmp_path, key):
    entry = coco_entry()
    del entry[key]
    with pytest.raises(ValueError, match=f"lacks .'{key}'. in .*entry 0"):
        read_questions(write(tmp_path, entry))


@pytest.mark.parametrize(
    ("turn", "changes", "words"),
    [
        (0, {"from": "gpt"}, "`from` must be one of .*'human', 'user'"),
        (0, {"value": ""}, "The question must not be empty"),
        (0, {"image": 1}, r"The question must have.*unknown \['image'\]"),
        (1, {"from": "human"}, r"`from` must be one of \('gpt',\)"),
        (1, {"value": "Yes"}, "The answer must be one of .*'Yes'"),
        (1, {"value": True}, "`value` must be of type str.*True"),
    ],
)
def test_turns_out_of_the_schema_are_refused(tmp_path, turn, changes, words):
    entry = coco_entry()
    entry["conversations"][turn].update(changes)
    with pytest.raises(ValueError, match=words):
        read_questions(write(tmp_path, entry))


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(tmp_path_factory, share):
    path = write(tmp_path_factory.mktemp("cut"), coco_entry(), coco_entry())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="whole JSON file.*truncated"):
        read_questions(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "at least one question"),
        (b"{}", "outermost value must be of type list"),
        (b"[3]", "An entry must be of type dict"),
        (b"\xff\xfe", "JSON file in UTF-8"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, words):
    path = tmp_path / "questions.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_questions(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        read_questions(tmp_path / "none.json")


@pytest.mark.parametrize("key", ["pos_image", "neg_image"])
@pytest.mark.parametrize("name", NOT_RELATIVE)
def test_paths_that_leave_the_root_are_refused(tmp_path, key, name):
    path = write(tmp_path, coco_entry(**{key: [name]}))
    with pytest.raises(ValueError, match="must be relative.*entry 0"):
        read_questions(path)


@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "", "inside", "inside.jpg", "/", "outside"])
        | st.text(string.printable, max_size=5),
        min_size=1,
        max_size=5,
    )
)
def test_no_path_reaches_a_file_outside(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("coco")
    root = folder / "root"
    (root / "inside").mkdir(parents=True)
    (root / "inside" / "inside.jpg").touch()
    (folder / "outside").touch()
    try:
        path = image_path(root, "/".join(parts))
    except (ValueError, FileNotFoundError):
        return
    assert path == (root / "inside" / "inside.jpg").resolve()


@pytest.mark.parametrize("linked", ["folder", "file"])
def test_links_that_leave_the_root_are_refused(tmp_path, linked):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "1.jpg").touch()
    if linked == "folder":
        (root / "train2017").symlink_to(elsewhere)
    else:
        (root / "train2017").mkdir()
        (root / "train2017/1.jpg").symlink_to(elsewhere / "1.jpg")
    with pytest.raises(ValueError, match="must not lie outside the root"):
        image_path(root, "train2017/1.jpg")


def test_links_within_the_root_are_followed(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").touch()
    (tmp_path / "train2017").symlink_to(tmp_path / "images")
    path = image_path(tmp_path, "train2017/1.jpg")
    assert path == (tmp_path / "images/1.jpg").resolve()


def test_missing_images_are_named(tmp_path):
    make_coco(tmp_path)
    there, missing = coco_entry(), coco_entry(neg_image=["val2017/9.jpg"])
    read_questions(write(tmp_path, there), root=tmp_path)
    path = write(tmp_path, there, missing)
    read_questions(path)  # This reads no images.
    with pytest.raises(FileNotFoundError, match=re.escape("val2017/9.jpg")):
        read_questions(path, root=tmp_path)
