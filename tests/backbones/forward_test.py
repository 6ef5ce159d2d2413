"""One run of a model that returns all values requested at once."""

import keras
import numpy as np
import pytest

from keras_laid.backbones.forward import forward
from tests.backbones import small_models
from tests.support import to_numpy


def values_of(run):
    return keras.tree.map_structure(
        to_numpy,
        {
            "hidden": run.tokens.hidden,
            "query": run.attention[1].query,
            "key": run.attention[1].key,
            "first": run.hidden_states[0],
            "second": run.hidden_states[1],
        },
    )


@pytest.mark.parametrize(
    "family",
    [
        small_models.pali_gemma_2,
        pytest.param(
            small_models.llama, marks=pytest.mark.extra_large_but_on("torch")
        ),
    ],
    ids=small_models.name_of,
)
def test_scopes_of_a_run_work_together(family):
    model = small_models.make_model(family)
    inputs = small_models.make_inputs(model)
    plain = values_of(forward(model, inputs, [1], hidden_layers=[0, 1]))
    positions = np.tile(3 * np.arange(plain["key"].shape[1]), (2, 1))
    moved = values_of(
        forward(
            model, inputs | {"positions": positions}, [1], hidden_layers=[0, 1]
        )
    )
    for name, value in moved.items():
        assert np.abs(value - plain[name]).max() > 1e-3, name
    for rematerialize in (False, True):
        found = values_of(
            forward(
                model,
                inputs | {"positions": positions},
                [1],
                rematerialize=rematerialize,
                linear_memory=True,
                hidden_layers=[0, 1],
            )
        )
        for name, value in moved.items():
            np.testing.assert_allclose(
                found[name], value, 1e-3, 1e-4, err_msg=name
            )


def test_a_run_without_layers_has_no_length():
    model = small_models.make_model(small_models.llama)
    run = forward(model, small_models.make_inputs(model))
    assert run.attention == run.hidden_states == {}
    with pytest.raises(ValueError, match="A layer must be read"):
        _ = run.key_length
