"""Which features of a query or key belong to which rotary frequency."""

import math

from keras import ops

from keras_laid.backbones.families import attention_layers


def rotary_wavelengths(model, layer=-1):
    """Wavelengths of the rotary embedding of a decoder layer.

    Args:
        model: A `keras_hub.models.PaliGemmaCausalLM`, its backbone, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`.
        layer: Integer, index of the decoder layer. Defaults to the last one.

    Returns:
        A float array of shape `(frequencies,)`, ascending: in how many tokens
        each frequency turns a pair of features by a whole circle.
    """
    attention = attention_layers(model)[layer]
    rates = attention.rotary._get_inverse_freq(attention.rotary_dim)
    return 2 * math.pi / ops.convert_to_numpy(rates)


def sum_over_pairs(x):
    """Sums over the two features that a frequency rotates.

    Args:
        x: Tensor of shape `(..., features)`, of captured queries or keys.

    Returns:
        A tensor of shape `(..., features // 2)`, highest frequency first.
    """
    # KerasHub rotates feature k with k + features / 2. Its Gemma then puts the
    # two side by side (`_apply_rope`), and that is what is captured.
    return ops.sum(ops.reshape(x, (*x.shape[:-1], -1, 2)), axis=-1)
