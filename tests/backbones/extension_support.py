"""Shared by tests of untrained extensions: an oracle, and ways to run."""

import numpy as np
from keras import ops

from tests.support import PALI_GEMMA
from tests.support import PALI_GEMMA_2
from tests.support import attention_of
from tests.support import make_multi_image
from tests.support import to_numpy

# The second has a soft cap, several key heads and another scale.
CONFIGS = [PALI_GEMMA, dict(PALI_GEMMA_2, query_head_dim_normalize=False)]


def make_model(config=None):
    """A model whose attention is sharp, so that positions show."""
    model = make_multi_image(config)
    for layer in attention_of(model):
        for dense in (layer.query_dense, layer.key_dense):
            dense.kernel.assign(1.5 * dense.kernel)
    return model


def make_inputs(images=3, batch=2, length=9, prompt=6):
    rng = np.random.default_rng(0)
    index = np.arange(length)
    return {
        "images": rng.normal(size=(batch, images, 16, 16, 3)).astype("float32"),
        "token_ids": rng.integers(4, 40, (batch, length)).astype("int32"),
        "padding_mask": np.ones((batch, length), "int32"),
        "response_mask": np.tile((index >= prompt) * 1, (batch, 1)),
    }


def random_positions(length=21, batch=2):
    rng = np.random.default_rng(4)
    chosen = [rng.choice(80, length, replace=False) for _ in range(batch)]
    return np.sort(chosen, axis=1).astype("int32")


def logits_of(model, inputs):
    return to_numpy(model(inputs))


def decoded(model, inputs, prompt=6):
    """Logits for all text; the response is decoded one token at a time."""
    backbone = model.backbone
    batch, length = inputs["token_ids"].shape
    images = model.encode_images(ops.convert_to_tensor(inputs["images"]))
    image_length = images.shape[1]
    cache = ops.zeros(
        (
            batch,
            backbone.num_layers,
            2,
            image_length + length,
            backbone.num_key_value_heads,
            backbone.head_dim,
        )
    )
    token_ids = ops.convert_to_tensor(inputs["token_ids"])
    mask = np.tile((np.arange(length) < prompt) * 1, (batch, 1))
    logits, _, cache = model.call_with_cache(
        token_ids,
        cache,
        0,
        img_embeddings=images,
        padding_mask=ops.convert_to_tensor(mask),
    )
    found = [to_numpy(logits)[:, image_length : image_length + prompt]]
    for index in range(prompt, length):
        logits, _, cache = model.call_with_cache(
            token_ids[:, index : index + 1], cache, image_length + index
        )
        found.append(to_numpy(logits))
    return np.concatenate(found, axis=1)


def random_layer_inputs(layer, batch=2, length=21):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, length, layer.hidden_dim)).astype("float32")
    # All queries see the first two thirds of the keys; the rest is causal.
    row, column = np.indices((length, length))
    mask = (column < 2 * length // 3) | (column <= row)
    mask[:, 1] = False
    mask[3] = False  # A query that sees nothing.
    return x, np.tile(mask, (batch, 1, 1))


def oracle(layer, x, mask, distance, frequency, scale=1.0, gain=1.0):
    """The output of an attention layer, by plain formulas in float64.

    `distance` is `(batch or 1, length, length)`, in tokens between query and
    key. `frequency` and `gain` are `(features / 2,)`. `scale` multiplies the
    logits.
    """

    def projected(dense):
        return np.einsum("btd,ndh->btnh", x, kernel_of(dense))

    def phasors(features):
        # The two halves of the features are real and imaginary parts.
        first, second = np.split(features, 2, axis=-1)
        return first + 1j * second

    def kernel_of(dense):
        return to_numpy(dense.kernel).astype("float64")

    groups = layer.num_query_heads // layer.num_key_value_heads
    query = phasors(projected(layer.query_dense))
    key = np.repeat(phasors(projected(layer.key_dense)), groups, axis=2)
    value = np.repeat(projected(layer.value_dense), groups, axis=2)
    turn = np.exp(1j * distance[..., None] * frequency)
    logits = np.einsum(
        "btnf,bsnf,btsf,f->bnts",
        query,
        key.conj(),
        np.broadcast_to(turn, (len(x), *turn.shape[1:])),
        np.ones_like(frequency) * gain,
    ).real
    width = (
        layer.head_dim
        if layer.query_head_dim_normalize
        else layer.hidden_dim // layer.num_query_heads
    )
    logits *= scale / np.sqrt(width)
    if layer.logit_soft_cap is not None:
        logits = layer.logit_soft_cap * np.tanh(logits / layer.logit_soft_cap)
    logits = np.where(mask[:, None], logits, -np.inf)
    highest = np.maximum(logits.max(-1, keepdims=True), -1e30)
    weights = np.exp(logits - highest)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    output = np.einsum("bnts,bsnh->btnh", weights, value)
    return np.einsum("btnh,nhd->btd", output, kernel_of(layer.output_dense))
