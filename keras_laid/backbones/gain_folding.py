"""Multiplies gains into the weights of the layer that they act on."""

import keras
from keras import ops

from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.layers.gain_modulated_rotary_embedding import (
    GainModulatedRotaryEmbedding,
)
from keras_laid.typing import Tensor


def check_foldable(
    layer: AttentionLayer,
    part: keras.layers.Layer,
    gain: GainModulatedRotaryEmbedding,
) -> None:
    """Refuses gains that cannot be multiplied into the layer's weights."""
    where = f"the {part.name} layer of decoder layer {layer.index}"
    if layer.norm_offset is not None:
        if gain.num_heads is not None:
            raise ValueError(
                "Gains of each head cannot be multiplied into the scale of a "
                "norm, which the heads share. "
                f"Received: {where}, with num_heads={gain.num_heads}. "
                "Attach gains with `per_head=False`, or keep them and save "
                'with `model.save("model.keras")`.'
            )
        return
    if part.quantization_mode is not None:
        raise ValueError(
            "Kernels that gains are multiplied into must not be quantized. "
            f"Received: {where}, with "
            f"quantization_mode={part.quantization_mode!r}. "
            "Fold before `quantize`, or keep the gains and save with "
            '`model.save("model.keras")`.'
        )
    if part.lora_enabled and gain.num_heads is not None:
        raise ValueError(
            "Gains of each head cannot be multiplied into LoRA's factors, "
            "which are shared by the heads. "
            f"Received: {where}, with lora_rank={part.lora_rank}. "
            'Save with `model.save("model.keras")`, which merges LoRA into the '
            "kernels, then load and fold the loaded model."
        )


def scale_weights(
    layer: AttentionLayer, part: keras.layers.Layer, feature_gains: Tensor
) -> None:
    """Multiplies the weights of a norm or a projection by gains, in float32."""
    if layer.norm_offset is not None:
        scale = ops.cast(part.scale, "float32") + layer.norm_offset
        part.scale.assign(scale * feature_gains - layer.norm_offset)
        return
    scale = feature_gains  # (features,) or (heads, features)
    inputs, output = part.equation.split("->")
    kernel_axes = inputs.split(",")[1]
    if kernel_axes[0] == output[-2]:  # The kernel's heads come first.
        scale = ops.expand_dims(scale, axis=-2)
    kernel = part._kernel  # `part.kernel` is a sum where LoRA is enabled.
    kernel.assign(ops.cast(kernel, "float32") * scale)
    if part.bias is not None:
        part.bias.assign(ops.cast(part.bias, "float32") * feature_gains)
    if part.lora_enabled:
        # (rank, features)
        part.lora_kernel_b.assign(part.lora_kernel_b * feature_gains)
