import dataclasses
import json
import pathlib
import re

import pytest

import keras_laid
from keras_laid.haystacks import LongContextQuestion
from keras_laid.haystacks import read_mm_niah
from keras_laid.haystacks.files import read_json_lines
from tests.bad_input.files_support import wrong
from tests.haystacks.long_context_support import PARAGRAPHS
from tests.haystacks.long_context_support import niah_entry
from tests.haystacks.long_context_support import write_lines

NAME = "retrieval-text.jsonl"
TASKS = [
    f"{task}-{needle}"
    for task in ("retrieval", "counting", "reasoning")
    for needle in ("text", "image")
]


def read(folder, *entries, task="retrieval-text"):
    return read_mm_niah(write_lines(folder / f"{task}.jsonl", *entries))


def test_a_question(tmp_path):
    (question,) = read(tmp_path, niah_entry(unknown=1))
    assert question == LongContextQuestion(
        id=0,
        task="retrieval-text",
        context="A park. <image> The tree is an oak.",
        question="Which tree?",
        choices=None,
        answer=("oak",),
        images=("obelics/1.jpg",),
        depths=(0.25,),
        length=1023,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        question.answer = "elm"


@pytest.mark.parametrize("task", TASKS)
def test_every_task(tmp_path, task):
    (question,) = read(tmp_path, niah_entry(task), task=task)
    assert question.task == task
    assert question.context.count("<image>") == 1


def test_choices_that_are_images_come_last(tmp_path):
    entry = niah_entry(
        "reasoning-image",
        question="Which is like <image>?",
        images_list=["1.jpg", "2.jpg"],
    )
    (question,) = read(tmp_path, entry, task="reasoning-image")
    assert question.choices == ("<image>", "<image>")
    assert question.images == ("1.jpg", "2.jpg", "a/a.jpg", "a/b.jpg")
    assert question.answer == 1


def test_choices_that_are_texts(tmp_path):
    meta = {"choices": ["left", "right"], "choices_image_path": None}
    entry = niah_entry("reasoning-image", meta=meta)
    (question,) = read(tmp_path, entry, task="reasoning-image")
    assert question.choices == ("left", "right")
    assert question.images == ("obelics/1.jpg",)


def test_depths_and_lists_in_strings(tmp_path):
    entry = niah_entry(
        "counting-text", answer="[0, 3]", meta={"placed_depth": [0, 1.0]}
    )
    (question,) = read(tmp_path, entry, task="counting-text")
    assert question.answer == (0, 3)
    assert question.depths == (0.0, 1.0)


def meta(**values):
    return niah_entry(meta=values)


CHOSEN = {"task": "retrieval-image"}
COUNTED = {"task": "counting-image"}
WRONG = [
    *(
        (f"no {key}", lambda key=key: _without(key), {}, f"lacks .*{key}")
        for key in ("id", "images_list", "context", "question", "meta")
    ),
    ("no depth", lambda: _without_meta("placed_depth"), {}, "lacks"),
    ("an id of 1.5", lambda: niah_entry(id=1.5), {}, "`id` must be of type"),
    ("an id of true", lambda: niah_entry(id=True), {}, "`id` must be of type"),
    ("a list of texts", lambda: niah_entry(context=[]), {}, "`context` must"),
    ("no question", lambda: niah_entry(question=" "), {}, "must not be empty"),
    ("a number", lambda: niah_entry(answer=2), {}, "`answer` must be of type"),
    ("no answer", lambda: niah_entry(answer=None), {}, "`answer` must be of"),
    ("an empty answer", lambda: niah_entry(answer=""), {}, "not empty"),
    (
        "an image too many",
        lambda: niah_entry(images_list=["1.jpg", "2.jpg"]),
        {},
        "Received: 1 for 2 images",
    ),
    (
        "an image too few",
        lambda: niah_entry(question="<image>?"),
        {},
        "Received: 2 for 1 images",
    ),
    (
        "a path that leaves the root",
        lambda: niah_entry(images_list=["../1.jpg"]),
        {},
        "must not leave its root",
    ),
    ("no path", lambda: niah_entry(images_list=[1]), {}, "path of an image"),
    (
        "a list",
        lambda: niah_entry() | {"meta": []},
        {},
        "`meta` must be of type dict",
    ),
    ("a depth of 2", lambda: meta(placed_depth=[0, 2]), {}, "in \\[0, 1\\]"),
    ("no depths", lambda: meta(placed_depth=[]), {}, "in \\[0, 1\\]"),
    ("a depth of true", lambda: meta(placed_depth=True), {}, "in \\[0, 1\\]"),
    ("a length of 0", lambda: meta(context_length=0), {}, "at least 1"),
    ("a length of 1.5", lambda: meta(context_length=1.5), {}, "of type int"),
    ("choices", lambda: meta(choices=["x"]), {}, "must have choices, and no"),
    (
        "no choices",
        lambda: niah_entry(
            "retrieval-image", answer=0, meta={"choices_image_path": None}
        ),
        CHOSEN,
        "with 0 choices",
    ),
    (
        "two kinds of choices",
        lambda: niah_entry("retrieval-image", meta={"choices": ["x", "y"]}),
        CHOSEN,
        "texts or images",
    ),
    *(
        (
            f"choice {answer}",
            lambda answer=answer: niah_entry("retrieval-image", answer=answer),
            CHOSEN,
            f"index of a choice, from 0. Received: {answer} with 2",
        )
        for answer in (-1, 2)
    ),
    (
        "a letter",
        lambda: niah_entry("retrieval-image", answer="A"),
        CHOSEN,
        "of type int",
    ),
    *(
        (
            f"counts {answer!r}",
            lambda answer=answer: niah_entry("counting-image", answer=answer),
            COUNTED,
            words,
        )
        for answer, words in (
            ([], "must not be empty"),
            ([1, -1], "at least 0"),
            ([1.0], "of type int"),
            (3, "of type list"),
            ("three", "a string that holds one in JSON"),
            ("3", "of type list"),
        )
    ),
]


def _without(key):
    entry = niah_entry()
    del entry[key]
    return entry


def _without_meta(key):
    entry = niah_entry()
    del entry["meta"][key]
    return entry


@pytest.mark.parametrize(
    "make, kwargs, words", [pytest.param(*row[1:], id=row[0]) for row in WRONG]
)
def test_entries_are_refused_by_their_line(tmp_path, make, kwargs, words):
    task = kwargs.get("task", "retrieval-text")
    entries = [niah_entry(task, id=7), make()]
    with pytest.raises(ValueError, match=words) as refused:
        read(tmp_path, *entries, task=task)
    assert f"{task}.jsonl, line 2" in str(refused.value)


def test_an_id_comes_once(tmp_path):
    with pytest.raises(ValueError, match="share an `id`.* 0 .*line 3"):
        read(tmp_path, niah_entry(), niah_entry(id=1), niah_entry())


CONTENTS = [
    wrong("nothing", b"\n", "at least one question"),
    wrong("a list", b"[]\n", "a line must be of type dict.*line 1"),
    wrong("half a line", b'{"id": 0', "whole JSON object.*line 1.*truncated"),
    wrong("Latin-1", b'{"id": "\xe9"}', "line 1, with this error: 'utf-8'"),
    wrong("a key twice", b'{"id": 0, "id": 1}', "line 1.*a key twice"),
    wrong("NaN", b'{"id": NaN}', "line 1.*not a number of JSON"),
    wrong("deep nesting", b'{"a":' * 99_999, "line 1.*recursion"),
]


@pytest.mark.parametrize("content, words, error", CONTENTS)
def test_files_are_refused(tmp_path, content, words, error):
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        read_mm_niah(path)


def test_blank_lines_count_and_are_skipped(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 2}')
    (_, one), (where, other) = read_json_lines(path)
    assert (one, other) == ({"a": 1}, {"b": 2})
    assert where == f"{path}, line 3"


@pytest.mark.parametrize(
    "name", ["questions.jsonl", "retrieval-text", "retrieval-text.json"]
)
def test_the_name_tells_the_task(tmp_path, name):
    path = write_lines(tmp_path / name, niah_entry())
    with pytest.raises(ValueError, match=f"tells the task.*'{name}'"):
        read_mm_niah(path)


def test_a_missing_file_and_a_number(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is not a file"):
        read_mm_niah(tmp_path / NAME)
    with pytest.raises(TypeError, match="`path` must be a path"):
        read_mm_niah(3)


def test_images_must_be_below_the_root(tmp_path):
    path = write_lines(tmp_path / NAME, niah_entry())
    root = tmp_path / "images"
    with pytest.raises(FileNotFoundError, match="line 1: Images must be below"):
        read_mm_niah(path, root)
    image = root / "obelics" / "1.jpg"
    image.parent.mkdir(parents=True)
    image.write_text("")
    assert len(read_mm_niah(path, root)) == 1
    image.unlink()
    image.symlink_to(path)
    with pytest.raises(ValueError, match="line 1: An image must not lie out"):
        read_mm_niah(path, root)


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = niah_entry("counting-image", answer=[1, 2])
    write_lines(tmp_path / "counting-image.jsonl", entry)
    haystack = {
        "id": "count-0",
        "ctxs": PARAGRAPHS,
        "question": "Count them.",
        "answer": [1, 2],
        "image_list": ["1.jpg"],
        "needle_image_list": ["2.jpg"],
    }
    haystack["question"] += " <image>"
    write_lines(tmp_path / "counting-image_test_K8_dep3.jsonl", haystack)
    readme = pathlib.Path(keras_laid.haystacks.__file__).parent / "README.md"
    section = readme.read_text().split("## Long documents")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {"keras_laid": keras_laid}
    exec(code, names)
    assert names["scores"].tolist() == [1.0]


def test_lines_are_json(tmp_path):
    path = write_lines(tmp_path / NAME, niah_entry(question="Wo steht «ß»?"))
    assert json.loads(path.read_text())["question"] == "Wo steht «ß»?"
    assert read_mm_niah(path)[0].question == "Wo steht «ß»?"
