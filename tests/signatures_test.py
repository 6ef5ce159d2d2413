"""What docstrings say of arguments is what signatures have."""

import ast
import inspect
import re

import pytest

import keras_laid
from keras_laid import backbones
from keras_laid import haystacks
from keras_laid import ops
from keras_laid import spectral

MODULES = (keras_laid, backbones, haystacks, ops, spectral)
PUBLIC = sorted(
    {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in MODULES
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
        or inspect.isclass(getattr(module, name))
    }.items()
)
ARGUMENTS = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
ARGUMENT = re.compile(r"^    (\*{0,2}\w+): (.*?)(?=^    \S|\Z)", re.S | re.M)
LITERALS = (bool, int, float, str, tuple)
DEFAULT = re.compile(r"Defaults to `([^`]*)`")


def described(thing):
    """Each argument in the docstring, with what is said of it."""
    found = ARGUMENTS.search(inspect.getdoc(thing) or "")
    pairs = ARGUMENT.findall(found[1]) if found else []
    return {name.strip("*"): " ".join(text.split()) for name, text in pairs}


@pytest.mark.parametrize(
    "name, thing", PUBLIC, ids=[name for name, _ in PUBLIC]
)
def test_arguments(name, thing):
    texts = described(thing)
    parameters = inspect.signature(thing).parameters
    if texts:
        assert list(texts) == list(parameters)
    for argument, text in texts.items():
        default = parameters[argument].default
        # `None` may stand for what depends on others, and names for objects.
        if default is None or not isinstance(default, LITERALS):
            continue
        for said in DEFAULT.findall(text):
            assert ast.literal_eval(said) == default, argument
