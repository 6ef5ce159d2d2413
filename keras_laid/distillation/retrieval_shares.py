"""Retrieval heads, and the shares of their attention that segments get."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Literal

import keras
from keras import ops

from keras_laid.backbones.decoder import indices_of_global
from keras_laid.backbones.segments import Segments
from keras_laid.backbones.segments import segments_of
from keras_laid.distillation.description import Description
from keras_laid.distillation.layer_map import is_pairs
from keras_laid.distillation.layer_map import resolve_index
from keras_laid.distillation.matched_rows import matched_rows
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import Distance
from keras_laid.ops.segment_attention import segment_attention
from keras_laid.ops.segment_attention.definition import membership
from keras_laid.typing import Tensor

Heads = tuple[tuple[int, int], ...]  # Pairs (layer, head).


def check_heads(name: str, heads: object) -> None:
    """Refuses what is neither `"auto"` nor pairs of indices."""
    if heads != "auto" and not is_pairs(heads):
        raise ValueError(
            f'`{name}` must be "auto" or pairs of indices (layer, head). '
            f"Received: {name}={heads!r:.80}"
        )


def resolve_heads(
    name: str,
    heads: Literal["auto"] | Sequence[tuple[int, int]],
    teacher: Description,
) -> Heads | None:
    """The teacher's heads, each once, or `None` if they must be found.

    Raises:
        ValueError: If the teacher does not have one of the heads, or the head's
            layer does not have full attention. `name` is the argument that the
            message names.
    """
    check_heads(name, heads)
    if isinstance(heads, str):
        return None
    allowed = indices_of_global(teacher.layers, teacher.model)
    resolved = []
    for layer, head in heads:
        index = resolve_index(name, "teacher", teacher, allowed, layer)
        count = teacher.layers_with_maps[index].num_query_heads
        if not 0 <= head < count:
            raise ValueError(
                f"`{name}` must name heads from 0 to {count - 1} of layer "
                f"{layer}. Received: head {head}"
            )
        resolved.append((index, head))
    return tuple(dict.fromkeys(resolved))


def layers_of(heads: Heads) -> list[int]:
    """The layers of some heads, each once."""
    return sorted({layer for layer, _ in heads})


def log_shares_of_heads(
    attention: Mapping[int, Attention],
    heads: Heads,
    mask: AttentionMask,
    segments: Segments,
) -> dict[int, Tensor]:
    """The mean attention of a teacher's heads to segments, for each layer.

    Returns:
        A dictionary from layer to a float32 tensor of shape
        `(batch, rows, segments)`, logarithms as in
        `keras_laid.ops.segment_attention`.
    """
    means = {}
    for layer in layers_of(heads):
        chosen = [head for each, head in heads if each == layer]
        log_shares = segment_attention(
            only_heads(attention[layer], chosen), mask, *segments
        )
        means[layer] = ops.logsumexp(log_shares, axis=1) - math.log(len(chosen))
    return means


def text_log_shares(
    model: keras.Model,
    x: Mapping[str, Tensor],
    attention: Mapping[int, Attention],
    heads: Heads,
    num_segments: int | None,
) -> dict[int, Tensor]:
    """`log_shares_of_heads` of all text rows of a batch."""
    first = attention[layers_of(heads)[0]]
    key_length = ops.shape(first.key)[1]
    rows = matched_rows(model, x, key_length, "text")
    return log_shares_of_heads(
        {layer: rows.select(each) for layer, each in attention.items()},
        heads,
        rows.mask,
        segments_for(model, x, key_length, num_segments),
    )


def segments_for(
    model: keras.Model,
    x: Mapping[str, Tensor],
    key_length: int | Tensor,
    num_segments: int | None,
) -> Segments:
    """The segments of a batch, which must have some."""
    segments = segments_of(model, x, key_length, num_segments)
    if segments is None:
        raise ValueError(
            "The retrieval term needs prompts with images or segments. "
            f"Received: inputs with {sorted(x)}. Add "
            '`"segments"` to the inputs, or pass `retrieval_weight=0`.'
        )
    return segments


def only_heads(attention: Attention, heads: Sequence[int]) -> Attention:
    """`attention` of some query heads, each with a key head of its own."""
    repeats = attention.query.shape[2] // attention.key.shape[2]
    return attention._replace(
        query=ops.take(attention.query, heads, axis=2),
        key=ops.take(attention.key, [h // repeats for h in heads], axis=2),
    )


def segment_distance(segments: Segments, distance: Distance) -> Distance:
    """Distances to segments: a segment stands at its keys' mean position."""
    is_member = ops.cast(membership(*segments), "float32")
    positions = ops.cast(distance.key_positions, "float32")
    positions = ops.broadcast_to(positions, ops.shape(segments.numbers))
    # b = batch, j = key, g = segment
    count = ops.sum(is_member, axis=1)
    total = ops.einsum("bj,bjg->bg", positions, is_member)
    # A segment that an example lacks is put in the middle of those it has.
    middle = ops.sum(total, 1) / ops.maximum(ops.sum(count, 1), 1.0)
    mean = ops.where(
        count > 0, total / ops.maximum(count, 1.0), middle[:, None]
    )
    return distance._replace(key_positions=mean)
