"""Which features of a query or key belong to which rotary frequency."""

import math

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import is_integer
from keras_laid.backbones.attention_layer import LinearLayer
from keras_laid.backbones.attention_layer import is_su_scaled
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.families import attention_layers
from keras_laid.typing import Tensor


def rotary_wavelengths(model: keras.Model, layer: int = -1) -> np.ndarray:
    """Wavelengths of the rotary embedding of a decoder layer.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows.
        layer: Integer, index of the decoder layer. Defaults to the last one.

    Returns:
        A float array of shape `(frequencies,)`, ascending: the number of tokens
        over which each frequency rotates a pair of features by a full turn.

    Raises:
        ValueError: If the model's family is unknown, `layer` is out of range,
            or the layer does not have one fixed set of frequencies.
    """
    layers = attention_layers(model)
    if not is_integer(layer) or not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"`layer` must be an index of the model's {len(layers)} decoder "
            f"layers. Received: layer={layer!r:.80}"
        )
    attention = layers[layer]
    if isinstance(attention, LinearLayer) or is_su_scaled(attention):
        raise ValueError(
            "The decoder layer must have one set of rotary frequencies: layers "
            "with linear attention have none, and the frequencies of Phi-3 for "
            "long contexts depend on the prompt's length. "
            f"Received: layer={layer} of a {backbone_of(model).name!r}"
        )
    rates = attention.rotary._get_inverse_freq(attention.rotary_dim)
    return 2 * math.pi / ops.convert_to_numpy(rates)


def sum_over_pairs(x: Tensor) -> Tensor:
    """Sums over the two features that a frequency rotates.

    Args:
        x: Tensor of shape `(..., features)`, of captured queries or keys.

    Returns:
        A tensor of shape `(..., features // 2)`, highest frequency first.
    """
    # KerasHub rotates feature k with k + features / 2. Its Gemma then puts the
    # two side by side (`_apply_rope`), and queries and keys are captured after
    # that.
    return ops.sum(ops.reshape(x, (*x.shape[:-1], -1, 2)), axis=-1)
