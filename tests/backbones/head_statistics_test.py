"""Statistics of heads agree with plain loops in NumPy."""

import numpy as np
import pytest

from keras_laid import find_retrieval_heads
from keras_laid.backbones import head_statistics
from keras_laid.backbones.head_statistics import Examples
from keras_laid.backbones.head_statistics import SharpestRows
from keras_laid.backbones.retrieval_heads import ranked
from tests.backbones import retrieval_support
from tests.backbones import small_models
from tests.backbones.retrieval_support import STATISTICS
from tests.backbones.retrieval_support import assert_statistics
from tests.backbones.retrieval_support import image_prompts
from tests.backbones.retrieval_support import prompts
from tests.backbones.retrieval_support import several_images
from tests.backbones.retrieval_support import several_texts
from tests.backbones.retrieval_support import weights
from tests.backbones.small_models import make_model


@pytest.mark.extra_large_but_on("tensorflow", "torch")
@pytest.mark.parametrize(
    "family",
    [
        small_models.pali_gemma,
        small_models.gemma_3,
    ],
    ids=small_models.name_of,
)
def test_rows_of_text_and_images_in_blocks(family, monkeypatch):
    if family is small_models.pali_gemma:
        model = several_images()
        batches = image_prompts(model)
    else:
        model = make_model(family)
        batches = prompts(family, model, 2)
    marks = weights(batches)
    data = [(x, None, mark) for x, mark in zip(batches, marks, strict=True)]
    kinds = {"text": marks, "image": None}
    examples = {
        kind: retrieval_support.examples(model, batches, kind, row_marks)
        for kind, row_marks in kinds.items()
    }
    for rows in (512, 5):
        monkeypatch.setattr(head_statistics, "ROWS", rows)
        found = find_retrieval_heads(model, data, row_kinds=("image",))
        assert found.by_rows.keys() == kinds.keys()
        for kind in kinds:
            assert_statistics(found.by_rows[kind], examples[kind])


def test_a_head_that_always_looks_at_the_same_place_does_not_retrieve():
    model, (inputs, *_) = several_texts(1)
    retrieval_support.plant(model, 1, 2)
    alike = {name: array[[1, 1]] for name, array in inputs.items()}
    found = find_retrieval_heads(model, [alike])
    text = found.by_rows["text"]
    assert text.sharpness[1, 2] > 0.7
    np.testing.assert_allclose(text.selectivity, 0.0, atol=1e-6)
    np.testing.assert_array_equal(found.score, 0.0)
    assert found.heads == ()


def test_examples_without_a_needle_count_in_all_but_needle():
    model, batches = several_texts()
    batches[0]["needle"] = np.array([-1, 2])
    batches[1]["needle"] = np.array([3, 4])  # Segments are 0 to 3.
    batches[2]["needle"] = np.array([-1, -1])
    found = find_retrieval_heads(model, batches)
    examples = retrieval_support.examples(model, batches)
    assert_statistics(found.by_rows["text"], examples)
    assert found.threshold == 0.5
    batches = [dict(inputs, needle=np.array([-1, 9])) for inputs in batches]
    found = find_retrieval_heads(model, batches)
    assert np.isnan(found.by_rows["text"].needle).all()
    assert found.threshold == 0.9


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_examples_are_compared_with_those_of_as_many_segments():
    model = several_images()
    batches = [x for n in (1, 2, 3) for x in image_prompts(model, n)]
    found = find_retrieval_heads(model, batches, batches=9)
    examples = retrieval_support.examples(model, batches)
    assert_statistics(found.by_rows["text"], examples)
    # A head that looks at the last image, however many there are.
    last = SharpestRows(*np.ones((3, 4, 1)), np.eye(4)[[1, 1, 3, 3]][:, None])
    exists = np.arange(4) < np.array([[2], [2], [4], [4]])
    needle = np.array([1, 1, 3, 3])
    found = head_statistics.head_statistics(
        [Examples(exists, needle, {0: last})], 1, 1
    )
    np.testing.assert_allclose(found.selectivity, 0.0)
    np.testing.assert_allclose(found.needle, 1.0)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_batches_of_one_example_are_pooled():
    model, batches = several_texts(2)
    ones = [
        {name: array[[index]] for name, array in inputs.items()}
        for inputs in batches
        for index in range(2)
    ]
    found = find_retrieval_heads(model, ones)
    examples = retrieval_support.examples(model, batches)
    assert_statistics(found.by_rows["text"], examples)
    with pytest.raises(ValueError, match="two examples or more must have the"):
        find_retrieval_heads(model, ones[:1])


def test_layers_may_have_different_numbers_of_heads():
    rng = np.random.default_rng(0)

    def rows(heads):
        shares = rng.dirichlet(np.ones(3), size=(4, heads))
        return SharpestRows(*rng.uniform(size=(3, 4, heads)), shares)

    examples = Examples(
        np.ones((4, 3), "bool"), np.arange(4), {1: rows(2), 2: rows(4)}
    )
    found = head_statistics.head_statistics([examples], 3, 4)
    for name in STATISTICS:
        table = getattr(found, name)
        np.testing.assert_array_equal(
            np.isfinite(table), [[0] * 4, [1, 1, 0, 0], [1] * 4]
        )
        # `ranked` skips heads that do not exist. Needles 0, 1 and 2 are known.
        assert {layer for layer, _ in ranked(table)} == {1, 2}
    sharpest = examples.rows[1]
    attention = sharpest.shares * sharpest.mass[..., None]
    score = [
        attention[i, :, i] - np.delete(attention[i], i, -1).mean(-1)
        for i in range(3)
    ]
    np.testing.assert_allclose(found.needle[1, :2], np.mean(score, axis=0))


def test_there_may_be_no_rows_of_images():
    model, batches = several_texts(1)
    found = find_retrieval_heads(model, batches, row_kinds=["image"])
    for name in STATISTICS:
        assert np.isnan(getattr(found.by_rows["image"], name)).all()
        assert np.isfinite(getattr(found.by_rows["text"], name)).all() or (
            name == "needle"
        )
