"""Which examples and rows count in the statistics of heads."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_laid
from keras_laid import find_retrieval_heads
from tests.backbones import retrieval_support
from tests.backbones import small_models
from tests.backbones.retrieval_support import assert_statistics
from tests.backbones.retrieval_support import prompts
from tests.backbones.retrieval_support import several_texts
from tests.backbones.retrieval_support import weights
from tests.backbones.small_models import make_model


@pytest.mark.extra_large_but_on("tensorflow")
def test_examples_without_two_segments_do_not_count():
    model, batches = several_texts()
    batches[0]["segments"][1] = 0
    batches[1]["segments"][0] = np.minimum(batches[1]["segments"][0], 1)
    # Segments that are padding, and a segment that no row follows.
    batches[2]["segments"][0, -3:] = 7
    batches[2]["segments"][1, -2] = 2
    found = find_retrieval_heads(model, batches)
    by_layer = retrieval_support.examples(model, batches)
    left = [0, 3, 4, 6, 7]
    for examples in by_layer.values():
        numbers = examples[4].numbers
        examples[4] = examples[4]._replace(numbers=numbers * (numbers < 7))
        assert not examples[5].rows
    kept = {
        layer: [examples[index] for index in left]
        for layer, examples in by_layer.items()
    }
    assert_statistics(found.by_rows["text"], kept)


def test_segments_beyond_the_largest_number_are_none():
    model, batches = several_texts(2)
    found = find_retrieval_heads(model, batches, num_segments=3)
    for inputs in batches:
        inputs["segments"] = inputs["segments"] * (inputs["segments"] < 4)
    examples = retrieval_support.examples(model, batches)
    assert_statistics(found.by_rows["text"], examples)


def test_positions_and_tensors_of_the_backend():
    model, batches = several_texts(2)
    plain = find_retrieval_heads(model, batches)
    for inputs in batches:
        inputs["positions"] = np.arange(small_models.LENGTH) * 3
    found = find_retrieval_heads(model, batches)
    assert np.abs(found.score - plain.score).max() > 1e-3
    examples = retrieval_support.examples(model, batches)
    assert_statistics(found.by_rows["text"], examples)
    needle = np.array([1, 2])
    data = [
        ({**x, "needle": needle}, x["token_ids"], weight)
        for x, weight in zip(batches, weights(batches), strict=True)
    ]
    from_arrays = find_retrieval_heads(model, data, ablate=True)
    data = keras.tree.map_structure(ops.convert_to_tensor, data)
    from_tensors = find_retrieval_heads(model, iter(data), ablate=True)
    np.testing.assert_array_equal(from_tensors.score, from_arrays.score)
    assert from_tensors.ablation == from_arrays.ablation


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_other_dtypes(dtype):
    model = make_model(small_models.llama, dtype=dtype)
    batches = prompts(small_models.llama, model, 2)
    found = find_retrieval_heads(model, batches, ablate=True)
    examples = retrieval_support.examples(model, batches)
    assert_statistics(found.by_rows["text"], examples)


def test_attention_in_linear_memory():
    model, batches = several_texts(2)
    plain = find_retrieval_heads(model, batches)
    with keras_laid.linear_memory_attention(model):
        linear = find_retrieval_heads(model, batches, ablate=True)
    np.testing.assert_allclose(linear.score, plain.score, atol=1e-5)


def test_only_so_many_batches_are_read():
    model, batches = several_texts(3)
    data = iter(batches)
    found = find_retrieval_heads(model, data, batches=2)
    assert next(data) is batches[2]
    examples = retrieval_support.examples(model, batches[:2])
    assert_statistics(found.by_rows["text"], examples)
