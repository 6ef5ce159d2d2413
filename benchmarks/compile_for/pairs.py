"""Pairs of models by the shapes of published presets, and their batches."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import keras_hub
import numpy as np

import keras_laid
from benchmarks import memory_plan

TEXT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher and a student.

    Attributes:
        teacher: Function without arguments that builds the teacher.
        student: Function without arguments that builds the student.
        heads: List of pairs `(layer, head)` of the teacher, matched by the
            retrieval term. Which heads they are changes no cost.
        batch: Function of the tokens of a prompt and the number of prompts; it
            returns arrays `(x, y, sample_weight)` without values.
        image_tokens: Integer, the tokens of an image; `0` for text.
        segments: Integer, the largest number of segments in a prompt of text,
            or `None` for images.
    """

    teacher: Callable[[], keras.Model]
    student: Callable[[], keras.Model]
    heads: list
    batch: Callable
    image_tokens: int
    segments: int | None = None


def array(shape, dtype="int32"):
    """An array that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def pali_gemma(shape):
    backbone = keras_hub.models.PaliGemmaBackbone(**memory_plan.COMMON | shape)
    return keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm(
        keras_hub.models.PaliGemmaCausalLM(preprocessor=None, backbone=backbone)
    )


def image_tokens(pair, tokens):
    """The tokens of all images of a prompt; the rest is text."""
    if not pair.image_tokens:
        return 0
    return (tokens - TEXT_TOKENS) // pair.image_tokens * pair.image_tokens


def pali_gemma_batch(tokens, batch_size, image_size=224, tokens_of_image=256):
    images = (tokens - TEXT_TOKENS) // tokens_of_image
    text = (batch_size, tokens - images * tokens_of_image)
    x = {
        "images": array(
            (batch_size, images, image_size, image_size, 3), "float32"
        ),
        "token_ids": array(text),
        "padding_mask": array(text),
        "response_mask": array(text),
    }
    return x, array(text), array(text, "float32")


def text_batch(tokens, batch_size):
    shape = (batch_size, tokens)
    names = ("token_ids", "padding_mask", "segments")
    x = {name: array(shape) for name in names}
    return x, array(shape), array(shape, "float32")


# From the models' published configurations.
SMOLLM2_135M = dict(
    vocabulary_size=49152,
    num_layers=30,
    num_query_heads=9,
    num_key_value_heads=3,
    hidden_dim=576,
    intermediate_dim=1536,
    rope_max_wavelength=100000,
    tie_word_embeddings=True,
)
GEMMA_3 = dict(
    vocabulary_size=262144,
    image_size=896,
    use_query_key_norm=True,
    query_head_dim_normalize=True,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    use_sliding_window_attention=True,
    vision_encoder=None,
    layer_norm_epsilon=1e-6,
)
GEMMA_3_SHAPES = {
    "270M": dict(
        num_layers=18,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=640,
        intermediate_dim=2048,
        head_dim=256,
        sliding_window_size=512,
    ),
    "4B": dict(
        num_layers=34,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=2560,
        intermediate_dim=10240,
        head_dim=256,
        sliding_window_size=1024,
    ),
    "27B": dict(
        num_layers=62,
        num_query_heads=32,
        num_key_value_heads=16,
        hidden_dim=5376,
        intermediate_dim=21504,
        head_dim=128,
        sliding_window_size=1024,
    ),
}


def smollm2():
    backbone = keras_hub.models.LlamaBackbone(**SMOLLM2_135M)
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)


def gemma_3(size):
    backbone = keras_hub.models.Gemma3Backbone(**GEMMA_3 | GEMMA_3_SHAPES[size])
    return keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=None)


# Small enough for a test, with every part of the large ones.
SMALL = dict(
    vocabulary_size=1024,
    image_size=56,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=128,
    intermediate_dim=256,
    head_dim=32,
    vit_num_heads=4,
    vit_hidden_dim=64,
    vit_num_layers=2,
    vit_intermediate_dim=128,
)


def pali_gemma_pair(teacher, student):
    teacher, student = (memory_plan.SHAPES[size] for size in (teacher, student))
    middle = teacher["num_layers"] // 2
    return Pair(
        functools.partial(pali_gemma, teacher),
        functools.partial(pali_gemma, student),
        [(middle, 0), (middle, 1), (middle, 2)],
        pali_gemma_batch,
        256,
    )


def text_pair(teacher, student, layer):
    return Pair(
        teacher, student, [(layer, 0), (layer, 1)], text_batch, 0, segments=128
    )


PAIRS = {
    "small": Pair(
        functools.partial(pali_gemma, SMALL),
        functools.partial(pali_gemma, SMALL),
        [(1, 0), (1, 1)],
        functools.partial(pali_gemma_batch, image_size=56, tokens_of_image=16),
        16,
    ),
    "PaliGemma 2 10B -> 3B": pali_gemma_pair("10B", "3B"),
    "PaliGemma 2 28B -> 3B": pali_gemma_pair("28B", "3B"),
    "Gemma 3 27B -> 4B": text_pair(
        functools.partial(gemma_3, "27B"), functools.partial(gemma_3, "4B"), 29
    ),
    "Gemma 3 270M": text_pair(
        functools.partial(gemma_3, "270M"),
        functools.partial(gemma_3, "270M"),
        11,
    ),
    "SmolLM2 135M": text_pair(smollm2, smollm2, 15),
}
