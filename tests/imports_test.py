"""No module of the package needs another that needs it."""

import ast
import graphlib
import pathlib

import keras_laid

PACKAGE = pathlib.Path(keras_laid.__file__).parent


def modules():
    """Names and paths of all modules."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(path):
    """Names that a file imports, inside of functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
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
    graphlib.TopologicalSorter(needs).prepare()  # Raises at a circle.
