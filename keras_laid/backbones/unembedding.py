"""Reads a KerasHub model's last hidden states, and how it unembeds them."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator

import keras
from keras import ops

from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import replaced_method
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor


@contextlib.contextmanager
def hidden_states_for_logits(model: keras.Model) -> Iterator[None]:
    """Scope in which a causal LM returns hidden states instead of logits.

    Inside, a call of the model returns its last hidden states, of shape
    `(batch, length, hidden_dim)`. Pass them to `unembedding` for the logits. On
    exit the model is as it was before, even if its call raised an error.

    Args:
        model: A `keras_hub.models.CausalLM` of a family that
            `keras_laid.backbones.attention_layers` knows, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`.
    """
    embedding = backbone_of(model).token_embedding
    name = "quantized_call" if is_quantized(embedding) else "call"
    embed = getattr(embedding, name)

    def call(inputs: Tensor, reverse: bool = False) -> Tensor:
        return inputs if reverse else embed(inputs)

    with replaced_method(embedding, name, call):
        yield


def unembedding(model: keras.Model, hidden: Tensor) -> Unembedding:
    """The `keras_laid.ops.Unembedding` of a model's last hidden states.

    Its logits equal those of the model, and are computed in the same dtype.
    Gradients reach the embedding, also through LoRA. The weights of a quantised
    embedding are dequantised all at once.
    """
    embedding = backbone_of(model).token_embedding
    dtype = embedding.reverse_dtype or embedding.compute_dtype
    if is_quantized(embedding):
        if embedding.inputs_quantizer:
            hidden = rounded(embedding.inputs_quantizer, hidden, dtype)
        kernel = dequantized_kernel(embedding)
    elif embedding.tie_weights:
        kernel = ops.transpose(embedding.embeddings)
    else:
        kernel = ops.convert_to_tensor(embedding.reverse_embeddings)
    return Unembedding(
        ops.cast(hidden, dtype),
        ops.cast(kernel, dtype),
        embedding.logit_soft_cap,
    )


def rounded(
    quantizer: Callable[[Tensor], tuple[Tensor, Tensor]],
    hidden: Tensor,
    dtype: str,
) -> Tensor:
    """Hidden states as a quantiser rounds them, with a gradient.

    The gradient goes straight through, as if nothing were rounded. The gradient
    of rounding is 0, and no layer below would learn from it.
    """
    integers, scale = quantizer(hidden)
    values = ops.cast(integers, dtype) / ops.cast(scale, dtype)
    hidden = ops.cast(hidden, dtype)
    return ops.stop_gradient(values) + (hidden - ops.stop_gradient(hidden))


def is_quantized(embedding: keras.layers.Layer) -> bool:
    return embedding.quantization_mode is not None


def dequantized_kernel(embedding: keras.layers.Layer) -> Tensor:
    """The kernel: the layer's outputs for unit vectors, rounded exactly."""
    units = ops.eye(embedding.output_dim, dtype=embedding.compute_dtype)
    with replaced_method(embedding, "logit_soft_cap", None):
        return embedding(units, reverse=True)
