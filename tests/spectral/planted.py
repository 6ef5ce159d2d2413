"""Attention with planted patterns that tests must find."""

import numpy as np
from keras import ops

from keras_laid.ops.attention import Attention
from keras_laid.spectral.prompt_attention import PromptAttention

ROWS = 3


def planted(query, key, rows=ROWS):
    """One layer's attention, only to images.

    Args:
        query: Array of shape `(batch, heads, features)`, the same in all rows.
        key: Array of shape `(batch, keys, key_heads, features)`.
        rows: Integer, the number of rows. Defaults to `3`.
    """
    query = np.repeat(np.asarray(query, "float32")[:, None], rows, axis=1)
    batch, keys = key.shape[:2]
    return PromptAttention(
        Attention(
            ops.convert_to_tensor(query),
            ops.convert_to_tensor(np.asarray(key, "float32")),
            1.0,
        ),
        ops.ones((batch, 1, rows, keys), "bool"),
        ops.full((batch, rows), 1 / rows),
        keys,
    )


def attending(shares):
    """Attention in the given shares, of shape `(batch, heads, keys)`.

    The features of a key are a large one-hot vector, so that keys differ, and
    the logarithm of its share for each head.
    """
    batch, heads, keys = shares.shape
    logits = np.log(np.maximum(shares, 1e-12))
    key = np.concatenate(
        [
            np.broadcast_to(40 * np.eye(keys), (batch, keys, keys)),
            np.swapaxes(logits, 1, 2),
        ],
        axis=-1,
    )
    query = np.concatenate([np.zeros((heads, keys)), np.eye(heads)], axis=-1)
    return planted(
        np.broadcast_to(query, (batch, *query.shape)), key[:, :, None]
    )
