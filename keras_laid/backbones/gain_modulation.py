"""Puts gains on the rotary frequencies of a KerasHub model, and folds them."""

import numbers

import keras
from keras import ops
from keras_hub.layers import RotaryEmbedding
from keras_hub.models import PaliGemmaBackbone

from keras_laid.backbones.decoder import attention_layers
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import forget_compiled
from keras_laid.layers.gain_modulated_rotary_embedding import (
    GainModulatedRotaryEmbedding,
)


def attach_gain_modulation(model, layers=None, per_head=False, max_gain=4.0):
    """Puts a trainable gain on each rotary frequency of a model, in place.

    The contribution of each frequency to the attention logits of the chosen
    decoder layers is multiplied by a gain
    (see `keras_laid.layers.GainModulatedRotaryEmbedding`). All gains are 1 at
    first: no weight and no output of the model changes. The gains are among
    `model.trainable_variables`, also where the rest of the model is frozen;
    `enable_lora` freezes them, so call it before.

    Compile the model after attaching: its compiled functions are dropped here,
    but an optimizer that has already trained knows the old variables alone.
    Attach before you wrap the model (in a
    `keras_laid.MultiImagePaliGemmaCausalLM` or a distiller), or compile that
    too.

    With gains, `model.save("model.keras")` and `keras.models.load_model` work
    as before, and so do `save_weights` and `load_weights` between models with
    the same gains; `save_to_preset` refuses until `fold_gain_modulation` is
    called. To do so, the backbone becomes a
    `GainModulatedPaliGemmaBackbone`, until then.

    Args:
        model: A `keras_hub.models.PaliGemmaCausalLM`, a
            `keras_hub.models.PaliGemmaBackbone`, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`.
        layers: Optional sequence of integers, the indices of decoder layers,
            from 0, or negative from the last. Only layers with full attention,
            not those with a sliding window. Defaults to all of those.
        per_head: Boolean. `False` is one gain a frequency, shared by all heads
            and split evenly between queries and keys. `True` is one a query
            head and frequency, on queries alone. Defaults to `False`.
        max_gain: Float greater than 1. No gain exceeds it, nor is less than its
            inverse. Defaults to `4.0`.

    Returns:
        The new layers, a list of `GainModulatedRotaryEmbedding`, in the order
        of the model's layers.

    Raises:
        TypeError: If `layers` is not a sequence of integers.
        ValueError: If the model is of another kind or already has gains, if
            `layers` is empty, out of range, repeats a layer, or names one with
            a sliding window, or if `max_gain` is out of its range. The model is
            then unchanged.

    Example:

    ```python
    model = keras_hub.models.PaliGemmaCausalLM.from_preset("my_preset")
    keras_laid.attach_gain_modulation(model)
    model.compile(optimizer=keras.optimizers.AdamW(1e-4))
    model.fit(dataset)
    keras_laid.fold_gain_modulation(model)
    model.save_to_preset("my_tuned_preset")
    ```
    """
    backbone = backbone_of(model)
    if gain_layers(backbone):
        raise ValueError(
            "The model must have no gains yet. "
            f"Received: {backbone.name!r}, with gains in layers "
            f"{list(gains_by_index(backbone))}. "
            "Call `fold_gain_modulation` first to keep their effect."
        )
    if type(backbone) is not PaliGemmaBackbone:
        raise ValueError(
            "The backbone must be a `keras_hub.models.PaliGemmaBackbone` "
            "itself, not a subclass, which could not be saved with gains. "
            f"Received: {type(backbone).__name__}"
        )
    gains = _attach(backbone, layers, per_head, max_gain)
    # Keras writes a model's class and `get_config`: the class says how to
    # build the gains again. (`torch.nn.utils.parametrize` does the same.)
    object.__setattr__(backbone, "__class__", GainModulatedPaliGemmaBackbone)
    _forget_compiled(model)
    return gains


def fold_gain_modulation(model):
    """Multiplies a model's gains into its query and key kernels, in place.

    What is left is a plain KerasHub model with the same outputs, up to
    rounding, and no gains: `save_to_preset` writes an ordinary preset.

    Shared gains are split: the square root goes into the query kernel, the
    square root into the key kernel. Gains of each head go into the query kernel
    alone. Where LoRA is enabled, shared gains are multiplied into its second
    factor too; adapters saved from then on belong to the folded kernels.

    Compile the model afterwards. Its compiled functions are dropped here.

    Args:
        model: A model that `attach_gain_modulation` was called on.

    Raises:
        ValueError: If the model has no gains, if a query or key kernel is
            quantized, or if gains of each head meet LoRA on the queries. The
            model is then unchanged.
    """
    backbone = backbone_of(model)
    gained = gains_by_index(backbone)
    if not gained:
        raise ValueError(
            "The model must have gains to fold. "
            f"Received: {backbone.name!r}, which has none. "
            "Call `attach_gain_modulation` first."
        )
    attentions = attention_layers(backbone)
    for index, gain in gained.items():
        for dense in _modulated_projections(attentions[index], gain):
            _check_foldable(index, dense, gain)
    for index, gain in gained.items():
        attention = attentions[index]
        for dense in _modulated_projections(attention, gain):
            _scale_kernel(dense, gain.feature_gains())
        _take_out(attention, gain)
    object.__setattr__(backbone, "__class__", PaliGemmaBackbone)
    _forget_compiled(model)


def gain_layers(model):
    """The layers that hold a model's gains, first to last.

    Args:
        model: As in `attach_gain_modulation`.

    Returns:
        A list of `GainModulatedRotaryEmbedding`, empty if there are no gains.
    """
    return list(gains_by_index(backbone_of(model)).values())


@keras.saving.register_keras_serializable(package="keras_laid")
class GainModulatedPaliGemmaBackbone(PaliGemmaBackbone):
    """A `keras_hub.models.PaliGemmaBackbone` with gains attached.

    `attach_gain_modulation` makes it out of a plain backbone, and
    `fold_gain_modulation` makes it plain again; there is no need to make one
    by hand. It exists so that Keras can save and load a model with gains.

    Args:
        *args: As in `keras_hub.models.PaliGemmaBackbone`.
        gain_modulation: Dictionary with the arguments `"layers"`, `"per_head"`
            and `"max_gain"` of `attach_gain_modulation`.
        **kwargs: As in `keras_hub.models.PaliGemmaBackbone`.
    """

    def __init__(self, *args, gain_modulation, **kwargs):
        super().__init__(*args, **kwargs)
        _attach(self, **gain_modulation)
        _forget_compiled(self)

    def get_config(self):
        gained = gains_by_index(self)
        first = next(iter(gained.values()))
        config = super().get_config()
        config["gain_modulation"] = {
            "layers": list(gained),
            "per_head": first.num_heads is not None,
            "max_gain": first.max_gain,
        }
        return config

    def save_to_preset(self, preset_dir, max_shard_size=10):
        raise ValueError(
            "A model must have no gains to be saved as a preset: presets load "
            "without keras_laid, and the gains would be lost. "
            f"Received: preset_dir={preset_dir!r}. "
            "Call `keras_laid.fold_gain_modulation(model)` first, or keep the "
            'gains with `model.save("model.keras")`.'
        )


def _attach(backbone, layers, per_head, max_gain):
    chosen = _chosen_indices(backbone, layers)
    # All are made before one is put in: a refusal changes nothing.
    gains = [
        _new_gain(backbone.transformer_layers[index], per_head, max_gain)
        for index in chosen
    ]
    attentions = attention_layers(backbone)
    for index, gain in zip(chosen, gains, strict=True):
        _put_in(attentions[index], gain)
    return gains


def _chosen_indices(backbone, layers):
    """`layers` as indices from 0, in order."""
    attentions = attention_layers(backbone)
    count = len(attentions)
    full = [
        index
        for index, attention in enumerate(attentions)
        if not attention.use_sliding_window_attention
    ]
    if layers is None:
        layers = full
    if isinstance(layers, numbers.Number | str) or not all(
        isinstance(index, numbers.Integral) for index in layers
    ):
        raise TypeError(
            "`layers` must be a sequence of integers, or `None`. "
            f"Received: layers={layers!r}"
        )
    if not len(layers):
        raise ValueError(
            "`layers` must name at least one decoder layer with full "
            f"attention. The model's are {full}. Received: layers={layers!r}"
        )
    if any(not -count <= index < count for index in layers):
        raise ValueError(
            f"`layers` must be indices of the model's {count} decoder layers. "
            f"Received: layers={layers!r}"
        )
    chosen = sorted(int(index) % count for index in layers)
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            "`layers` must name each decoder layer once. "
            f"Received: layers={layers!r}, of {count}"
        )
    sliding = [index for index in chosen if index not in full]
    if sliding:
        raise ValueError(
            "`layers` must be decoder layers with full attention, not with a "
            f"sliding window. Received: layers={layers!r}, of which {sliding} "
            f"have a sliding window. Those with full attention are {full}."
        )
    return chosen


def _new_gain(block, per_head, max_gain):
    """A built gain layer, with the settings of a block's rotary embedding."""
    attention = block.attention
    heads = attention.num_query_heads if per_head else None
    config = attention.rope_layer.get_config()
    config.update(
        trainable=True,  # Also where the rest of the layer is frozen.
        dtype=attention.rope_layer.dtype_policy,
        num_heads=heads,
        max_gain=max_gain,
    )
    gain = GainModulatedRotaryEmbedding(**config)
    # The variable's path says where it is, as that of any other weight.
    with keras.name_scope(block.name), keras.name_scope(attention.name):
        gain.build((None, None, heads, attention.head_dim))
    return gain


def _put_in(attention, gain):
    if gain.num_heads is None:
        _replace_sublayer(attention, "rope_layer", gain)
    else:
        # KerasHub rotates queries and keys with one layer, which cannot tell
        # them apart. Gains and rotation commute, so gains of each head act on
        # the query projection, before the rotation.
        _replace_sublayer(attention, "query_gain", gain)
        attention.query_dense.activation = gain.modulate


def _take_out(attention, gain):
    """The reverse of `_put_in`."""
    if gain.num_heads is None:
        config = gain.get_config()
        for name in ("num_heads", "max_gain", "applied_to"):
            del config[name]
        config["dtype"] = gain.dtype_policy
        _replace_sublayer(attention, "rope_layer", RotaryEmbedding(**config))
    else:
        attention.query_dense.activation = keras.activations.linear
        attention._tracker.untrack(gain)
        del attention.query_gain


def _replace_sublayer(layer, name, sublayer):
    """Sets a sublayer of a built layer, which Keras has locked."""
    layer._tracker.untrack(getattr(layer, name, None))
    layer._tracker.unlock()
    setattr(layer, name, sublayer)
    layer._tracker.lock()


def gains_by_index(backbone):
    """The gain layers, by the index of their decoder layer, from 0."""
    gained = {}
    for index, attention in enumerate(attention_layers(backbone)):
        if isinstance(attention.rope_layer, GainModulatedRotaryEmbedding):
            gained[index] = attention.rope_layer
        elif hasattr(attention, "query_gain"):
            gained[index] = attention.query_gain
    return gained


def _modulated_projections(attention, gain):
    if gain.applied_to == "queries":
        return [attention.query_dense]
    return [attention.query_dense, attention.key_dense]


def _check_foldable(index, dense, gain):
    where = f"the {dense.name} projection of decoder layer {index}"
    if dense.quantization_mode is not None:
        raise ValueError(
            "Kernels must not be quantized to have gains multiplied in. "
            f"Received: {where}, with "
            f"quantization_mode={dense.quantization_mode!r}. "
            "Fold before `quantize`, or keep the gains and save with "
            '`model.save("model.keras")`.'
        )
    if dense.lora_enabled and gain.num_heads is not None:
        raise ValueError(
            "Gains of each head cannot be multiplied into LoRA's factors, "
            "which are shared by the heads. "
            f"Received: {where}, with lora_rank={dense.lora_rank}. "
            'Save with `model.save("model.keras")`, which merges LoRA into the '
            "kernels, then load and fold the loaded model."
        )


def _scale_kernel(dense, feature_gains):
    # The kernel is (heads, hidden, features); the gains are (features,) or
    # (heads, features).
    scale = ops.expand_dims(feature_gains, axis=-2)
    kernel = dense._kernel  # `dense.kernel` is a sum where LoRA is enabled.
    kernel.assign(ops.cast(kernel, "float32") * scale)
    if dense.lora_enabled:
        # (rank, features)
        dense.lora_kernel_b.assign(dense.lora_kernel_b * feature_gains)


def _forget_compiled(model):
    """Drops what a model and its backbone remember of their old variables."""
    forget_compiled(model)
    if keras.config.backend() == "torch":
        # `zero_grad` goes through the list of parameters that each layer made
        # when it was built.
        backbone = backbone_of(model)
        for block in backbone.transformer_layers:
            block.attention._track_variables()
            block._track_variables()
        backbone._track_variables()
        model._track_variables()
