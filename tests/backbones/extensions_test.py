"""Properties that YaRN and SelfExtend share."""

import contextlib
import functools

import numpy as np
import pytest
from keras import ops

from keras_laid import rotary_positions
from keras_laid import self_extend
from keras_laid import yarn
from tests.backbones import extension_support as support
from tests.backbones import self_extend_test
from tests.backbones import yarn_test
from tests.support import NO_XLA
from tests.support import attention_of
from tests.support import to_numpy

EXTENSIONS = pytest.mark.parametrize(
    "extension",
    [
        functools.partial(yarn, **yarn_test.SETTINGS),
        functools.partial(self_extend, **self_extend_test.SETTINGS),
    ],
    ids=["yarn", "self_extend"],
)


@pytest.mark.extra_large_but_on("torch")
@EXTENSIONS
@yarn_test.CONFIGS
def test_a_token_at_a_time_equals_all_at_once(config, extension):
    model, inputs = support.make_model(config), support.make_inputs()
    with extension(model):
        once = support.logits_of(model, inputs)
        np.testing.assert_allclose(
            support.decoded(model, inputs), once, atol=5e-5
        )
    assert np.abs(once - support.logits_of(model, inputs)).max() > 1e-2


@EXTENSIONS
@pytest.mark.parametrize("inner", ["extension", "positions"])
def test_positions_may_be_given_inside_or_outside(inner, extension):
    model, inputs = support.make_model(), support.make_inputs()
    positions = support.random_positions()
    with extension(model):
        expected = support.logits_of(model, dict(inputs, positions=positions))
        ordinary = support.logits_of(model, inputs)
    scopes = [extension(model), rotary_positions(model, positions)]
    with contextlib.ExitStack() as stack:
        for scope in scopes if inner == "positions" else scopes[::-1]:
            stack.enter_context(scope)
        found = support.logits_of(model, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - ordinary).max() > 1e-2


@EXTENSIONS
def test_model_is_left_as_it_was_also_after_an_error(extension):
    model, inputs = support.make_model(), support.make_inputs()
    layers = attention_of(model)
    layers += [layer.rope_layer for layer in layers]
    names = [set(vars(layer)) for layer in layers]
    before = support.logits_of(model, inputs)
    with pytest.raises(RuntimeError, match="on purpose"):
        with extension(model):
            raise RuntimeError("on purpose")
    assert names == [set(vars(layer)) for layer in layers]
    np.testing.assert_array_equal(support.logits_of(model, inputs), before)


@pytest.mark.extra_large_but_on("jax", "torch")
@EXTENSIONS
def test_compiled_functions_follow(extension):
    """`predict` and `generate` follow the scope only inside of it."""
    model, inputs = support.make_model(), support.make_inputs()
    model.compile(sampler="greedy", **NO_XLA)
    prompts = {
        name: inputs[name] for name in ("images", "token_ids", "padding_mask")
    }
    prompts["padding_mask"] = np.tile(np.arange(9) < 6, (2, 1))

    def run():
        predicted = model.predict_on_batch(inputs)
        token_ids = model.generate(prompts, stop_token_ids=None)["token_ids"]
        return to_numpy(predicted), to_numpy(token_ids)

    def run_uncompiled():
        tensors = {n: ops.convert_to_tensor(v) for n, v in prompts.items()}
        token_ids = model.generate_step(tensors)["token_ids"]
        return support.logits_of(model, inputs), to_numpy(token_ids)

    plain = run()
    with extension(model):
        inside, expected = run(), run_uncompiled()
    after = run()
    for a, b in ((inside, expected), (after, plain)):
        np.testing.assert_allclose(a[0], b[0], atol=5e-5)
        np.testing.assert_array_equal(a[1], b[1])
    assert np.abs(inside[0] - plain[0]).max() > 1e-2
    assert np.any(inside[1] != plain[1])
