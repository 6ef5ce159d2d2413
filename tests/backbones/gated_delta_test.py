"""Linear layers without loops, against the rule token by token."""

import numpy as np
import pytest
from keras import ops
from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net as kerashub

from keras_laid.backbones import gated_delta
from keras_laid.backbones.gated_delta import gated_delta_rule
from keras_laid.backbones.gated_delta import linear_layers_without_loops
from tests.backbones import small_models
from tests.support import to_numpy
from tests.support import value_and_grads

NAMES = ("query", "key", "value", "g", "beta")
STATE = np.random.default_rng(0).normal(size=(2, 3, 8, 5))


def arguments(length):
    rng = np.random.default_rng(length)
    shape = 2, length, 3
    found = {
        "query": rng.normal(size=(*shape, 8)),
        "key": rng.normal(size=(*shape, 8)),
        "value": rng.normal(size=(*shape, 5)),
        "g": -rng.exponential(0.3, size=shape),
        "beta": rng.uniform(size=shape),
    }
    return {name: array.astype("float32") for name, array in found.items()}


def tensors(length):
    return {
        name: ops.convert_to_tensor(array)
        for name, array in arguments(length).items()
    }


def oracle(query, key, value, g, beta, state):
    """Outputs and the last state, token by token, in NumPy float64."""
    query, key, value, g, beta = (
        np.asarray(each, "float64") for each in (query, key, value, g, beta)
    )
    query, key = (
        each / np.sqrt(np.sum(each**2, axis=-1, keepdims=True) + 1e-6)
        for each in (query, key)
    )
    state, outputs = np.array(state), np.zeros(value.shape)
    for batch, at, head in np.ndindex(*g.shape):
        token = batch, at, head
        now = state[batch, head]
        now *= np.exp(g[token])
        error = value[token] - key[token] @ now
        now += beta[token] * np.outer(key[token], error)
        outputs[token] = query[token] @ now / np.sqrt(query.shape[-1])
    return outputs, state


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("state", [None, STATE], ids=["zeros", "state"])
def test_outputs_are_those_of_one_token_after_another(length, state):
    wanted = oracle(
        **arguments(length), state=0 * STATE if state is None else state
    )
    found = gated_delta_rule(
        **tensors(length), initial_state=state, output_final_state=True
    )
    for name, a, b in zip(("output", "state"), wanted, found, strict=True):
        np.testing.assert_allclose(
            to_numpy(b), a, rtol=1e-4, atol=1e-5, err_msg=name
        )
    assert gated_delta_rule(**tensors(length))[1] is None


def test_gradients_are_those_of_kerashub(monkeypatch):
    """With small chunks, since KerasHub's loops take long to compile."""
    monkeypatch.setattr(gated_delta, "CHUNK", 4)
    given = tensors(9)
    weight = np.random.default_rng(0).normal(size=(2, 9, 3, 5))
    weight = ops.convert_to_tensor(weight.astype("float32"))

    def gradients(rule):
        def loss(*values):
            output, _ = rule(**dict(zip(NAMES, values, strict=True)))
            return ops.sum(output * weight)

        return value_and_grads(loss, *given.values())[1]

    wanted, found = (
        gradients(rule)
        for rule in (kerashub._recurrent_gated_delta_rule, gated_delta_rule)
    )
    for name, a, b in zip(NAMES, wanted, found, strict=True):
        np.testing.assert_allclose(
            to_numpy(b), to_numpy(a), rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_a_model_in_the_scope_is_that_of_kerashub():
    model = small_models.make_model(small_models.qwen_3_5)
    inputs = small_models.make_inputs(model)
    backbone = model.backbone
    own = {name: inputs[name] for name in backbone.input}
    wanted = backbone(own)
    before = kerashub._chunk_gated_delta_rule
    with linear_layers_without_loops(model):
        assert kerashub._chunk_gated_delta_rule is gated_delta_rule
        found = backbone(own)
    assert kerashub._chunk_gated_delta_rule is before
    np.testing.assert_allclose(
        to_numpy(found), to_numpy(wanted), rtol=1e-4, atol=1e-5
    )
