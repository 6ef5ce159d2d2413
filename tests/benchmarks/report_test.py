"""Every number in the project's texts comes from rows or settings."""

import re

import numpy as np
import pytest

from benchmarks import rows
from benchmarks.markdown import fill
from benchmarks.markdown import marks
from benchmarks.report import ROOT
from benchmarks.report import TEXTS
from benchmarks.report import filled
from benchmarks.rows import only
from benchmarks.rows import read
from benchmarks.tables import make_tables
from benchmarks.window_extension import tables as study

NUMBER = re.compile(r"\d+\.\d+")
TABLE = re.compile(r"<!-- (\w+) -->(.*?)<!-- /\1 -->", re.DOTALL)
# Code, links, and versions that are part of a name.
NO_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|Qwen 3\.5|KerasHub \d\.\d+", re.DOTALL
)
# Numbers from no run: settings, the paper's numbers, versions and licences.
SETTINGS = {
    "README.md": "2.0 3.11 0.5",
    "benchmarks/window_extension.md": "0.5 3.2 0.3 0.1 0.05 0.03 0.01",
    "keras_laid/distillation/README.md": "0.03",
    "keras_laid/distill/README.md": "0.06",  # 1 / (2 * sqrt(64)).
    "keras_laid/haystacks/README.md": "4.0 0.5 0.25",
    "keras_laid/spectral/README.md": "0.67 0.05 0.25 0.5",
    "keras_laid/ops/attention_output/README.md": "4.5",
    "keras_laid/presets/digits_single_image/README.md": "0.5 0.001 4.0",
    "keras_laid/presets/digits_student/README.md": "0.5 0.001 4.0",
    "keras_laid/presets/digits_teacher/README.md": (
        "0.5 0.001 0.0007 0.0005 4.0"
    ),
}


def windows(method, column="window_after"):
    found = sorted(read("compare_methods", method=method), key=seed_of)
    return [float(row[column]) for row in found]


def seed_of(row):
    return int(row["seed"])


def ends(values):
    return min(values), max(values)


def fall_on_short_haystacks():
    return max(
        float(row[f"before_{size}"]) - float(row[f"after_{size}"])
        for row in read("compare_methods", method="guide")
        for size in study.SHORT
    )


def guide_and_stretched_labels():
    guide = windows("guide")
    stretched = windows("sft_stretched")
    return stretched[0], guide[0], stretched[1], guide[1]


def ratios_of_feeders():
    found = read("input_pipeline", feeder="py_dataset")
    return ends([float(row["ratio_to_prepared"]) for row in found])


def gpu(implementation, length, head_dim, backend="torch"):
    return only(
        "attention_divergence",
        backend=backend,
        implementation=implementation,
        length=length,
        head_dim=head_dim,
        dtype="bfloat16",
    )


def called_from_python():
    shapes = ((2048, 128), (2048, 256), (8192, 128), (8192, 256))
    return [
        float(gpu(name, *shape)["ms"])
        for shape in shapes
        for name in ("triton", "dot_product_attention")
    ]


def definition_on_a_gpu():
    numbers = []
    for head_dim in (128, 256):
        definition = gpu("definition", 8192, head_dim)
        milliseconds = float(definition["ms"])
        triton = float(gpu("triton", 8192, head_dim)["ms"])
        gibibytes = float(definition["peak_mib"]) / 1024
        numbers += [milliseconds, gibibytes, milliseconds / triton]
    return numbers


def mean_accuracy(config, method):
    runs = study.read_runs()[config][method].values()
    return np.array(
        [np.mean([run[size] for run in runs]) for size in study.SIZES]
    )


def laid_against_logits(config, laid, kd):
    return max(abs(mean_accuracy(config, laid) - mean_accuracy(config, kd)))


def gains_over_logits(method):
    gains = mean_accuracy("single_image", method)
    gains = gains - mean_accuracy("single_image", "logits")
    return [gains[study.SIZES.index(size)] for size in (5, 10, 20)]


def what_attention_matching_costs():
    return max(
        max(mean_accuracy("far_200", kd) - mean_accuracy("far_200", laid))
        for kd, laid in (("kd", "laid"), ("kd_stretched", "laid_stretched"))
    )


# Sentences outside of the tables, and functions that give their numbers.
SENTENCES = [
    (
        "benchmarks/window_extension.md",
        "accuracy at 1 to 5 images falls by at most {:.3f}.",
        fall_on_short_haystacks,
    ),
    (
        "benchmarks/window_extension.md",
        "Its window is {:.1f} to {:.1f} times longer than before",
        lambda: ends(windows("guide", "window_ratio")),
    ),
    (
        "benchmarks/window_extension.md",
        "reaches {:.1f} to {:.1f} times",
        lambda: ends(windows("sft", "window_ratio")),
    ),
    (
        "benchmarks/window_extension.md",
        "{:.0f} against {:.0f} images and {:.0f} against {:.0f}.",
        guide_and_stretched_labels,
    ),
    (
        "keras_laid/distillation/README.md",
        "takes {:.2f} to {:.2f} times as long as on batches made beforehand",
        ratios_of_feeders,
    ),
    (
        "keras_laid/ops/attention_divergence/README.md",
        "starting the kernels takes longer than they do at 2,048 ({:.1f} ms "
        "against {:.1f}, and {:.1f} against {:.1f}); at 8,192 it is {:.2f} ms "
        "against {:.2f}, and {:.2f} against {:.2f}.",
        called_from_python,
    ),
    (
        "keras_laid/ops/attention_divergence/README.md",
        "The definition takes {:.1f} ms and {:.0f} GiB at 8,192, {:.0f} times "
        "as long, and {:.1f} ms and {:.0f} GiB, {:.0f} times.",
        definition_on_a_gpu,
    ),
    (
        "benchmarks/window_extension.md",
        "LAid and KD with stretching differ by at most {:.3f} at every size.",
        lambda: laid_against_logits(
            "short_200", "laid_stretched", "kd_stretched"
        ),
    ),
    (
        "benchmarks/window_extension.md",
        "is above logits by {:.3f}, {:.3f} and {:.3f} at 5, 10 and 20 images",
        lambda: gains_over_logits("retrieval"),
    ),
    (
        "benchmarks/window_extension.md",
        "it is within {:.3f} of logits at these sizes",
        lambda: max(map(abs, gains_over_logits("last_layer"))),
    ),
    (
        "benchmarks/window_extension.md",
        "within {:.3f} of each other at every size.",
        lambda: laid_against_logits("unlabelled_200", "laid", "kd"),
    ),
    (
        "benchmarks/window_extension.md",
        "by up to {:.3f} beside KD in the same positions.",
        what_attention_matching_costs,
    ),
]


def in_one_line(text):
    return " ".join(text.split())


def texts_with_numbers():
    folders = (ROOT / "keras_laid").rglob("README.md")
    found = {str(path.relative_to(ROOT)) for path in folders}
    return sorted({*TEXTS, *found})


@pytest.fixture(scope="module")
def tables():
    return make_tables()


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_those_of_the_rows(name, tables):
    text = (ROOT / name).read_text()
    assert marks(text)
    assert filled(text, tables) == text


@pytest.mark.parametrize(
    "name, sentence, numbers", SENTENCES, ids=[each[1] for each in SENTENCES]
)
def test_sentences_are_those_of_the_rows(name, sentence, numbers):
    found = numbers()
    found = found if isinstance(found, tuple | list) else [found]
    text = in_one_line((ROOT / name).read_text())
    assert sentence.format(*found) in text


@pytest.mark.parametrize("name", texts_with_numbers())
def test_no_number_is_without_a_source(name):
    text = (ROOT / name).read_text()
    known = {*SETTINGS.get(name, "").split()}
    known |= {
        n for _, table in TABLE.findall(text) for n in NUMBER.findall(table)
    }
    prose = in_one_line(NO_PROSE.sub("", TABLE.sub("", text)))
    for path, sentence, _ in SENTENCES:
        if path == name:
            parts = map(re.escape, re.split(r"\{.*?\}", sentence))
            prose = re.sub(r"[\d.,]*\d".join(parts), "", prose)
    assert {*NUMBER.findall(prose)} <= known


def test_marks_are_filled_again_and_again():
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nafter"
    once = fill(text, "a", "new")
    assert once == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter"
    assert fill(once, "a", "new") == once
    with pytest.raises(ValueError, match="must have the marks"):
        fill(text, "b", "new")


def test_only_one_row_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.append_row(tmp_path / "a.csv", {"tokens": 4, "ms": 2.5})
    assert only("a", tokens=4)["ms"] == "2.5"
    rows.append_row(tmp_path / "a.csv", {"tokens": 4, "ms": 3.5})
    with pytest.raises(ValueError, match="Received: 2 rows"):
        only("a", tokens=4)
