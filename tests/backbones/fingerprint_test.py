"""A model's fingerprint covers everything that its answers depend on."""

import contextlib

import numpy as np
import pytest

from keras_laid import attach_gain_modulation
from keras_laid import linear_memory_attention
from keras_laid import rotary_positions
from keras_laid import self_extend
from keras_laid import yarn
from keras_laid.backbones.image_prompts import ImagePrompts
from keras_laid.backbones.without_heads import without_heads
from tests.support import make_pali_gemma
from tests.support import make_preprocessor


def make(seed=1, vocabulary=(), **kwargs):
    preprocessor = make_preprocessor(user_defined_symbols=list(vocabulary))
    return make_pali_gemma(None, preprocessor, seed, **kwargs)


def fingerprint(model):
    return ImagePrompts(model).fingerprint()


@pytest.fixture(scope="module")
def model():
    return make()


SCOPES = {
    "none": lambda model: contextlib.nullcontext(),
    "yarn": lambda model: yarn(model, 8.0, 10),
    "yarn, other factor": lambda model: yarn(model, 4.0, 10),
    "yarn, other ramp": lambda model: yarn(model, 8.0, 10, ramp="turns"),
    "yarn, other length": lambda model: yarn(model, 8.0, 20),
    "self_extend": lambda model: self_extend(model, 4, 8),
    "self_extend, other window": lambda model: self_extend(model, 4, 16),
    "positions": lambda model: rotary_positions(model, np.arange(30)),
    "other positions": lambda model: rotary_positions(model, np.arange(1, 31)),
    "linear memory": linear_memory_attention,
    "a head less": lambda model: without_heads(model, [(1, 0)]),
    "another head less": lambda model: without_heads(model, [(1, 1)]),
}


def test_scopes_differ_and_end(model):
    found = {}
    for name, scope in SCOPES.items():
        with scope(model):
            found[name] = fingerprint(model)
    for name, scope in SCOPES.items():
        with scope(model):
            assert fingerprint(model) == found[name], name
    assert len(set(found.values())) == len(SCOPES)
    with yarn(model, 8.0, 10), self_extend(model, 4, 8):
        both = fingerprint(model)
    assert both not in found.values()
    with yarn(model, 4.0, 10), self_extend(model, 4, 8):
        assert fingerprint(model) not in (both, *found.values())


def test_one_that_is_made_again_has_the_same(model):
    assert fingerprint(make()) == fingerprint(model)


def flip_a_bit(model):
    table = model.backbone.token_embedding.embeddings
    values = np.array(table)
    values[5, 3] = np.nextafter(values[5, 3], np.float32(9))
    table.assign(values)


def scale_images(model):
    model.preprocessor.image_converter.scale = 1 / 255


def resize_images(model):
    model.preprocessor.image_converter.interpolation = "nearest"


def leave_out_the_start(model):
    model.preprocessor.add_start_token = False


@pytest.mark.parametrize(
    "change",
    [
        flip_a_bit,
        scale_images,
        resize_images,
        leave_out_the_start,
        attach_gain_modulation,
    ],
)
def test_changes_of_a_model_show(model, change):
    other = make()
    change(other)
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(attention_logit_soft_cap=50),
        dict(final_logit_soft_cap=30),
        dict(query_head_dim_normalize=False),
        dict(seed=2),
        dict(vocabulary=["seven"]),
        dict(dtype="bfloat16"),
        dict(dtype="mixed_bfloat16"),
    ],
)
def test_models_made_otherwise_differ(model, kwargs):
    assert fingerprint(make(**kwargs)) != fingerprint(model)


def test_lengths_do_not_count(model):
    """Sequence lengths are set for each batch."""
    other = make()
    other.preprocessor.sequence_length = 99
    assert fingerprint(other) == fingerprint(model)
