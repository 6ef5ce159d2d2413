"""Lets a model's blocks be computed again in the backward pass."""

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from typing import Any

import keras

from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.families import family_of
from keras_laid.backbones.gated_delta import linear_layers_without_loops
from keras_laid.backbones.linear_memory import linear_blocks
from keras_laid.backbones.linear_memory import named
from keras_laid.backbones.qwen_vision import images_apart
from keras_laid.backbones.qwen_vision import reads_grids
from keras_laid.backbones.rotary_positions import rotary_embeddings_at
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention_output import Name
from keras_laid.typing import Tensor


@contextlib.contextmanager
def rematerialized(
    model: keras.Model,
    positions: Tensor | None,
    layers: Collection[int],
    captured: dict[int, Attention],
    linear_memory: bool | Name,
) -> Iterator[None]:
    """Scope in which each block keeps only its inputs for the backward pass.

    Blocks of the decoder and of the vision encoder run again in the backward
    pass. Unlike `keras.RematScope`, which acts when layers are created, this
    works for any existing model, on every backend.

    Args:
        model: As in `keras_laid.backbones.attention_layers`.
        positions: The positions of the outer `rotary_embeddings_at`, or `None`.
        layers: The layers of the outer `captured_attention`.
        captured: The dictionary of the outer `captured_attention`.
        linear_memory: Boolean, whether there is an outer `linear_blocks`, or
            a string, the name of its implementation.
    """
    backbone = backbone_of(model)
    with contextlib.ExitStack() as stack:
        for index, block in enumerate(backbone.transformer_layers):
            # The outer scopes have ended when a block runs again.
            scopes = functools.partial(
                scopes_of_block,
                model,
                positions,
                layers=[index] if index in layers else [],
                linear=[index] if linear_memory else [],
                implementation=named(linear_memory),
            )
            call = recomputing(block.call, scopes, captured)
            stack.enter_context(replaced_method(block, "call", call))
        for block in vision_blocks(backbone):
            inside = functools.partial(scopes_of_vision_block, model, block)
            call = recomputing(block.call, inside, captured)
            stack.enter_context(replaced_method(block, "call", call))
        yield


@contextlib.contextmanager
def scopes_of_block(
    model: keras.Model,
    positions: Tensor | None,
    layers: Collection[int],
    linear: Collection[int],
    implementation: Name | None,
) -> Iterator[dict[int, Attention]]:
    """Scopes that change what a block of the decoder does."""
    with (
        linear_blocks(model, implementation, linear),
        linear_layers_without_loops(model),
        rotary_embeddings_at(model, positions),
        captured_attention(model, layers) as captured,
    ):
        yield captured


@contextlib.contextmanager
def scopes_of_vision_block(
    model: keras.Model, block: keras.layers.Layer
) -> Iterator[dict[int, Attention]]:
    """Scopes that change what a block of the vision encoder does."""
    with contextlib.ExitStack() as stack:
        if reads_grids(model):
            stack.enter_context(images_apart(block))
        yield {}


def vision_blocks(backbone: keras.Model) -> list[keras.layers.Layer]:
    """The blocks of a backbone's vision encoder, if it has one."""
    family = family_of(backbone)
    if not family.vision_encoder:
        return []
    encoder = getattr(backbone, family.vision_encoder)
    for part in (encoder, *getattr(encoder, "layers", ())):
        if hasattr(part, family.vision_blocks):
            return list(getattr(part, family.vision_blocks))
    return []


def recomputing(
    call: Callable[..., Tensor],
    scopes: Callable[
        [], contextlib.AbstractContextManager[dict[int, Attention]]
    ],
    captured: dict[int, Attention],
) -> Callable[..., Tensor]:
    """`call`, which runs again in the backward pass, inside its scopes.

    A tensor that a rematerialised function computes may leave it only as an
    output, so captured queries and keys are outputs too.
    """

    def call_and_keep(*args: Any, **kwargs: Any) -> Tensor:
        arguments = keras.tree.flatten((args, kwargs))
        places = [i for i, a in enumerate(arguments) if keras.ops.is_tensor(a)]
        caught: dict[int, Attention] = {}  # Filled by `run`.

        def run(*tensors: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            filled = list(arguments)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            args_, kwargs_ = keras.tree.pack_sequence_as((args, kwargs), filled)
            with scopes() as inside:
                outputs = call(*args_, **kwargs_)
            caught.update(inside)
            return outputs, [(a.query, a.key) for a in inside.values()]

        outputs, kept = keras.remat(run)(*[arguments[i] for i in places])
        for index, (query, key) in zip(caught, kept, strict=True):
            captured[index] = caught[index]._replace(query=query, key=key)
        return outputs

    return call_and_keep
