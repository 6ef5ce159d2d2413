"""Tables of wrong calls, and checks that these calls change nothing."""

import contextlib
import pathlib

import numpy as np
import pytest
from keras import ops

from keras_laid.backbones.decoder import backbone_of


def refused(name, call, error, *words):
    """A row: a call, its exception, and parts of the message in order.

    A message tells the rule, then the value received, then the remedy.
    """
    return pytest.param(call, error, words, id=name)


def assert_refused(error, words, call, *given):
    with pytest.raises(error) as raised:
        call(*given)
    message = str(raised.value)
    assert "Received" in message
    for each in words:
        assert each in message, message


@contextlib.contextmanager
def unchanged(*models, folder=None):
    """Scope that must leave models, and files in a folder, as they were."""
    before = [state_of(model) for model in models], files_in(folder)
    yield
    after = [state_of(model) for model in models], files_in(folder)
    assert after == before


def state_of(model):
    """Class, weights, trainable flags, and names of the layers' attributes."""
    backbone = backbone_of(model)
    layers = backbone._flatten_layers(include_self=False)
    return (
        type(model),
        type(backbone),
        [
            (v.path, v.trainable, ops.convert_to_numpy(v).tobytes())
            for v in model.weights
        ],
        [(layer.trainable, set(vars(layer)) - BY_CALLS) for layer in layers],
    )


# Attributes that Keras itself adds to a layer when it is called.
BY_CALLS = {"_losses", "_loss_ids"}


def files_in(folder):
    if folder is None:
        return None
    paths = sorted(pathlib.Path(folder).rglob("*"))
    return [(p, p.read_bytes() if p.is_file() else None) for p in paths]


def zeros(*shape, dtype="float32"):
    return ops.convert_to_tensor(np.zeros(shape, dtype))
