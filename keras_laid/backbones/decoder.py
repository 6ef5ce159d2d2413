"""What every tool that reaches into a KerasHub decoder needs."""

import contextlib

from keras_hub.models import PaliGemmaBackbone

from keras_laid.backbones.families import attention_layers

# By their names in any family.
IMAGE_ATTRIBUTES = (
    "image_size",
    "image_sequence_length",
    "num_vision_tokens_per_image",
    "patch_size",
    "pool_size",
    "spatial_merge_size",
    "temporal_patch_size",
)


def backbone_of(model):
    """The backbone of a task, or the backbone itself."""
    return getattr(model, "backbone", model)


def pali_gemma_backbone_of(model):
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


def global_layers(model):
    """Indices of the layers with full attention, of which one must be."""
    return indices_of_global(attention_layers(model), backbone_of(model).name)


def indices_of_global(layers, name):
    """The same, of a list of `families.AttentionLayer` of a model so named."""
    indices = [layer.index for layer in layers if layer.kind == "global"]
    if not indices:
        raise ValueError(
            "The model must have a decoder layer with full attention, without "
            "a sliding window, which sees no further in a longer prompt. "
            f"Received: {name!r}, without any"
        )
    return indices


def chosen_layers(model, layers):
    """Indices of layers with full attention, checked.

    Args:
        model: As in `families.attention_layers`.
        layers: Sequence of integers, from 0, or negative from the last.

    Returns:
        A list of integers from 0.

    Raises:
        ValueError: If `layers` is empty, or an index is out of range or that of
            a layer without full attention.
    """
    count = len(attention_layers(model))
    if not len(layers) or any(not -count <= i < count for i in layers):
        raise ValueError(
            f"`layers` must be one or more indices of the model's {count} "
            f"decoder layers. Received: layers={layers!r}. "
            "Pass `(-1,)` for the last one."
        )
    chosen = [int(i) % count for i in layers]
    full = global_layers(model)
    if not set(chosen) <= set(full):
        raise ValueError(
            "`layers` must be decoder layers with full attention, not with a "
            f"sliding window. Received: layers={layers!r}. "
            f"Those with full attention are {full}."
        )
    return chosen


def image_layout(model):
    """What decides how many tokens an image becomes, and in which order."""
    backbone = backbone_of(model)
    parts = (backbone, getattr(backbone, "vision_encoder", None))
    return {
        name: getattr(part, name)
        for part in parts
        for name in IMAGE_ATTRIBUTES
        if hasattr(part, name)
    }


def input_names(model):
    """Names of the inputs that a model reads."""
    return list(backbone_of(model).input)


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
    outer = {name: attributes[name]} if name in attributes else {}
    attributes[name] = function
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(outer)
