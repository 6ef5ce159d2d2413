"""Runs the guide, and what it is compared with, on several seeds.

    KERAS_BACKEND=jax python -m benchmarks.guide_runs

Appends one row a run to `benchmarks/results/guide_runs.csv`: arguments,
accuracy by haystack size before and after, effective windows, commit, machine
and versions. Runs that already have a row are skipped, so that the script can
be stopped and started again. `compare_methods.csv` holds rows of an earlier
version of the guide, which matched the last layer.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys

from benchmarks import rows
from benchmarks.markdown import markdown_table
from benchmarks.window_extension.tables import SIZES

PATH = rows.RESULTS / "guide_runs.csv"
GUIDE = pathlib.Path(__file__).parent.parent / "guides" / "distill_paligemma.py"
# `--compare` also trains on logits alone; labels alone are a separate run.
METHODS = {
    "guide": ["--compare"],
    "labels": [
        "--retrieval-weight=0",
        "--logits-weight=0",
        "--supervised-weight=1",
        "--no-gains",
    ],
}


def arguments(method, seed):
    return [*METHODS[method], f"--seed={seed}"]


def run(method, seed, output):
    """Runs the guide once; returns its row."""
    ran_at = rows.commit()
    subprocess.run(
        [
            sys.executable,
            str(GUIDE),
            *arguments(method, seed),
            f"--output={output}",
        ],
        check=True,
    )
    return make_row(method, seed, output) | {"commit": ran_at}


def make_row(method, seed, output):
    results = json.loads((pathlib.Path(output) / "results.json").read_text())
    row = {
        "method": method,
        "seed": seed,
        "arguments": " ".join(arguments(method, seed)),
    }
    for name in ("teacher", "before", "after", "logits"):
        by_size = results["accuracy"].get(name, {})
        for size in results["accuracy"]["teacher"]:
            row[f"{name}_{size}"] = by_size.get(size, "")
    windows = results["effective_window"]
    for name in ("before", "after", "ratio", "after_is_at_least", "logits"):
        row[f"window_{name}"] = windows.get(name, "")
    row |= {f"seconds_{k}": round(v) for k, v in results["seconds"].items()}
    return row | results["versions"] | {"machine": rows.machine()}


def guide_runs():
    """The guide's accuracies and windows, on each seed it ran with."""
    lines = []
    for row in rows.read("guide_runs", method="guide"):
        for name, label in (
            ("teacher", "teacher"),
            ("before", "student before"),
            ("after", "LAid"),
            ("logits", "logits alone"),
        ):
            window = row.get(f"window_{name}")
            window = f"{float(window):.1f}" if window else ""
            lines.append(line_of(label, row, name, [window]))
    return markdown_table(["", "seed", *SIZES, "effective window"], lines)


def compare_methods():
    """An earlier guide, and labels alone, on each seed."""
    names = {
        "guide": "the guide",
        "sft": "labels alone",
        "sft_stretched": "labels alone, stretched positions",
    }
    lines = []
    for seed, name in itertools.product("012", names):
        for row in rows.read("compare_methods", method=name, seed=seed):
            if name == "guide":
                lines += [
                    line_of("teacher", row, "teacher", ["", ""]),
                    line_of(
                        "student before",
                        row,
                        "before",
                        [f"{float(row['window_before']):.1f}", ""],
                    ),
                ]
            windows = [row["window_after"], row["window_ratio"]]
            windows = [f"{float(value):.1f}" for value in windows]
            lines.append(line_of(names[name], row, "after", windows))
    header = ["", "seed", *SIZES, "effective window", "ratio"]
    return markdown_table(header, lines)


def line_of(label, row, when, windows):
    accuracy = [f"{float(row[f'{when}_{size}']):.3f}" for size in SIZES]
    return [label, row["seed"], *accuracy, *windows]


TABLES = {"guide_runs": guide_runs, "compare_methods": compare_methods}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default="runs/guide")
    args = parser.parse_args()
    for seed in args.seeds:
        for method in args.methods:
            key = {"method": method, "seed": seed}
            if not rows.is_done(PATH, key, list(key)):
                row = run(method, seed, f"{args.output}/{method}_{seed}")
                rows.append_row(PATH, row)


if __name__ == "__main__":
    main()
