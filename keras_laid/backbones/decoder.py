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
