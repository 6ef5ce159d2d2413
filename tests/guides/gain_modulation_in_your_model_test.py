"""The guide to gains, as a stranger would run it."""

import json
import pathlib
import subprocess
import sys

import keras_hub
import pytest

GUIDE = (
    pathlib.Path(__file__).parents[2]
    / "guides"
    / "gain_modulation_in_your_model.py"
)


@pytest.mark.extra_large_but_on("jax")
def test_quick_run_keeps_its_promises(tmp_path):
    output = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, str(GUIDE), "--quick", "--output", str(output)],
        check=True,
        capture_output=True,
        text=True,
    )
    results = json.loads((output / "results.json").read_text())
    accuracy = results["accuracy"]
    assert accuracy["plain"] > 0.9
    assert accuracy["after"] > accuracy["before"]
    assert results["difference"]["folded"] < 1e-3
    assert results["difference"]["reloaded"] < 1e-3
    assert results["class"] == "LlamaBackbone"
    for name in ("gains.png", "gains_of_causal_lm.png"):
        assert (output / name).stat().st_size > 5000
    preset = str(output / "preset")
    backbone = keras_hub.models.Backbone.from_preset(preset)
    assert type(backbone) is keras_hub.models.LlamaBackbone
    assert process.stdout.strip().split("\n")[-1].startswith("largest")
