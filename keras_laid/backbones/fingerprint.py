"""Fingerprints that differ between models whose outputs may differ."""

import functools
import hashlib
import json
import pathlib
import tempfile
import types
from typing import Any

import keras
from keras import ops

from keras_laid.backbones.decoder import backbone_of

DIGITS = 16  # Of a hash in hexadecimal.
# Methods that Keras itself replaces in each layer.
WRAPPED_BY_KERAS = ("build", "quantize")
# Settings of preprocessors that are set for each batch.
BY_BATCH = ("sequence_length", "max_images_per_prompt")


def model_fingerprint(model: keras.Model) -> str:
    """A string that changes with everything a model's outputs depend on.

    A model's outputs depend on its class and config, the scopes that it is in
    (`keras_laid.yarn`, `keras_laid.self_extend`, `keras_laid.rotary_positions`
    and others), and every bit of its weights. All weights are copied to the
    host, one variable at a time, and hashed by SHA-256.

    Args:
        model: A KerasHub task or backbone.

    Returns:
        A string.
    """
    backbone = backbone_of(model)
    config = without_names(backbone.get_config())
    return (
        f"{type(backbone).__name__}, config {hash_of(config)}, "
        f"scopes {hash_of(open_scopes(backbone))}, "
        f"weights {weights_hash(model)}"
    )


def preprocessor_fingerprint(preprocessor: Any) -> str:
    """A string that changes with everything a preprocessor's outputs depend on.

    The exceptions are `sequence_length` and `max_images_per_prompt`, which are
    set for each batch.

    Args:
        preprocessor: A `keras_hub.models.CausalLMPreprocessor`.

    Returns:
        A string.
    """
    config = without_names(preprocessor.get_config())
    config = {k: v for k, v in config.items() if k not in BY_BATCH}
    with tempfile.TemporaryDirectory() as folder:
        preprocessor.tokenizer.save_assets(folder)
        vocabulary = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in pathlib.Path(folder).iterdir()
        }
    return f"preprocessor {hash_of((config, vocabulary))}"


def weights_hash(model: keras.Model) -> str:
    """SHA-256 of all weights, in their order; names do not count."""
    parts = hashlib.sha256()
    for variable in model.weights:
        parts.update(f"{variable.dtype} {tuple(variable.shape)} ".encode())
        parts.update(ops.convert_to_numpy(variable).tobytes())
    return parts.hexdigest()[:DIGITS]


def open_scopes(backbone: keras.Model) -> list[Any]:
    """The functions that replace methods of a model's layers, in order.

    Scopes put functions into the instances: see `decoder.replaced_method`.
    """
    return [
        (index, name, described(value))
        for index, layer in enumerate(
            backbone._flatten_layers(include_self=False)
        )
        for name, value in sorted(vars(layer).items())
        if name not in WRAPPED_BY_KERAS
        and callable(value)
        and isinstance(getattr(type(layer), name, None), types.FunctionType)
    ]


def described(value: Any) -> Any:
    """A function, and the settings that it holds, as values for JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if isinstance(value, dict):
        return {name: described(each) for name, each in value.items()}
    if isinstance(value, functools.partial):
        return [described(v) for v in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return [value.__name__, described(value.__self__)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [f"{value.__module__}.{value.__qualname__}", described(cells)]
    if isinstance(value, keras.layers.Layer):
        return type(value).__name__
    if hasattr(value, "shape"):
        array = ops.convert_to_numpy(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        return [str(array.dtype), array.shape, digest]
    # An object that is called, such as `SelfExtendedAttention`.
    settings = {n: v for n, v in vars(value).items() if is_setting(v)}
    return [type(value).__name__, described(settings)]


def is_setting(value: Any) -> bool:
    """Whether an attribute is a setting of its object, not scratch space."""
    numbers = isinstance(value, (bool, int, float, str))
    return numbers or callable(value) or hasattr(value, "shape")


def without_names(config: Any) -> Any:
    """A config without the names of layers, which Keras numbers."""
    if isinstance(config, dict):
        if "DTypePolicy" in config.get("class_name", ""):
            return config  # The name of a policy is its only setting.
        kept = ((k, v) for k, v in config.items() if k != "name")
        return {k: without_names(v) for k, v in kept}
    if isinstance(config, (list, tuple)):
        return [without_names(each) for each in config]
    return config


def hash_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
