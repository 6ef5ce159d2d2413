"""Runs the guide with parts left out, on several seeds, and keeps the rows.

    KERAS_BACKEND=jax python -m benchmarks.compare_methods

Appends one row a run to `benchmarks/results/compare_methods.csv`: settings,
accuracy by haystack size before and after, effective windows, commit, machine
and versions. Runs that have a row already are passed over, so the script can be
stopped and started again.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks import rows

PATH = rows.RESULTS / "compare_methods.csv"
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
    ran_at = rows.commit()
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
    return row | results["versions"] | {"machine": rows.machine()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default="runs/compare_methods")
    args = parser.parse_args()
    for seed in args.seeds:
        for method in args.methods:
            key = {"method": method, "seed": seed}
            if not rows.is_done(PATH, key, list(key)):
                row = run(method, seed, f"{args.output}/{method}_{seed}")
                rows.append_row(PATH, row)


if __name__ == "__main__":
    main()
