"""Helpers of all tools that reach into a KerasHub decoder."""

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
from keras_hub.models import PaliGemmaBackbone

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_indices
from keras_laid.arguments import check_kind
from keras_laid.arguments import check_shape
from keras_laid.arguments import check_tokens
from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.attention_layer import DecoderLayer
from keras_laid.backbones.attention_layer import is_su_scaled
from keras_laid.backbones.families import attention_layers
from keras_laid.backbones.families import family_of
from keras_laid.backbones.families import has_linear_layers
from keras_laid.backbones.families import layers_with_maps
from keras_laid.typing import Tensor

# Inputs with a value for each token id.
TOKEN_MASKS = ("padding_mask", "response_mask", "vision_mask")


def backbone_of(model: keras.Model) -> keras.Model:
    """The backbone of a task, or the backbone itself."""
    return getattr(model, "backbone", model)


def pali_gemma_backbone_of(model: keras.Model) -> PaliGemmaBackbone:
    """The `PaliGemmaBackbone` of a task, or the backbone itself."""
    backbone = backbone_of(model)
    if not isinstance(backbone, PaliGemmaBackbone):
        raise ValueError(
            "The model must be a `keras_hub.models.PaliGemmaCausalLM`, a "
            "`keras_hub.models.PaliGemmaBackbone`, or a "
            "`keras_laid.MultiImagePaliGemmaCausalLM`. "
            f"Received: {type(model).__name__}"
        )
    return backbone


def global_layers(model: keras.Model) -> list[int]:
    """Indices of the layers with full attention; at least one must exist."""
    return indices_of_global(attention_layers(model), backbone_of(model).name)


def plainly_rotated(model: keras.Model) -> list[AttentionLayer]:
    """The layers with full attention, if each rotates all of its features.

    Raises:
        ValueError: If the family is unknown, if there is no such layer, or if
            one rotates a part of its features, has M-RoPE, or has Phi-3's
            rotary embedding for long contexts.
    """
    attentions = layers_with_maps(model)
    layers = [attentions[index] for index in global_layers(model)]
    for layer in layers:
        if not rotates_plainly(layer):
            raise ValueError(
                "Rotary embeddings must rotate all features of a head, by one "
                f"set of frequencies. Received: decoder layer {layer.index} of "
                f"{backbone_of(model).name!r}, which rotates "
                f"{layer.rotary_dim} of {layer.head_dim} features with "
                f"{type(layer.rotary).__name__}"
            )
    return layers


def rotates_plainly(layer: DecoderLayer) -> bool:
    """Whether a layer rotates all features of a head by fixed frequencies."""
    return (
        isinstance(layer, AttentionLayer)
        and layer.rotary_dim == layer.head_dim
        and not is_su_scaled(layer)
    )


def check_no_dropout(model: keras.Model, name: str) -> None:
    """Refuses a model with dropout, for the scope called `name`."""
    dropout = getattr(backbone_of(model), "dropout", 0.0)
    if dropout:
        raise ValueError(
            f"`{name}` needs a model without dropout. "
            f"Received: backbone.dropout={dropout}"
        )


def indices_of_global(layers: Sequence[DecoderLayer], name: str) -> list[int]:
    """As `global_layers`, for the `layers` of the model called `name`."""
    indices = [layer.index for layer in layers if layer.kind == "global"]
    if not indices:
        raise ValueError(
            "The model must have a decoder layer with full attention, without "
            "a sliding window: a sliding window sees no further in a longer "
            f"prompt. Received: {name!r}, without any such layer"
        )
    return indices


def chosen_layers(model: keras.Model, layers: Sequence[int]) -> list[int]:
    """Indices of layers with full attention, checked.

    Args:
        model: As in `families.attention_layers`.
        layers: Sequence of integers, from 0, or negative from the last.

    Returns:
        A list of integers from 0.

    Raises:
        TypeError: If `layers` is not a sequence of integers.
        ValueError: If `layers` is empty, or an index is out of range or that of
            a layer without full attention.
    """
    count = len(attention_layers(model))
    layers = check_indices("layers", layers)
    if not len(layers) or any(not -count <= i < count for i in layers):
        raise ValueError(
            f"`layers` must be one or more indices of the model's {count} "
            f"decoder layers. Received: layers={layers!r}. "
            "Pass `(-1,)` for the last one."
        )
    chosen = [i % count for i in layers]
    full = global_layers(model)
    if not set(chosen) <= set(full):
        raise ValueError(
            "`layers` must be decoder layers with full attention, not with a "
            "sliding window or linear attention. "
            f"Received: layers={layers!r}. "
            f"Those with full attention are {full}."
        )
    return chosen


def image_layout(model: keras.Model) -> dict[str, Any]:
    """The settings that decide how many tokens an image becomes."""
    backbone = backbone_of(model)
    parts = (backbone, getattr(backbone, "vision_encoder", None))
    return {
        name: getattr(part, name)
        for part in parts
        for name in family_of(model).image_attributes
        if hasattr(part, name)
    }


def input_names(model: keras.Model) -> list[str]:
    """Names of the inputs that a model reads."""
    return list(backbone_of(model).input)


def check_values(model: keras.Model) -> None:
    """Refuses to run a model while `fit` holds the values of its variables."""
    variable = backbone_of(model).token_embedding.weights[0]
    try:
        _ = variable.value
    except TypeError as error:  # Keras raises it for a variable with no value.
        raise RuntimeError(
            "A model can run only while it holds the values of its variables. "
            "On JAX, `fit` takes them out of the model during an epoch and "
            f"passes them from step to step. Received: {model.name!r} between "
            "two steps, as in `on_train_batch_end`. In the callback, reach it "
            "by `self.model`, as in `self.model.student`: `self.model` puts "
            "the values back. Or run it in `on_epoch_end`."
        ) from error


def check_inputs(model: keras.Model, inputs: dict[str, Tensor]) -> None:
    """Refuses inputs that lack a name, or whose shapes or tokens do not fit."""
    check_kind("inputs", inputs, dict, "a dictionary of the model's inputs")
    missing = [name for name in input_names(model) if name not in inputs]
    if missing:
        raise ValueError(
            f"The model's inputs must have {input_names(model)}. "
            f"Received: inputs with {list(inputs)}, without {missing}"
        )
    token_ids = inputs["token_ids"]
    check_shape("token_ids", token_ids, batch=None, length=None)
    check_dtype("token_ids", token_ids, "int")
    vocabulary = backbone_of(model).vocabulary_size
    check_tokens("token_ids", token_ids, vocabulary, least=0)
    batch, length = token_ids.shape
    if length is None and has_linear_layers(model):
        raise ValueError(
            "All prompts of a model with linear layers must have one length "
            "where TensorFlow compiles a step, which must know how many chunks "
            "of tokens these layers read. Received: "
            f"token_ids.shape={tuple(token_ids.shape)}. Give batches of one "
            "length, such as prompts with equally many images, or compile "
            "with `run_eagerly=True`."
        )
    for name in TOKEN_MASKS:
        if name in inputs:
            check_shape(name, inputs[name], batch=batch, length=length)


def is_mixed_float16(model: keras.Model) -> bool:
    """Whether any layer computes in float16 and keeps float32 weights."""
    return any(
        (layer.compute_dtype, layer.variable_dtype) == ("float16", "float32")
        for layer in backbone_of(model)._flatten_layers()
    )


@contextlib.contextmanager
def replaced_method(layer: Any, name: str, function: Any) -> Iterator[None]:
    """Scope in which `layer.name` is `function`, for this one layer."""
    # In the instance's own dictionary: Keras tracks what `setattr` sets.
    attributes = vars(layer)
    outer = {name: attributes[name]} if name in attributes else {}
    attributes[name] = function
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(outer)
