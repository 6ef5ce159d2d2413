import pytest

from keras_laid.haystacks import LongContextQuestion
from keras_laid.haystacks import read_mm_long_bench
from tests.haystacks.long_context_support import ANSWERS
from tests.haystacks.long_context_support import long_bench_entry
from tests.haystacks.long_context_support import write_lines


def read(folder, *entries, task="vh_single", name="{}_test_K8_dep3.jsonl"):
    path = write_lines(folder / name.format(task), *entries)
    return read_mm_long_bench(path)


def test_visual_haystacks(tmp_path):
    name = "vh_multi_test_1000_K128_dep3.jsonl"
    (question,) = read(tmp_path, long_bench_entry(depth=0.2), name=name)
    assert question == LongContextQuestion(
        id="x1",
        task="vh_multi",
        context="<image>\n<image>",
        question="For the image with a cat, is there a dog?",
        choices=None,
        answer="yes",
        images=("coco/1.jpg", "coco/2.jpg"),
        depths=(0.2,),
        length=131072,
    )


@pytest.mark.parametrize("task", ANSWERS)
def test_mm_niah(tmp_path, task):
    (question,) = read(tmp_path, long_bench_entry(task), task=task)
    assert (question.task, question.length) == (task, 8192)
    assert question.context == "A park.\n\n<image>"
    assert question.depths == ()
    further = {
        "counting-image": ("mm-niah/2.jpg",),
        "retrieval-image": ("a/a.jpg", "a/b.jpg"),
        "reasoning-image": ("a/a.jpg", "a/b.jpg"),
    }.get(task, ())
    assert question.images == ("mm-niah/1.jpg", *further)
    has_choices = task in ("retrieval-image", "reasoning-image")
    assert question.choices == (("<image>",) * 2 if has_choices else None)


def test_several_answers(tmp_path):
    entry = long_bench_entry("retrieval-text", answer=["oak", "an oak tree"])
    (question,) = read(tmp_path, entry, task="retrieval-text")
    assert question.answer == ("oak", "an oak tree")


def test_an_id_comes_once_at_each_depth(tmp_path):
    entries = [long_bench_entry(depth=depth) for depth in (0, 0.5, 1)]
    assert len(read(tmp_path, *entries)) == 3
    assert len(read(tmp_path, *[long_bench_entry()] * 3)) == 3
    with pytest.raises(ValueError, match=r"'x1' with depth \(1.0,\).*line 3"):
        read(tmp_path, *entries[1:], entries[2])
    with pytest.raises(ValueError, match="At most 3 entries.*line 4"):
        read(tmp_path, *entries, long_bench_entry(depth=0.7))


WRONG = [
    ("vh_single", {"answer": "maybe"}, "one of .*'maybe'"),
    ("vh_single", {"answer": 1}, "`answer` must be of type str"),
    ("vh_single", {"ctxs": []}, "`ctxs` must not be empty"),
    ("vh_single", {"ctxs": [{"text": "x"}]}, "`ctxs` must be of type str"),
    ("vh_single", {"ctxs": ["/1.jpg"]}, "must not leave its root"),
    ("vh_single", {"question": "<image>?"}, "Received: 3 for 2 images"),
    ("vh_single", {"depth": "middle"}, r"in \[0, 1\]"),
    ("vh_single", {"depth": None}, r"in \[0, 1\]"),
    ("vh_single", {"id": None}, "`id` must be of type str"),
    ("counting-text", {"ctxs": ["text"]}, "`ctxs` must be of type dict"),
    ("counting-text", {"ctxs": [{"type": "x"}]}, "lacks .'text'"),
    ("counting-text", {"ctxs": [{"text": 1}]}, "`text` must be of type str"),
    ("counting-text", {"answer": "[1, 2]"}, "`answer` must be of type list"),
    ("counting-text", {"image_list": "1.jpg"}, "of type list"),
    ("counting-image", {"needle_image_list": []}, "must not be empty"),
    ("retrieval-text", {"answer": [["oak"]]}, "of type str"),
    ("retrieval-image", {"answer": 2}, "2 with 2 choices"),
    ("retrieval-image", {"choices_image": ["../a"]}, "1 with 1 choices"),
]


@pytest.mark.parametrize("task, values, words", WRONG)
def test_entries_are_refused_by_their_line(tmp_path, task, values, words):
    entries = [long_bench_entry(task), long_bench_entry(task, **values)]
    with pytest.raises(ValueError, match=words) as refused:
        read(tmp_path, *entries, task=task)
    assert f"{task}_test_K8_dep3.jsonl, line 2" in str(refused.value)


@pytest.mark.parametrize(
    "task, key",
    [
        ("vh_single", "ctxs"),
        ("retrieval-text", "image_list"),
        ("counting-image", "needle_image_list"),
        ("reasoning-image", "choices_image"),
    ],
)
def test_keys_that_are_needed(tmp_path, task, key):
    entry = long_bench_entry(task)
    del entry[key]
    with pytest.raises(ValueError, match=f"lacks .'{key}'.*line 1"):
        read(tmp_path, entry, task=task)


@pytest.mark.parametrize(
    "name",
    [
        "vh_single.jsonl",
        "vh_single_test_K8_dep3.json",
        "vh_double_test_K8_dep3.jsonl",
        "infoseek_K8_dep3.jsonl",
    ],
)
def test_the_name_tells_task_and_length(tmp_path, name):
    with pytest.raises(ValueError, match=f"tells the task.*'{name}'"):
        read(tmp_path, long_bench_entry(), name=name)


def test_images_must_be_below_the_root(tmp_path):
    name = "vh_single_test_1000_K8_dep6.jsonl"
    path = write_lines(tmp_path / name, long_bench_entry())
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_text("")
    with pytest.raises(FileNotFoundError, match="line 1: .*coco/2.jpg"):
        read_mm_long_bench(path, tmp_path)
    (tmp_path / "coco" / "2.jpg").write_text("")
    assert len(read_mm_long_bench(path, tmp_path)) == 1
