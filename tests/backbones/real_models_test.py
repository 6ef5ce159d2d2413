"""What holds for both real pretrained decoders.

    make real-models
    KERAS_BACKEND=jax python -m pytest -m extra_large \\
        tests/backbones/real_models_test.py
"""

import contextlib
import pathlib

import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_laid import attach_gain_modulation
from keras_laid import fold_gain_modulation
from keras_laid import linear_memory_attention
from keras_laid import yarn
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.decoder import global_layers
from keras_laid.backbones.families import layers_with_maps
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks import draw_text_haystacks
from keras_laid.haystacks.text_tasks import TASKS
from keras_laid.ops.attention import log_attention
from tests.support import to_numpy

PRESETS = pathlib.Path("runs/real_models")
NAMES = ("smollm2_135m_instruct", "gemma_3_270m")
pytestmark = [
    pytest.mark.extra_large,
    pytest.mark.skipif(
        not all((PRESETS / name).is_dir() for name in NAMES),
        reason="Needs the presets that `make real-models` makes.",
    ),
]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    """A model that each test leaves unchanged."""
    model = keras_hub.models.CausalLM.from_preset(str(PRESETS / request.param))
    model.compile(sampler="greedy")
    return model


def inputs_of(model, length):
    """A text of so many tokens."""
    (haystack,) = draw_text_haystacks(model, 1, (length,), "multi_key")
    inputs, _ = prompts_for(model).inputs(
        [haystack.images], [haystack.question]
    )
    return inputs


@pytest.mark.parametrize("task", TASKS)
def test_lengths_of_haystacks_are_exact(model, task):
    form = prompts_for(model).form
    for haystack in draw_text_haystacks(model, 4, (512, 2048), task):
        tokens, _ = form.prompt_tokens(haystack.images, haystack.question)
        assert len(tokens) == haystack.length


def test_options_begin_with_different_tokens(model):
    prompts = prompts_for(model)
    for task in ("multi_key", "meaning"):
        for haystack in draw_text_haystacks(model, 20, (512,), task):
            tokens = [prompts.first_tokens(each) for each in haystack.options]
            assert len(set().union(*tokens)) == sum(map(len, tokens))


def test_gains_are_folded(model):
    inputs, weights = inputs_of(model, 300), model.get_weights()
    plain = to_numpy(model(inputs))
    gains = attach_gain_modulation(model)
    np.testing.assert_array_equal(to_numpy(model(inputs)), plain)
    rng = np.random.default_rng(0)
    for gain in gains:
        gain.log_gain.assign(0.1 * rng.normal(size=gain.log_gain.shape))
    gained = to_numpy(model(inputs))
    assert np.abs(gained - plain).max() > 1e-2 * np.abs(plain).max()
    fold_gain_modulation(model)
    folded = to_numpy(model(inputs))
    model.set_weights(weights)
    np.testing.assert_allclose(
        folded, gained, rtol=0, atol=1e-4 * np.abs(gained).max()
    )


def test_captured_attention_recomputes_the_output(model):
    inputs = inputs_of(model, 300)
    layers = layers_with_maps(model)
    for index in global_layers(model):
        seen = {}
        part = layers[index].layer
        compute = part._compute_attention

        def keeping(query, key, value, *args, compute=compute, seen=seen, **kw):
            seen["value"] = ops.copy(value)
            seen["output"] = compute(query, key, value, *args, **kw)
            return seen["output"]

        part._compute_attention = keeping
        with captured_attention(model, [index]) as captured:
            model(inputs)
        part._compute_attention = compute
        length = inputs["token_ids"].shape[1]
        mask = np.tril(np.ones((1, length, length), bool))
        mask &= inputs["padding_mask"][:, None, :].astype(bool)
        maps = to_numpy(ops.exp(log_attention(captured[index], mask[:, None])))
        value, output = (to_numpy(seen[name]) for name in ("value", "output"))
        value = np.repeat(value, maps.shape[1] // value.shape[2], axis=2)
        found = np.einsum("bnts,bsnh->btnh", maps, value)
        valid = inputs["padding_mask"][0].astype(bool)
        np.testing.assert_allclose(
            found[:, valid],
            output[:, valid],
            rtol=0,
            atol=1e-5 * np.abs(output).max(),
        )


def test_cached_answers_are_the_uncached_ones(model):
    prompt = "The capital of France is"
    tokens = [int(t) for t in model.preprocessor.tokenizer(prompt)]
    if model.preprocessor.add_start_token:
        tokens.insert(0, model.preprocessor.tokenizer.start_token_id)
    found = list(tokens)
    for _ in range(5):
        ids = np.array([found])
        logits = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
        found.append(int(to_numpy(logits)[0, -1].argmax()))
    tokenizer = model.preprocessor.tokenizer
    said = tokenizer.detokenize(found[len(tokens) :])
    text = model.generate(prompt, max_length=len(found), stop_token_ids=[])
    assert text.endswith(said), (text, said)


@pytest.mark.parametrize("scope", ["plain", "yarn"])
def test_linear_memory_on_2048_tokens(model, scope):
    inputs = inputs_of(model, 2048)
    scopes = {
        "plain": contextlib.nullcontext,
        "yarn": lambda: yarn(model, factor=4.0, original_length=512),
    }
    with scopes[scope]():
        whole = to_numpy(model(inputs))[:, -1]
        with linear_memory_attention(model):
            linear = to_numpy(model(inputs))[:, -1]
    np.testing.assert_allclose(
        linear, whole, rtol=0, atol=1e-4 * np.abs(whole).max()
    )


def test_documents_read_once_change_no_answer(model):
    haystacks = [
        *draw_text_haystacks(
            model, 4, (1500,), "multi_key", questions_per_text=4
        )
    ]
    prompts = prompts_for(model)
    documents = [each.images for each in haystacks]
    questions = [each.question for each in haystacks]
    together = prompts.first_logits(documents, questions)
    for index in range(4):
        alone = prompts.first_logits([documents[index]], [questions[index]])
        np.testing.assert_allclose(
            together[index], alone[0], rtol=0, atol=1e-4 * np.abs(alone).max()
        )
