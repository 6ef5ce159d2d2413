"""A folder of photographs: a run that is killed ends as one that is not."""

import os
import pathlib
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.distill.recipe_test import write_presets

ROOT = pathlib.Path(__file__).parents[2]
SIDEWAYS = 6  # Orientations of EXIF's tag 0x112: turned by a quarter.
RECIPE = """
teacher = "../teacher"
student = "../student"
output = "output"

[data]
examples = "../photos/table.csv"
sizes = [2, 4]
batch_size = 5

[training]
epochs = 3
learning_rate = 1e-3

[evaluation]
examples = "../photos/table.csv"
sizes = [2]
questions = 8
max_answer_tokens = 1
"""


def write_photographs(folder):
    """Thirty JPEGs of different sizes, every third on its side, and a table."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["images,prompt,response"]
    for number in range(30):
        shape = (16 + number, 40 - number // 2, 3)
        image = Image.fromarray(rng.integers(0, 256, shape).astype("uint8"))
        exif = Image.Exif()
        if number % 3 == 0:
            exif[0x112] = SIDEWAYS
        image.save(folder / f"{number}.jpg", exif=exif)
        response = ("yes", "no")[number % 2]
        lines.append(f"{number}.jpg,Is there a red page?,{response}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


def start(folder):
    """A process of its own, as a user starts it."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE)
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "keras_laid.distill", "recipe.toml"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(folder):
    """Runs to the end; returns the output."""
    code = start(folder).wait(timeout=900)
    text = (folder / "log.txt").read_text()
    assert code == 0, text[-3000:]
    return text


def kill_after_an_epoch(folder):
    process = start(folder)
    deadline = time.time() + 900
    while not list(folder.glob("output/training/epoch_1/*")):
        running = process.poll() is None and time.time() < deadline
        assert running, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.05)
    process.kill()
    process.wait()


@pytest.mark.extra_large
def test_a_killed_run_ends_as_one_that_is_not(tmp_path):
    write_photographs(tmp_path / "photos")
    write_presets(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "after    accuracy by images" in finish(whole)
    kill_after_an_epoch(killed)
    assert not (killed / "output/student").exists()
    finish(killed)
    results = [
        (folder / "output/results.json").read_text()
        for folder in (whole, killed)
    ]
    assert results[0] == results[1]
    files = [
        h5py.File(folder / "output/student/model.weights.h5")
        for folder in (whole, killed)
    ]
    seen = []

    def compare(name, one):
        if isinstance(one, h5py.Dataset):
            np.testing.assert_array_equal(one[()], files[1][name][()], name)
            seen.append(name)

    files[0].visititems(compare)
    assert len(seen) > 20
