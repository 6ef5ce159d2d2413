"""Where attention happens in a KerasHub decoder."""

import contextlib

from keras_hub.models import PaliGemmaBackbone


def backbone_of(model):
    """The `PaliGemmaBackbone` of a task, or the backbone itself."""
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, PaliGemmaBackbone):
        raise ValueError(
            "The model must be a `keras_hub.models.PaliGemmaCausalLM`, a "
            "`keras_hub.models.PaliGemmaBackbone`, or a "
            "`keras_laid.MultiImagePaliGemmaCausalLM`. "
            f"Received: {type(model).__name__}"
        )
    return backbone


def attention_layers(model):
    """The attention layers of the decoder, first to last."""
    return [block.attention for block in backbone_of(model).transformer_layers]


def full_attention_layers(model):
    """Indices of the layers without a sliding window, of which one must be."""
    layers = [
        index
        for index, attention in enumerate(attention_layers(model))
        if not attention.use_sliding_window_attention
    ]
    if not layers:
        raise ValueError(
            "The model must have a decoder layer without a sliding window: "
            "those with one see no further in a longer prompt. "
            f"Received: {model.name!r}, with sliding windows in all layers"
        )
    return layers


def forget_compiled(model):
    """Drops a model's and its backbone's compiled functions."""
    for part in (model, backbone_of(model)):
        part.train_function = None
        part.test_function = None
        part.predict_function = None
    if hasattr(model, "generate_function"):
        model.generate_function = None


def chosen_layers(model, layers):
    """Indices of layers without a sliding window, checked.

    Args:
        model: As in `backbone_of`.
        layers: Sequence of integers, from 0, or negative from the last.

    Returns:
        A list of integers from 0.

    Raises:
        ValueError: If `layers` is empty, or an index is out of range or that of
            a layer with a sliding window.
    """
    count = len(attention_layers(model))
    if not len(layers) or any(not -count <= i < count for i in layers):
        raise ValueError(
            f"`layers` must be one or more indices of the model's {count} "
            f"decoder layers. Received: layers={layers!r}. "
            "Pass `(-1,)` for the last one."
        )
    chosen = [int(i) % count for i in layers]
    full = full_attention_layers(model)
    if not set(chosen) <= set(full):
        raise ValueError(
            "`layers` must be decoder layers with full attention, not with a "
            f"sliding window. Received: layers={layers!r}. "
            f"Those with full attention are {full}."
        )
    return chosen


@contextlib.contextmanager
def replaced_method(layer, name, function):
    """Scope in which `layer.name` is `function`, for this one layer."""
    # In the instance's own dictionary: Keras tracks what `setattr` sets.
    attributes = vars(layer)
    outer = attributes.get(name)
    attributes[name] = function
    try:
        yield
    finally:
        if outer is None:
            del attributes[name]
        else:
            attributes[name] = outer
