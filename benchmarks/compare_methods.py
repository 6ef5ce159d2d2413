"""Runs the guide with parts left out, on several seeds, and keeps the rows.

    KERAS_BACKEND=jax python -m benchmarks.compare_methods

Appends one row a run to `benchmarks/results/compare_methods.csv`: settings,
accuracy by haystack size before and after, effective windows, commit, machine
and versions. Runs that have a row already are passed over, so the script can be
stopped and started again.
"""

import argparse
import csv
import json
import pathlib
import platform
import subprocess
import sys

RESULTS = pathlib.Path(__file__).parent / "results" / "compare_methods.csv"
GUIDE = pathlib.Path(__file__).parent.parent / "guides" / "distill_paligemma.py"
LABELS_ALONE = ["--attention-weight", "0", "--logits-weight", "0", "--no-gains"]
METHODS = {
    "guide": [],
    "sft": [*LABELS_ALONE, "--no-stretching"],
    "sft_stretched": LABELS_ALONE,
    "kd_stretched": ["--attention-weight", "0", "--no-gains"],
    "guide_without_stretching": ["--no-stretching"],
}


def arguments(method, seed):
    return [*METHODS[method], "--seed", str(seed)]


def run(method, seed, output):
    """Runs the guide once; returns its row."""
    ran_at = commit()
    subprocess.run(
        [
            sys.executable,
            str(GUIDE),
            *arguments(method, seed),
            "--output",
            output,
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
    for name, by_size in results["accuracy"].items():
        row |= {f"{name}_{size}": value for size, value in by_size.items()}
    for name, value in results["effective_window"].items():
        row[f"window_{name}"] = value
    row |= {f"seconds_{k}": round(v) for k, v in results["seconds"].items()}
    return row | results["versions"] | {"machine": machine()}


def commit():
    """The commit that runs, marked where code is changed, results apart."""
    name = git("rev-parse", "--short=10", "HEAD")
    changed = git(
        "status", "--porcelain", "--", ".", f":(exclude){RESULTS.parent}"
    )
    return f"{name}-dirty" if changed else name


def git(*arguments):
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [
        line.split(":")[1].strip() for line in lines if "model name" in line
    ]
    return f"{len(names)} x {names[0]}, {platform.system()}"


def read_rows():
    if not RESULTS.exists():
        return []
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def write_rows(rows):
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default="runs/compare_methods")
    args = parser.parse_args()
    for seed in args.seeds:
        for method in args.methods:
            done = {(row["method"], int(row["seed"])) for row in read_rows()}
            if (method, seed) not in done:
                row = run(method, seed, f"{args.output}/{method}_{seed}")
                write_rows([*read_rows(), row])


if __name__ == "__main__":
    main()
