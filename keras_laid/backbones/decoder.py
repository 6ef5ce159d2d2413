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
    """Those without a sliding window, of which there must be one."""
    layers = [
        layer
        for layer in attention_layers(model)
        if not layer.use_sliding_window_attention
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
