"""The guide on Gemma 3, as a stranger would run it."""

import json
import pathlib
import subprocess
import sys

import keras_hub
import numpy as np
import pytest

from keras_laid.haystacks.questions import question
from tests.support import to_numpy

GUIDE = pathlib.Path(__file__).parents[2] / "guides" / "distill_gemma3.py"


@pytest.mark.extra_large_but_on("torch")
def test_quick_run_leaves_everything(tmp_path):
    subprocess.run(
        [sys.executable, str(GUIDE), "--quick", "--output", str(tmp_path)],
        check=True,
        capture_output=True,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"].keys() == {"teacher", "before", "after"}
    assert all(0 <= a["2"] <= 1 for a in results["accuracy"].values())
    (logs,) = results["history"]
    assert logs.keys() >= {"retrieval", "logits", "supervised"}
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    for name in ("teacher", "student", "student_long"):
        assert (tmp_path / name / "config.json").exists()
    # The tokenizer knows every word and the placeholders of images.
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor.from_preset(
        str(tmp_path / "student_long")
    )
    x, _, _ = preprocessor(
        {
            "images": np.zeros((1, 2, 16, 16, 3), "uint8"),
            "prompts": [
                2 * "<start_of_image>" + question("red square", "pink square")
            ],
            "responses": ["yes"],
        },
        sequence_length=40,
    )
    unknown = preprocessor.tokenizer.token_to_id("<unk>")
    assert not (to_numpy(x["token_ids"]) == unknown).any()
    assert to_numpy(x["vision_mask"]).sum() == 2 * 4
