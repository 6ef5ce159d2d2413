"""Gives every rotary embedding of a model its positions, for one call."""

import contextlib
import functools

from keras_laid.backbones import decoder


@contextlib.contextmanager
def rotary_positions(model, positions):
    """Scope in which a model's rotary embeddings use `positions`.

    Args:
        model: A supported KerasHub model (see `decoder.attention_layers`).
        positions: Integer tensor of shape `(batch, length)` or `(length,)`, in
            tokens, one for each token of the model's sequence, images
            included; or `None`, for the model's own positions.

    The model is left as it was, also when its call raises.
    """
    if positions is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for layer in decoder.attention_layers(model):
            apply_rope = functools.partial(
                layer._apply_rope, positions=positions
            )
            stack.enter_context(
                decoder.replaced_method(layer, "_apply_rope", apply_rope)
            )
        yield
