"""A run by a recipe, from an empty folder, and what a recipe may hold."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image

from keras_laid.distill import distill
from keras_laid.distill import read_recipe
from keras_laid.distill.recipe import Evaluation
from tests.backbones import small_models
from tests.haystacks.families import COLOURS
from tests.haystacks.families import PREPROCESSORS
from tests.haystacks.families import make_pair

RECIPE = """
teacher = "teacher"
student = "student"
output = "runs/first"

[data]
examples = "photos/train.csv"
sizes = [2, 3]
batch_size = 4
window = 6

[training]
epochs = 2
learning_rate = 1e-3

[terms]
supervised_weight = 0.0

[evaluation]
examples = "photos/train.csv"
sizes = [1, 2]
questions = 2
max_answer_tokens = 1
"""


def write_photos(folder):
    """Images of a colour each, of several sizes, and a table of them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["images,prompt,response"]
    for number, colour in enumerate(COLOURS):
        pixels = rng.integers(0, 256, (12 + number, 20, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{colour}.png")
        lines.append(f"{colour}.png,Is there a {colour} page?,yes")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")


def write_presets(folder, family=small_models.pali_gemma):
    preprocessor = PREPROCESSORS[family]()
    pair = make_pair(family, preprocessor)
    task = small_models.TASKS[family]
    for name, model in zip(("teacher", "student"), pair, strict=True):
        saved = task(backbone=model.backbone, preprocessor=preprocessor)
        saved.save_to_preset(str(folder / name))


def write_recipe(folder, text=RECIPE):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_photos(folder / "photos")
    write_presets(folder)
    recipe = read_recipe(write_recipe(folder))
    return folder, recipe, distill(recipe)


@pytest.mark.extra_large_but_on("torch")
def test_a_run_leaves_a_plain_preset_and_its_results(finished):
    folder, recipe, accuracy = finished
    output = folder / "runs/first"
    assert set(accuracy) == {"teacher", "before", "after"}
    assert all(set(by_size) == {1, 2} for by_size in accuracy.values())
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "accuracy.png",
        "losses.csv",
        "recipe.json",
        "results.json",
        "student",
        "terms.png",
    }
    results = json.loads((output / "results.json").read_text())
    assert set(results["accuracy"]) == set(accuracy)
    lines = (output / "losses.csv").read_text().splitlines()
    assert len(lines) == 1 + recipe.training.epochs
    trained, untrained = (
        keras_hub.models.CausalLM.from_preset(str(path))
        for path in (output / "student", folder / "student")
    )
    assert type(trained) is type(untrained)
    assert any(
        np.abs(
            keras.ops.convert_to_numpy(one) - keras.ops.convert_to_numpy(other)
        ).max()
        > 1e-5
        for one, other in zip(
            trained.backbone.trainable_variables,
            untrained.backbone.trainable_variables,
            strict=True,
        )
    )


@pytest.mark.extra_large_but_on("torch")
def test_a_finished_run_takes_no_further_step(finished):
    folder, recipe, accuracy = finished
    weights = folder / "runs/first/student/model.weights.h5"
    before = weights.read_bytes()
    losses = (folder / "runs/first/losses.csv").read_text()
    assert distill(recipe) == accuracy
    assert (folder / "runs/first/losses.csv").read_text() == losses
    assert len(weights.read_bytes()) == len(before)


@pytest.mark.extra_large_but_on("torch")
def test_another_recipe_is_refused_there(finished):
    folder, _, _ = finished
    changed = RECIPE.replace("epochs = 2", "epochs = 3")
    recipe = read_recipe(write_recipe(folder, changed))
    with pytest.raises(ValueError, match=r"its own recipe.*\['training'\]"):
        distill(recipe)


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "student").mkdir()
    recipe = read_recipe(write_recipe(tmp_path))
    assert recipe.output == str(tmp_path / "runs/first")
    assert recipe.data.examples == str(tmp_path / "photos/train.csv")
    assert recipe.student == str(tmp_path / "student")
    assert recipe.teacher == "teacher"  # The name of a preset.
    assert recipe.evaluation == Evaluation(
        examples=str(tmp_path / "photos/train.csv"),
        sizes=[1, 2],
        questions=2,
        max_answer_tokens=1,
    )
    assert recipe.terms.retrieval_weight == 1.0


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("sizes = [2, 3]", "size = [2, 3]", "'size'. Did you mean 'sizes'"),
        ("[terms]", "[term]", "'term'. Did you mean 'terms'"),
        ("epochs = 2", "zzz = 2", r"\[training\] must have only .*'zzz'\.$"),
        ('teacher = "teacher"', "", r"must have the keys \['teacher'\]"),
        ('examples = "photos/train.csv"\n', "", r"keys \['examples'\]"),
        ("epochs = 2", "epochs = 2.5", "`epochs` must be of type int.*2.5"),
        ("epochs = 2", "epochs = true", "`epochs` must be of type int"),
        ("epochs = 2", 'gains = "yes"', "`gains` must be of type bool"),
        ("sizes = [2, 3]", "sizes = 2", "must be a list of integers.*2"),
        ("sizes = [2, 3]", 'sizes = ["2"]', "`sizes` must be of type int"),
        ("[data]", "[[data]]", "`data` must be a table"),
        ("[data]", "[data", "must be a TOML file.*recipe.toml"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, before, after, words):
    assert before in RECIPE
    text = RECIPE.replace(before, after, 1)
    with pytest.raises(ValueError, match=words):
        read_recipe(write_recipe(tmp_path, text))
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "none.toml")
