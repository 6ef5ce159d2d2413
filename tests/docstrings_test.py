"""Runs the examples of docstrings, and those of the README that are short."""

import ast
import pathlib
import re

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

import keras_laid
from keras_laid import spectral
from keras_laid.backbones import families
from tests.backbones import small_models
from tests.distillation import server_support
from tests.support import FEW_STEPS
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import make_preprocessor

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Real presets become small ones, and long runs short.
SHORTER = {
    '"gemma3_4b_text"': '"./my_gemma3"',
    '"pali_gemma2_pt_10b_448"': '"my_preset"',
    '"pali_gemma2_pt_3b_448"': '"my_preset"',
    "from_preset(...)": 'from_preset("my_preset")',
    "(2, 4)": "(1, 1)",
    "(1, 10, 100)": "(1, 2)",
    "(1, 10, 50)": "(1, 2)",
    "(1, 2, 5, 10, 20, 50, 100)": "(1, 2)",
    "(2, 10, 20)": "(2, 3)",
    'haystacks, "runs/teacher"': 'haystacks, "runs/teacher", top_k=8',
    "4096, ": "16, ",
    "256, ": "8, ",
    "num_questions=5000": "num_questions=32",
    "epochs=100": "epochs=1",
    "epochs=20": "epochs=1",
    "epochs=10": "epochs=1",
}


def student(preprocessor):
    return make_multi_image(preprocessor=preprocessor)


def teacher(preprocessor):
    return make_multi_image(preprocessor=preprocessor, seed=1)


def data(preprocessor):
    return make_haystacks(preprocessor, 8, (2,))


def dataset(preprocessor):
    one = {
        "images": np.zeros((2, 16, 16, 3), "uint8"),
        "prompts": ["is there a two?"] * 2,
        "responses": ["yes", "no"],
    }
    return tf.data.Dataset.from_tensor_slices(one).batch(2)


def distiller(preprocessor):
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher(preprocessor), student(preprocessor)
    )
    distiller.compile(optimizer=keras.optimizers.Adam(1e-3), **FEW_STEPS)
    return distiller


def digits_student():
    """A student that answers better than chance, and so has a window."""
    return keras_hub.models.PaliGemmaCausalLM.from_preset(
        keras_laid.presets.STUDENT
    )


def write_answers(path, model, haystacks):
    """As a server writes its log probabilities."""
    responses = server_support.responses(model, haystacks)
    lines = [server_support.generated(*each, 20, None) for each in responses]
    server_support.write(pathlib.Path(path), lines)


# Functions that make the objects which examples use by name.
MAKERS = {
    "MyBackbone": lambda preprocessor: type("MyBackbone", (), {}),
    "data": data,
    "dataset": dataset,
    "distiller": distiller,
    "haystacks": data,
    "images": lambda preprocessor: np.zeros((1, 16, 16, 3), "uint8"),
    "inputs": lambda preprocessor: data(preprocessor)[0][0],
    "model": student,
    "prompts": lambda preprocessor: ["is there a two?"],
    "student": student,
    "teacher": teacher,
}


class Names(dict):
    """Objects that examples use by name, each made at its first use."""

    def __init__(self, preprocessor):
        super().__init__(
            {name: getattr(keras_laid, name) for name in keras_laid.__all__},
            keras=keras,
            keras_hub=keras_hub,
            keras_laid=keras_laid,
            spectral=spectral,
        )
        self.preprocessor = preprocessor

    def __missing__(self, name):
        if name == "jax":
            return pytest.importorskip("jax")
        self[name] = MAKERS[name](self.preprocessor)
        return self[name]


def docstring_examples():
    for path in sorted((ROOT / "keras_laid").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                name = getattr(node, "name", path.stem)
                for code in BLOCK.findall(ast.get_docstring(node) or ""):
                    yield pytest.param(code, id=name)


def run(code, names):
    """Runs an example; shapes stated in comments must be the real ones."""
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    lines = code.splitlines()
    for node in ast.parse(code).body:
        statement = ast.unparse(node)
        stated = re.search(r"# (\(.*\))$", lines[node.end_lineno - 1])
        if stated:
            shape = eval(statement, {}, names)
            assert tuple(shape) == ast.literal_eval(stated[1]), statement
        else:
            exec(statement, {}, names)


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """A folder of small models that examples read."""
    folder = tmp_path_factory.mktemp("presets")
    preprocessor = make_preprocessor()
    small = make_pali_gemma(preprocessor=preprocessor)
    small.save_to_preset(str(folder / "my_preset"))
    small = small_models.make_model(small_models.gemma_3)
    small.save_to_preset(str(folder / "my_gemma3"))
    return folder


@pytest.fixture
def names(presets, tmp_path, monkeypatch):
    for preset in presets.iterdir():
        (tmp_path / preset.name).symlink_to(preset)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    yield Names(make_preprocessor())
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(None)


@pytest.mark.extra_large_but_on("jax")
@pytest.mark.parametrize("code", list(docstring_examples()))
def test_docstring(code, names):
    backend = keras.backend.backend()
    if "set_distribution" in code and backend != "jax":
        pytest.skip("Keras shards only on JAX")
    if ".fit(" in code and backend != "torch":
        pytest.skip("trains only on torch, which compiles nothing")
    if "evaluate_haystacks" in code:  # Takes no tokenized data.
        digits = keras_laid.Digits("test")
        names["haystacks"] = keras_laid.draw_haystacks(digits, 8, (1, 2))
    if "effective_window(results" in code:
        names["model"] = digits_student()
    if "answers.jsonl" in code:
        write_answers("answers.jsonl", names["student"], names["haystacks"])
    if "MultiImage" in code:
        names["images"] = np.zeros((1, 2, 16, 16, 3), "uint8")
    run(code, names)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="runs only without compiling"
)
@pytest.mark.parametrize(
    "name, heading",
    [
        ("README.md", "Use it"),
        ("keras_laid/haystacks/README.md", "How far a model sees"),
    ],
)
def test_readme(name, heading, names):
    section = (ROOT / name).read_text().split(f"## {heading}\n")[1]
    names["student"] = digits_student()
    run(BLOCK.search(section)[1], names)
