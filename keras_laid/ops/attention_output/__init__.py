"""The output of attention, under a mask described in linear memory."""

from typing import Literal

from keras_laid.arguments import check_shape
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import check_attention
from keras_laid.ops.attention import check_mask
from keras_laid.ops.attention_output import chunked
from keras_laid.ops.attention_output import definition
from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select
from keras_laid.ops.fused_attention import availability
from keras_laid.typing import Tensor

Name = Literal["chunked", "definition", "pallas", "triton"]


def inputs(
    attention: Attention, value: Tensor, mask: AttentionMask
) -> tuple[list[Tensor], AttentionMask]:
    return [attention.query, value], mask


# In order of preference. The kernels come last, and so run only if they are
# named: not all of their tests have run on a GPU.
IMPLEMENTATIONS = (
    Implementation("chunked", chunked.attention_output),
    Implementation("definition", definition.attention_output),
    *availability.implementations("attention_output", inputs),
)


def attention_output(
    attention: Attention,
    value: Tensor,
    mask: AttentionMask,
    implementation: Name | None = None,
) -> Tensor:
    """Mean of the values that each row attends, weighted by its attention.

    This is `softmax(attention.logits()) @ value` over the keys that `mask`
    allows. A row without allowed keys gets zeros.

    Args:
        attention: `keras_laid.ops.Attention`: queries and keys.
        value: Tensor of shape `(batch, keys, key_heads, value_dim)`.
        mask: `keras_laid.ops.AttentionMask`: which keys each row attends.
        implementation: One of `"chunked"` (holds the maps of some rows at a
            time, in the backward pass too), `"definition"` (holds whole maps),
            `"pallas"` (fused, JAX) and `"triton"` (fused, torch). The last two
            need an NVIDIA GPU of compute capability 9 or 10, such as the H100,
            and a mask without `block`. `None` takes `"chunked"`.

    Returns:
        A tensor of shape `(batch, rows, heads, value_dim)`, of the dtype of
        `value`. Gradients reach queries, keys and values.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, a number is out of its range, or
            `implementation` is unknown.
        NotImplementedError: If the named `implementation` cannot run here.
    """
    check_attention("attention", attention)
    check_mask(mask, attention)
    batch, keys, key_heads, _ = attention.key.shape
    check_shape(
        "value",
        value,
        batch=batch,
        keys=keys,
        key_heads=key_heads,
        value_dim=None,
    )
    arguments = (attention, value, mask)
    chosen = select(
        "attention_output", IMPLEMENTATIONS, implementation, *arguments
    )
    return chosen.run(*arguments)
