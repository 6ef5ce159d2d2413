"""Puts gains on the rotary frequencies of a KerasHub model, and folds them."""

import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_indices
from keras_laid.arguments import check_switch
from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.compiled import compiled_functions
from keras_laid.backbones.compiled import make_anew
from keras_laid.backbones.compiled import models_around
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import global_layers
from keras_laid.backbones.families import FAMILIES
from keras_laid.backbones.families import attention_layers
from keras_laid.backbones.families import layers_with_maps
from keras_laid.backbones.gain_folding import check_foldable
from keras_laid.backbones.gain_folding import scale_weights
from keras_laid.layers.gain_modulated_rotary_embedding import (
    GainModulatedRotaryEmbedding,
)
from keras_laid.typing import PathLike
from keras_laid.typing import Tensor


def attach_gain_modulation(
    model: keras.Model,
    layers: Sequence[int] | np.ndarray | None = None,
    per_head: bool = False,
    max_gain: float = 4.0,
) -> list[GainModulatedRotaryEmbedding]:
    """Puts a trainable gain on each rotary frequency of a model, in place.

    The contribution of each frequency to the attention logits of the chosen
    decoder layers is multiplied by a gain
    (see `keras_laid.layers.GainModulatedRotaryEmbedding`). All gains are 1 at
    first: no weight and no output of the model changes. The gains are among
    `model.trainable_variables`, also where the rest of the model is frozen.
    `enable_lora` would freeze the gains, so call it first.

    Every Keras model that runs the same backbone changes with it, as
    `keras_laid.yarn` explains. If such a model has been trained or evaluated,
    compile it again before you resume training: its optimizer knows only the
    old variables, and Keras raises a `ValueError` in the next training step.

    With gains, `model.save("model.keras")` and `keras.models.load_model` work
    as before, and so do `save_weights` and `load_weights` between models with
    the same gains. `save_to_preset` raises a `ValueError` until
    `fold_gain_modulation` is called. To save in this way, the backbone's class
    is replaced by a subclass until then.

    Args:
        model: A `keras_hub.models.CausalLM` or its backbone, of a family that
            `keras_laid.backbones.attention_layers` knows, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`.
        layers: Optional sequence of integers, the indices of decoder layers,
            from 0, or negative from the last. Each must have full attention,
            not a sliding window or linear attention. Defaults to all layers
            with full attention.
        per_head: Boolean. `False` means one gain per frequency, shared by all
            heads and split evenly between queries and keys, or only on queries
            where layers share keys (Gemma 4). `True` means one gain per query
            head and frequency, only on queries. These gains cannot be folded
            where queries are normalized (Gemma 3, Gemma 4, Qwen 3, Qwen 3.5).
            Defaults to `False`.
        max_gain: Float greater than 1. Gains stay within
            `[1 / max_gain, max_gain]`. Defaults to `4.0`.

    Returns:
        The new layers, a list of `GainModulatedRotaryEmbedding`, in the order
        of the model's layers.

    Raises:
        TypeError: If `layers` is not a sequence of integers, or another
            argument has the wrong type.
        ValueError: If the model's family is unknown or it already has gains, if
            `layers` is empty, out of range, repeats a layer, or names one
            without full attention, or if `max_gain` is out of its range. The
            model is then unchanged.

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
    # Keras saves a model's class and config, so the class must know how to
    # build the gains again. (`torch.nn.utils.parametrize` does the same.)
    # mypy considers a class of unknown type unhashable.
    gained_class = gain_modulated(type(backbone))  # type: ignore[arg-type]
    gains = _attach(backbone, layers, per_head, max_gain)
    object.__setattr__(backbone, "__class__", gained_class)
    if model is not backbone:
        save = functools.partial(_save_to_preset, model)
        vars(model)["save_to_preset"] = save
    _forget_variables(model)
    return gains


def fold_gain_modulation(model: keras.Model) -> None:
    """Multiplies a model's gains into its weights, in place.

    The result is a plain KerasHub model with the same outputs, up to rounding,
    and no gains: `save_to_preset` writes an ordinary preset.

    Gains go into the kernels and biases of queries and keys or, where these are
    normalized after the projection, into the scales of the norms. Gains that
    act on queries and keys are split: both are multiplied by the square root.
    Gains of each head, and gains of layers that share keys (Gemma 4), go only
    to queries. Where LoRA is enabled on a kernel, shared gains are multiplied
    into its second factor too; adapters saved from then on belong to the folded
    kernels.

    Every Keras model that runs the same backbone changes with it, as
    `keras_laid.yarn` explains. If such a model has trained the gains, compile
    it again before you resume training.

    Args:
        model: A model that `attach_gain_modulation` was called on.

    Raises:
        ValueError: If the model has no gains, if a kernel that they go into is
            quantized, or if gains of each head would go into a kernel with LoRA
            or into the norm of the queries. The model is then unchanged.
    """
    backbone = backbone_of(model)
    gained = gains_by_index(backbone)
    if not gained:
        raise ValueError(
            "The model must have gains to fold. "
            f"Received: {backbone.name!r}, which has none. "
            "Call `attach_gain_modulation` first."
        )
    layers = [layers_with_maps(backbone)[index] for index in gained]
    for layer, gain in zip(layers, gained.values(), strict=True):
        for part in _modulated_parts(layer, gain):
            check_foldable(layer, part, gain)
    for layer, gain in zip(layers, gained.values(), strict=True):
        feature_gains = _feature_gains(layer, gain)
        _take_out(layer, gain)
        for part in _modulated_parts(layer, gain):
            scale_weights(layer, part, feature_gains)
    object.__setattr__(backbone, "__class__", type(backbone).plain_class)
    vars(model).pop("save_to_preset", None)
    _forget_variables(model)


def gain_layers(model: keras.Model) -> list[GainModulatedRotaryEmbedding]:
    """The layers that hold a model's gains, first to last.

    Args:
        model: As in `attach_gain_modulation`.

    Returns:
        A list of `GainModulatedRotaryEmbedding`, empty if there are no gains.
    """
    return list(gains_by_index(backbone_of(model)).values())


class GainModulation:
    """The additional methods of a KerasHub backbone with gains.

    `attach_gain_modulation` changes the class of a plain backbone to a subclass
    with this mixin, and `fold_gain_modulation` changes it back. It exists so
    that Keras can save and load a model with gains; you need not create one
    yourself.

    Args:
        *args: Positional arguments of the plain backbone's class.
        gain_modulation: Dictionary with the arguments `"layers"`, `"per_head"`
            and `"max_gain"` of `attach_gain_modulation`.
        **kwargs: Keyword arguments of the plain backbone's class.
    """

    def __init__(
        self, *args: Any, gain_modulation: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        _attach(self, **gain_modulation)
        _forget_variables(self)

    def get_config(self) -> dict[str, Any]:
        gained = gains_by_index(self)
        first = next(iter(gained.values()))
        # From the plain class, the other parent.
        config = super().get_config()  # type: ignore[misc]
        config["gain_modulation"] = {
            "layers": list(gained),
            "per_head": first.num_heads is not None,
            "max_gain": first.max_gain,
        }
        return config

    def save_to_preset(
        self, preset_dir: PathLike, max_shard_size: float = 10
    ) -> None:
        check_no_gains(self, preset_dir)


def check_no_gains(model: keras.Model, preset_dir: PathLike) -> None:
    """Refuses to save a model with gains as a preset."""
    if gain_layers(model):
        raise ValueError(
            "A model must have no gains to be saved as a preset: presets load "
            "without keras_laid, and the gains would be lost. "
            f"Received: preset_dir={preset_dir!r}. "
            "Call `keras_laid.fold_gain_modulation(model)` first, or keep the "
            'gains with `model.save("model.keras")`.'
        )


def _save_to_preset(
    task: keras.Model, preset_dir: PathLike, max_shard_size: float = 10
) -> None:
    """A task's `save_to_preset`, which refuses before it writes any file.

    KerasHub's writes the task's config before the backbone can refuse.
    """
    check_no_gains(task, preset_dir)
    type(task).save_to_preset(task, preset_dir, max_shard_size)


@functools.cache
def gain_modulated(plain_class: type[keras.Model]) -> type[keras.Model]:
    """The class of a backbone with gains, registered with Keras."""
    if plain_class not in FAMILIES:
        raise ValueError(
            "The backbone must be of a class in `families.FAMILIES` itself, "
            "not of a subclass, which could not be saved with gains. "
            f"Received: {plain_class.__name__}"
        )
    gained_class = type(
        f"GainModulated{plain_class.__name__}",
        (GainModulation, plain_class),
        {"plain_class": plain_class, "__module__": __name__},
    )
    return keras.saving.register_keras_serializable("keras_laid")(gained_class)


for _plain_class in FAMILIES:  # Keras needs these classes to load a file.
    gain_modulated(_plain_class)


def _attach(
    backbone: keras.Model,
    layers: Sequence[int] | np.ndarray | None,
    per_head: bool,
    max_gain: float,
) -> list[GainModulatedRotaryEmbedding]:
    check_switch("per_head", per_head)
    chosen = _chosen_indices(backbone, layers)
    # All gains are made before one is put in, so an error changes nothing.
    gains = [_new_gain(backbone, i, per_head, max_gain) for i in chosen]
    attentions = layers_with_maps(backbone)
    for index, gain in zip(chosen, gains, strict=True):
        _put_in(attentions[index], gain)
    return gains


def _chosen_indices(
    backbone: keras.Model, layers: Sequence[int] | np.ndarray | None
) -> list[int]:
    """`layers` as indices from 0, in order."""
    count = len(attention_layers(backbone))
    full = global_layers(backbone)
    layers = full if layers is None else check_indices("layers", layers)
    if not layers:
        raise ValueError(
            "`layers` must name at least one decoder layer with full "
            f"attention. The model's are {full}. Received: layers={layers!r}"
        )
    if any(not -count <= index < count for index in layers):
        raise ValueError(
            f"`layers` must be indices of the model's {count} decoder layers. "
            f"Received: layers={layers!r}"
        )
    chosen = sorted(index % count for index in layers)
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            "`layers` must name each decoder layer once. "
            f"Received: layers={layers!r}, for {count} decoder layers"
        )
    others = [index for index in chosen if index not in full]
    if others:
        raise ValueError(
            "`layers` must be decoder layers with full attention, not with a "
            "sliding window or linear attention. "
            f"Received: layers={layers!r}, of which {others} do not have full "
            f"attention. Those with full attention are {full}."
        )
    return chosen


def _new_gain(
    backbone: keras.Model, index: int, per_head: bool, max_gain: float
) -> GainModulatedRotaryEmbedding:
    """A built gain layer for the rotary frequencies of a decoder layer."""
    layer = layers_with_maps(backbone)[index]
    heads = layer.num_query_heads if per_head else None
    shares_keys = layer.lends_keys or layer.keys_from is not None
    gain = GainModulatedRotaryEmbedding(
        max_wavelength=layer.wavelength,
        num_heads=heads,
        max_gain=max_gain,
        applied_to="queries" if per_head or shares_keys else None,
        dtype=layer.layer.dtype_policy,
        name="rotary_gain",
    )
    # With these scopes the variable's path names its layers, as for any weight.
    block = backbone.transformer_layers[index]
    with keras.name_scope(block.name), keras.name_scope(layer.layer.name):
        gain.build((None, None, heads, layer.rotary_dim))
    return gain


def _put_in(layer: AttentionLayer, gain: GainModulatedRotaryEmbedding) -> None:
    attention = layer.layer
    # Keras locks a layer when it is built.
    attention._tracker.unlock()
    attention.rotary_gain = gain
    attention._tracker.lock()
    # Gains and rotation commute, so gains may come before the rotation. There,
    # queries and keys come from different layers, also in models where KerasHub
    # rotates without calling a layer.
    modulate = functools.partial(_modulate, layer, gain)
    for part in _modulated_parts(layer, gain):
        if layer.norm_offset is None:
            part.activation = modulate
        else:
            vars(part)["call"] = functools.partial(_then, part.call, modulate)


def _take_out(
    layer: AttentionLayer, gain: GainModulatedRotaryEmbedding
) -> None:
    """The reverse of `_put_in`."""
    attention = layer.layer
    attention._tracker.untrack(gain)
    del attention.rotary_gain
    for part in _modulated_parts(layer, gain):
        if layer.norm_offset is None:
            part.activation = keras.activations.linear
        else:
            del vars(part)["call"]


def _then(
    call: Callable[[Tensor], Tensor],
    modulate: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    return modulate(call(x))


def _modulate(
    layer: AttentionLayer, gain: GainModulatedRotaryEmbedding, x: Tensor
) -> Tensor:
    """Queries or keys before their rotation, times their gains."""
    # Multiplied in float32 and rounded once, as `gain.modulate` does.
    wide = keras.backend.result_type(x.dtype, "float32")
    gains = ops.cast(_feature_gains(layer, gain), wide)
    return ops.cast(ops.cast(x, wide) * gains, x.dtype)


def _feature_gains(
    layer: AttentionLayer, gain: GainModulatedRotaryEmbedding
) -> Tensor:
    """`gain.feature_gains()` for a whole head: 1 for features not rotated."""
    gains = gain.feature_gains()
    half, far = layer.rotary_dim // 2, layer.pair_distance
    source = np.full(layer.head_dim, 2 * half)
    source[:half] = np.arange(half)
    source[far : far + half] = np.arange(half, 2 * half)
    ones = ops.ones_like(gains[..., :1])
    return ops.take(ops.concatenate([gains, ones], -1), source, axis=-1)


def gains_by_index(
    backbone: keras.Model,
) -> dict[int, GainModulatedRotaryEmbedding]:
    """The gain layers, by the index of their decoder layer, from 0."""
    return {
        index: layer.layer.rotary_gain
        for index, layer in layers_with_maps(backbone).items()
        if hasattr(layer.layer, "rotary_gain")
    }


def _modulated_parts(
    layer: AttentionLayer, gain: GainModulatedRotaryEmbedding
) -> list[keras.layers.Layer]:
    if gain.applied_to == "queries":
        return [layer.query_layer]
    return [layer.query_layer, layer.key_layer]


def _forget_variables(model: keras.Model) -> None:
    """Makes all models around a backbone forget its old variables."""
    owners = models_around(model)
    for owner, name in compiled_functions(owners):
        make_anew(owner, name)
    if keras.config.backend() == "torch":
        # `zero_grad` uses the list of parameters that each layer made when it
        # was built.
        for owner in owners:
            for layer in owner._flatten_layers():
                layer._track_variables()
