"""Documents read once, and several questions after them."""

import contextlib

import numpy as np
import pytest

from keras_laid import self_extend
from keras_laid import yarn
from keras_laid.backbones import read_documents
from keras_laid.backbones.read_documents import DocumentReader
from keras_laid.backbones.read_documents import can_be_read_once
from tests.backbones import small_models
from tests.support import to_numpy

OTHERS = (
    small_models.gemma_2,
    small_models.mistral,
    small_models.qwen,
    small_models.qwen_3,
)
SCOPES = {
    "plain": lambda model: contextlib.nullcontext(),
    "yarn": lambda model: yarn(model, factor=4.0, original_length=16),
    "self_extend": lambda model: self_extend(model, 4, neighbor_window=8),
}


def whole_logits(model, tokens):
    """The definition: all tokens at once, without a cache."""
    tokens = np.asarray([tokens], "int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    return to_numpy(model(inputs))[0, -1]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "family",
    [
        small_models.llama,
        *(
            pytest.param(each, marks=pytest.mark.extra_large_but_on("torch"))
            for each in OTHERS
        ),
    ],
    ids=small_models.name_of,
)
def test_each_question_is_answered_as_alone(family, scope, monkeypatch):
    monkeypatch.setattr(read_documents, "CHUNK", 16)
    model = small_models.make_model(family)
    rng = np.random.default_rng(0)
    for count in (5, 37):  # Less than a chunk, and several.
        documents = rng.integers(1, small_models.VOCABULARY, count).tolist()
        questions = [
            rng.integers(1, small_models.VOCABULARY, length).tolist()
            for length in (1, 7, 18)
        ]
        with SCOPES[scope](model):
            found = DocumentReader(model)(documents, questions)
            expected = [
                whole_logits(model, documents + question)
                for question in questions
            ]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family, known",
    [
        (small_models.llama, True),
        (small_models.phi_3, False),  # Frequencies depend on the length.
        (small_models.qwen_3_5, False),  # Some layers are recurrent.
    ],
    ids=["llama", "phi_3", "qwen_3_5"],
)
def test_where_cached_decoding_is_the_same(family, known):
    assert can_be_read_once(small_models.make_model(family)) == known
