"""The guide on PaliGemma, as a stranger would run it."""

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
        # The guide runs for minutes; the tests' settings suit short runs.
        for name in (
            "XLA_FLAGS",
            "OMP_NUM_THREADS",
            "TF_NUM_INTRAOP_THREADS",
            "TF_NUM_INTEROP_THREADS",
        ):
            environment.pop(name, None)
    process = subprocess.run(
        [sys.executable, str(GUIDE), "--output", str(output), *arguments],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return process.stdout, json.loads((output / "results.json").read_text())


@pytest.mark.extra_large_but_on("jax")
def test_quick_run_leaves_everything(tmp_path):
    printed, results = run_guide(tmp_path / "run", "--quick", "--compare")
    assert list(results["accuracy"]) == ["teacher", "before", "after", "logits"]
    for by_size in results["accuracy"].values():
        assert by_size.keys() == {"1", "4"}
    assert results["effective_window"].keys() == {
        "before",
        "after",
        "ratio",
        "after_is_at_least",
        "logits",
    }
    assert {tuple(head) for head in results["retrieval_heads"]} == {
        (1, 1),
        (1, 2),
        (1, 3),
    }
    assert results["seed"] == results["settings"]["seed"] == 0
    for name in (
        "accuracy.png",
        "attention_mass.png",
        "retrieval_heads.png",
        "terms.png",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 5000
    assert (tmp_path / "run" / "student" / "config.json").exists()
    *_, before_last, last = printed.strip().split("\n")
    assert before_last.startswith("logits ")
    assert last.startswith("effective window:")


@pytest.mark.extra_large
def test_window_is_twenty_times_longer(tmp_path):
    _, results = run_guide(tmp_path / "run", "--seed", "0")
    assert results["effective_window"]["ratio"] >= 20
    before, after = (results["accuracy"][name] for name in ("before", "after"))
    assert after["1"] >= before["1"] - 0.02
    assert after["20"] >= 0.95
