"""Arguments and defaults in docstrings are those of the signatures."""

import ast
import importlib
import inspect
import pkgutil
import re

import pytest

import keras_laid

# Modules for one backend, or only for GPUs.
ELSEWHERE = ("pallas", "triton", "triton_kernels", "_steps")


def everything():
    """Functions, classes and their methods, by name."""
    found = {}
    for module in pkgutil.walk_packages(keras_laid.__path__, "keras_laid."):
        if module.name.endswith(ELSEWHERE):
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            if getattr(thing, "__module__", None) != module.name:
                continue
            if inspect.isfunction(thing) or inspect.isclass(thing):
                found[f"{module.name}.{thing.__qualname__}"] = thing
            if inspect.isclass(thing):
                for name, method in vars(thing).items():
                    method = getattr(method, "__func__", method)
                    if inspect.isfunction(method):
                        found[f"{module.name}.{thing.__qualname__}.{name}"] = (
                            method
                        )
    return found


ARGUMENTS = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
ARGUMENT = re.compile(r"^    (\*{0,2}\w+): (.*?)(?=^    \S|\Z)", re.S | re.M)
LITERALS = (bool, int, float, str, tuple)
DEFAULT = re.compile(r"Defaults to `([^`]*)`")


def described(thing):
    """A dictionary from each argument in the docstring to its description."""
    found = ARGUMENTS.search(inspect.getdoc(thing) or "")
    pairs = ARGUMENT.findall(found[1]) if found else []
    return {name.strip("*"): " ".join(text.split()) for name, text in pairs}


DESCRIBED = {n: t for n, t in sorted(everything().items()) if described(t)}


@pytest.mark.parametrize("name", DESCRIBED)
def test_arguments(name):
    thing = DESCRIBED[name]
    texts = described(thing)
    parameters = dict(inspect.signature(thing).parameters)
    for unsaid in ("self", "cls"):
        parameters.pop(unsaid, None)
    if "args" not in parameters:  # Keras's own methods.
        assert list(texts) == list(parameters)
    for argument, text in texts.items():
        if argument not in parameters:
            continue
        default = parameters[argument].default
        # `None` may stand for a default that depends on other arguments, and a
        # name for an object.
        if default is None or not isinstance(default, LITERALS):
            continue
        for said in DEFAULT.findall(text):
            assert ast.literal_eval(said) == default, argument
