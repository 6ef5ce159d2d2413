"""The guide on Gemma 3, as a stranger would run it."""

import json
import pathlib
import subprocess
import sys

import keras
import pytest

GUIDE = pathlib.Path(__file__).parents[2] / "guides" / "distill_gemma3.py"


# A process that compiles for a minute: one backend is enough by default.
pytestmark = (
    [] if keras.backend.backend() == "jax" else [pytest.mark.extra_large]
)


def test_quick_run_leaves_everything(tmp_path):
    subprocess.run(
        [sys.executable, str(GUIDE), "--quick", "--output", str(tmp_path)],
        check=True,
        capture_output=True,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"].keys() == {"teacher", "before", "after"}
    assert all(0 <= a["2"] <= 1 for a in results["accuracy"].values())
    assert results["history"].keys() >= {"attention", "logits", "supervised"}
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    for name in ("teacher", "student", "student_long"):
        assert (tmp_path / name / "config.json").exists()
