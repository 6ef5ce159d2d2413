"""The main job, as a stranger would run it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

GUIDE = pathlib.Path(__file__).parents[2] / "guides" / "distill_paligemma.py"


def run_guide(output, *arguments):
    environment = dict(os.environ)
    if "--quick" not in arguments:
        # It runs for minutes, and those of the tests are for short runs.
        environment.pop("XLA_FLAGS", None)
    process = subprocess.run(
        [sys.executable, str(GUIDE), "--output", str(output), *arguments],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return process.stdout, json.loads((output / "results.json").read_text())


def test_quick_run_leaves_everything(tmp_path):
    printed, results = run_guide(tmp_path / "run", "--quick")
    assert results["accuracy"].keys() == {"teacher", "before", "after"}
    for by_size in results["accuracy"].values():
        assert by_size.keys() == {"1", "4", "10"}
    assert results["effective_window"]["ratio"] > 0
    assert results["seed"] == results["settings"]["seed"] == 0
    for name in ("accuracy.png", "attention_mass.png", "terms.png"):
        assert (tmp_path / "run" / name).stat().st_size > 5000
    assert (tmp_path / "run" / "student" / "config.json").exists()
    *_, before_last, last = printed.strip().split("\n")
    assert before_last.startswith("after ")
    assert last.startswith("effective window:")


@pytest.mark.extra_large
def test_window_is_three_times_longer(tmp_path):
    _, results = run_guide(tmp_path / "run", "--seed", "0")
    assert results["effective_window"]["ratio"] >= 3.2
    before, after = (results["accuracy"][name] for name in ("before", "after"))
    for size in ("1", "2", "5"):
        assert after[size] >= before[size] - 0.02
