"""What attention puts out, under a mask described in linear memory."""

from keras_laid.ops.attention_output import chunked
from keras_laid.ops.attention_output import definition
from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select

# In order of preference.
IMPLEMENTATIONS = (
    Implementation("chunked", chunked.attention_output),
    Implementation("definition", definition.attention_output),
)


def attention_output(attention, value, mask, implementation=None):
    """Mean of the values that each row attends, weighted by its attention.

    `softmax(attention.logits()) @ value` over the keys that `mask` allows. A
    row without any gets zeros.

    Args:
        attention: `keras_laid.ops.Attention`.
        value: Tensor of shape `(batch, keys, key_heads, value_dim)`.
        mask: `keras_laid.ops.AttentionMask`.
        implementation: `None` for the first that can, or one of `"chunked"`
            (holds the maps of some rows at a time, in the backward pass too)
            and `"definition"` (holds all of them).

    Returns:
        A tensor of shape `(batch, rows, heads, value_dim)`, of the dtype of
        `value`. Gradients reach queries, keys and values.

    Raises:
        ValueError: If `value` does not go with the keys.
        NotImplementedError: If the named `implementation` cannot run here.
    """
    if tuple(value.shape[:3]) != tuple(attention.key.shape[:3]):
        raise ValueError(
            "There must be a value for each key. Received: value.shape="
            f"{tuple(value.shape)}, key.shape={tuple(attention.key.shape)}"
        )
    arguments = (attention, value, mask)
    chosen = select(
        "attention_output", IMPLEMENTATIONS, implementation, *arguments
    )
    return chosen.run(*arguments)
