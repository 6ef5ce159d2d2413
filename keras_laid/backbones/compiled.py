"""Compiled functions of the Keras models that run a backbone."""

import contextlib
import functools
import gc
import weakref
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras

from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import replaced_method

# Attributes of Keras models, each made by the method `make_<name>`.
COMPILED = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)


@contextlib.contextmanager
def compiled_apart(model: keras.Model) -> Iterator[None]:
    """Scope with compiled functions of its own for models around a backbone.

    A compiled function keeps doing what the backbone did when the function
    was traced. On entry, each Keras model that runs the backbone's blocks gets
    functions that are not yet traced. On exit it gets back the functions that
    it had. A function that was replaced inside, for example after `compile`,
    is replaced again by one that is not yet traced.

    Args:
        model: A KerasHub model, or its backbone.
    """
    outer = {}  # From a function made here to the one that it replaces.
    with contextlib.ExitStack() as steps:
        for owner, name in compiled_functions(models_around(model)):
            function = getattr(owner, name)
            steps.enter_context(own_step(owner, name))
            make(owner, name)
            outer[getattr(owner, name)] = function
        try:
            yield
        finally:
            steps.close()
            for owner, name in compiled_functions(models_around(model)):
                function = outer.get(getattr(owner, name))
                if function is None:
                    make_anew(owner, name)
                else:
                    setattr(owner, name, function)


def compiled_functions(
    models: Iterable[keras.Model],
) -> list[tuple[keras.Model, str]]:
    """Compiled functions of models, as pairs of model and attribute."""
    return [
        (owner, name)
        for owner in models
        for name in COMPILED
        if getattr(owner, name, None) is not None
    ]


def make_anew(owner: keras.Model, name: str) -> None:
    """Replaces a compiled function by one that is not yet traced."""
    with own_step(owner, name):
        make(owner, name)


def make(owner: keras.Model, name: str) -> None:
    setattr(owner, name, None)
    getattr(owner, f"make_{name}")()


def own_step(
    owner: keras.Model, name: str
) -> contextlib.AbstractContextManager[None]:
    """Scope in which a model's step is a function that JAX has not yet traced.

    JAX does not trace a function again if it is equal to one that was traced
    and is still alive, and bound methods of one object are equal.
    """
    step_name = name.replace("function", "step")
    step = getattr(owner, step_name)

    def new_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return replaced_method(owner, step_name, new_step)


# A layer does not know which models it is part of, so all models are listed
# here while they are alive.
MODELS: weakref.WeakValueDictionary[int, keras.Model]
MODELS = weakref.WeakValueDictionary()  # By `id`: a model may have no hash.
new_model = keras.Model.__new__


@functools.wraps(new_model)
def new_listed_model(
    cls: type[keras.Model], *args: Any, **kwargs: Any
) -> keras.Model:
    model = new_model(cls, *args, **kwargs)
    MODELS[id(model)] = model
    return model


keras.Model.__new__ = staticmethod(new_listed_model)


@functools.cache
def find_older_models() -> None:
    """Lists, once, the models that are older than this module."""
    for each in gc.get_objects():
        if issubclass(type(each), keras.Model):
            MODELS[id(each)] = each


def models_around(model: keras.Model) -> list[keras.Model]:
    """Every Keras model that runs blocks of a backbone, itself among them."""
    blocks = set(map(id, backbone_of(model).transformer_layers))
    find_older_models()
    models = [reference() for reference in MODELS.valuerefs()]
    return [each for each in models if each is not None and holds(each, blocks)]


def holds(model: keras.Model, blocks: set[int]) -> bool:
    """Whether one of the blocks is part of a model, at any depth.

    Parts are the layers that Keras tracks, and layers in attributes that Keras
    does not track, such as the distiller's teacher.
    """
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        layer = waiting.pop()
        if id(layer) in blocks:
            return True
        if id(layer) not in seen:
            seen.add(id(layer))
            attributes = vars(layer)
            waiting += attributes.get("_layers", ())
            waiting += [
                value
                for value in attributes.values()
                if isinstance(value, keras.Layer)
            ]
    return False
