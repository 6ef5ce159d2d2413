"""Which modules of the package import which, and how long they are."""

import ast
import graphlib
import inspect
import pathlib
import re

import keras_laid

PACKAGE = pathlib.Path(keras_laid.__file__).parent
# Lowest first: each imports only itself and the packages before it.
FLOORS = ("ops", "layers", "backbones", "distillation")
BESIDE = (
    "devices",
    "haystacks",
    "spectral",
)  # Each imports backbones and lower packages.


def modules():
    """Names and paths of all modules."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(path, types=True):
    """Names that a file imports, also inside of functions or for types."""
    tree = ast.parse(path.read_text())
    if not types:
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.name


def test_no_circle_of_imports():
    paths = dict(modules())
    needs = {
        name: {
            inner if inner in paths else outer
            for outer, inner in imported(path)
            if outer in paths or inner in paths
        }
        for name, path in paths.items()
    }
    assert needs["keras_laid.haystacks.results"]
    graphlib.TopologicalSorter(needs).prepare()  # Raises for a cycle.


def test_a_floor_imports_what_is_below():
    allowed = {
        floor: {*FLOORS[: height + 1]} for height, floor in enumerate(FLOORS)
    }
    for name in BESIDE:
        allowed[name] = {*allowed["backbones"], name}
    seen = set()
    for name, path in modules():
        _, *rest = name.split(".")
        if not rest or rest[0] not in allowed:
            continue
        for _, found in imported(path, types=False):
            package, *parts = found.split(".")
            if package == "keras_laid" and parts[0] in allowed:
                assert parts[0] in allowed[rest[0]], f"{name}: {found}"
                seen.add((rest[0], parts[0]))
    assert ("distillation", "ops") in seen


def parameters(function):
    named = function.args
    return len(named.posonlyargs + named.args + named.kwonlyargs)


def test_modules_and_signatures_stay_short():
    seen = 0
    for name, path in modules():
        text = path.read_text()
        is_kernel = path.stem.startswith(("triton", "pallas"))
        assert text.count("\n") <= (650 if is_kernel else 450), name
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            # A GPU kernel takes everything that its programs read as arguments.
            if ".ops." in name and not node.name.endswith("_kernel"):
                assert parameters(node) <= 12, f"{name}: {node.name}"
                seen += 1
    assert seen > 100
    distiller = keras_laid.DistanceWeightedAttentionDistillation
    arguments = {*inspect.signature(distiller).parameters} - {"kwargs"}
    assert len(arguments) <= 8


def test_a_part_of_the_readme_is_a_module_or_a_public_name():
    """The documentation has a page for each row of this table."""
    readme = (PACKAGE / "README.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)`", readme, re.MULTILINE)
    assert len(rows) > 10
    for name in rows:
        module = name.removesuffix(".attention_layers")
        if module.startswith("keras_laid."):
            folder = PACKAGE.parent / module.replace(".", "/")
            assert (folder / "__init__.py").is_file(), name
        else:
            assert name in keras_laid.__all__, name
