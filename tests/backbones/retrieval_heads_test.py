"""Retrieval heads: those of the embedded teacher, and planted ones."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_laid
from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid import find_retrieval_heads
from keras_laid.backbones import attention_layers
from keras_laid.backbones import decoder
from keras_laid.backbones import head_statistics
from keras_laid.backbones.head_statistics import Examples
from keras_laid.backbones.head_statistics import SharpestRows
from keras_laid.backbones.retrieval_heads import ranked
from tests.backbones import retrieval_support
from tests.backbones import small_models
from tests.backbones.retrieval_support import STATISTICS
from tests.backbones.retrieval_support import prompts
from tests.backbones.small_models import make_model
from tests.bad_input.table import unchanged
from tests.support import to_numpy

FAMILY = pytest.mark.parametrize(
    "family", small_models.FAMILIES, ids=lambda family: family.__name__
)


def assert_statistics(found, examples, atol=1e-4):
    """Statistics of every layer are those in NumPy, NaN in other layers."""
    expected = {
        layer: retrieval_support.statistics(of_layer)
        for layer, of_layer in examples.items()
    }
    for name in STATISTICS:
        for layer, values in enumerate(getattr(found, name)):
            if layer not in expected:
                assert np.isnan(values).all(), (name, layer)
                continue
            np.testing.assert_allclose(
                values, expected[layer][name], atol=atol, err_msg=name
            )


def with_needles(batches, examples, head):
    """The needle is where that head looks; the examples with it, too."""
    needles = [
        int(sharpest[2].argmax())
        for each in examples
        for sharpest in [
            retrieval_support.sharpest(each.maps[head], each.numbers, each.rows)
        ]
    ]
    of_batches = np.reshape(needles, (len(batches), -1))
    batches = [
        dict(inputs, needle=needle)
        for inputs, needle in zip(batches, of_batches, strict=True)
    ]
    return batches, needles


@FAMILY
def test_a_planted_head_is_found_in_every_family(family):
    model = make_model(family)
    planted = (decoder.global_layers(model)[-1], 2)
    retrieval_support.plant(model, *planted)
    batches = prompts(family, model)
    examples = retrieval_support.examples(model, batches)
    batches, needles = with_needles(batches, examples[planted[0]], planted[1])
    assert len(set(needles)) > 1
    with unchanged(model):
        found = find_retrieval_heads(model, batches)
    assert found.heads[0] == planted, found.table()
    is_global = [layer.kind == "global" for layer in attention_layers(model)]
    np.testing.assert_array_equal(np.isfinite(found.score).all(1), is_global)
    np.testing.assert_array_equal(found.score, found.by_rows["text"].needle)
    examples = {
        layer: [
            each._replace(needle=needle)
            for each, needle in zip(of_layer, needles, strict=True)
        ]
        for layer, of_layer in examples.items()
    }
    assert_statistics(found.by_rows["text"], examples)


def image_prompts(model, images=3, batches=2):
    """Batches of two prompts of several images, for PaliGemma."""
    found = []
    for seed in range(batches):
        rng = np.random.default_rng(seed)
        pixels = rng.normal(size=(2, images, 16, 16, 3)).astype("float32")
        inputs = small_models.make_inputs(model, seed=seed)
        found.append(dict(inputs, images=pixels))
    return found


def several_images():
    model = make_model(small_models.pali_gemma)
    return MultiImagePaliGemmaCausalLM.from_causal_lm(model)


def several_texts(batches=4):
    model = make_model(small_models.llama)
    return model, prompts(small_models.llama, model, batches)


def weights(batches, marked=(8, 13)):
    """Sample weights of each batch, one marked token an example."""
    found = np.zeros((len(batches), 2, small_models.LENGTH), "float32")
    found[:, [0, 1], marked] = 0.5
    return list(found)


@pytest.mark.parametrize("rows", [4, 512])
def test_statistics_of_several_images_in_blocks_of_rows(rows, monkeypatch):
    monkeypatch.setattr(head_statistics, "ROWS", rows)
    model = several_images()
    batches = image_prompts(model)
    marks = weights(batches)
    data = [(x, None, mark) for x, mark in zip(batches, marks, strict=True)]
    found = find_retrieval_heads(model, data, row_kinds=("image",))
    assert set(found.by_rows) == {"text", "image"}
    for kind, of_kind in (("text", marks), ("image", None)):
        examples = retrieval_support.examples(model, batches, kind, of_kind)
        assert_statistics(found.by_rows[kind], examples)


@pytest.mark.parametrize("rows", [3, 512])
def test_statistics_of_images_among_text_in_blocks_of_rows(rows, monkeypatch):
    monkeypatch.setattr(head_statistics, "ROWS", rows)
    model = make_model(small_models.gemma_3)
    batches = prompts(small_models.gemma_3, model, 2)
    found = find_retrieval_heads(model, batches, row_kinds=("text", "image"))
    for kind, statistics in found.by_rows.items():
        examples = retrieval_support.examples(model, batches, kind)
        assert_statistics(statistics, examples)


def test_a_head_that_always_looks_at_the_same_place_does_not_retrieve():
    model, (inputs, *_) = several_texts(1)
    retrieval_support.plant(model, 1, 2)
    alike = {name: array[[1, 1, 1]] for name, array in inputs.items()}
    found = find_retrieval_heads(model, [alike])
    text = found.by_rows["text"]
    assert text.sharpness[1, 2] > 0.7
    np.testing.assert_allclose(text.selectivity, 0.0, atol=1e-6)
    np.testing.assert_allclose(found.score, 0.0, atol=1e-6)


def test_without_needles_selective_heads_are_chosen():
    model, batches = several_texts()
    retrieval_support.plant(model, 1, 2)
    found = find_retrieval_heads(model, batches)
    text = found.by_rows["text"]
    assert np.isnan(text.needle).all()
    np.testing.assert_array_equal(found.score, text.mass * text.selectivity)
    assert found.heads == ((1, 2),)
    assert found.threshold == 0.9
    second = np.sort(found.score, axis=None)[-2] / found.score[1, 2]
    found = find_retrieval_heads(model, batches, threshold=second - 1e-6)
    assert len(found.heads) == 2 and found.heads[0] == (1, 2)
    found = find_retrieval_heads(model, batches, threshold=1.0)
    assert found.heads == ((1, 2),)


def test_examples_without_a_needle_count_in_all_but_needle():
    model, batches = several_texts()
    batches[0]["needle"] = np.array([-1, 2])
    batches[1]["needle"] = np.array([3, 4])  # There are four segments.
    batches[2]["needle"] = np.array([-1, -1])
    found = find_retrieval_heads(model, batches)
    examples = retrieval_support.examples(model, batches)
    assert_statistics(found.by_rows["text"], examples)
    assert found.threshold == 0.5
    batches = [dict(inputs, needle=np.array([-1, 9])) for inputs in batches]
    found = find_retrieval_heads(model, batches)
    assert np.isnan(found.by_rows["text"].needle).all()
    assert found.threshold == 0.9


def test_examples_without_two_segments_do_not_count():
    model, batches = several_texts()
    batches[0]["segments"][1] = 0
    batches[1]["segments"][0] = np.minimum(batches[1]["segments"][0], 1)
    # Segments of padding, and one with no row behind it.
    batches[2]["segments"][0, -3:] = 7
    batches[2]["segments"][1, -2] = 2
    found = find_retrieval_heads(model, batches)
    of_layers = retrieval_support.examples(model, batches)
    left = [0, 3, 4, 6, 7]
    for examples in of_layers.values():
        numbers = examples[4].numbers
        examples[4] = examples[4]._replace(numbers=numbers * (numbers < 7))
        assert not examples[5].rows
    kept = {
        layer: [examples[index] for index in left]
        for layer, examples in of_layers.items()
    }
    assert_statistics(found.by_rows["text"], kept)


def test_examples_are_compared_with_those_of_as_many_segments():
    model = several_images()
    batches = [x for n in (1, 2, 4) for x in image_prompts(model, n)]
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
    with pytest.raises(ValueError, match="two examples or more must have as"):
        find_retrieval_heads(model, ones[:1])


def test_none_is_found_without_two_segments():
    model, batches = several_texts(1)
    assert find_retrieval_heads(model, batches, num_segments=1) is None
    plain = [{k: v for k, v in x.items() if k != "segments"} for x in batches]
    assert find_retrieval_heads(model, plain) is None
    batches[0]["segments"][:] = 0
    assert find_retrieval_heads(model, batches) is None
    model = make_model(small_models.pali_gemma)
    assert (
        find_retrieval_heads(model, [small_models.make_inputs(model)]) is None
    )
    model = several_images()
    assert find_retrieval_heads(model, image_prompts(model, 1)) is None


def test_no_head_is_chosen_where_none_finds_the_needle():
    model, batches = several_texts(1)
    found = find_retrieval_heads(model, batches)
    (inputs,) = batches
    worst = [
        next(
            needle
            for needle in range(4)
            if best_score(model, inputs, example, needle) < 0
        )
        for example in range(2)
    ]
    found = find_retrieval_heads(model, [dict(inputs, needle=np.array(worst))])
    assert found.score.max() < 0
    assert found.heads == ()


def best_score(model, inputs, example, needle):
    """Of all heads, with one example alone."""
    one = {name: array[[example]] for name, array in inputs.items()}
    one["needle"] = np.array([needle])
    return find_retrieval_heads(model, [one]).score.max()


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
    of_arrays = find_retrieval_heads(model, data, ablate=True)
    data = keras.tree.map_structure(ops.convert_to_tensor, data)
    of_tensors = find_retrieval_heads(model, iter(data), ablate=True)
    np.testing.assert_array_equal(of_tensors.score, of_arrays.score)
    assert of_tensors.ablation == of_arrays.ablation


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
        # The best of heads that there are; needles 0, 1 and 2 are known.
        assert {layer for layer, _ in ranked(table)} == {1, 2}
    of_layer = examples.rows[1]
    attention = of_layer.shares * of_layer.mass[..., None]
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


def test_only_so_many_batches_are_read():
    model, batches = several_texts(3)
    data = iter(batches)
    found = find_retrieval_heads(model, data, batches=2)
    assert next(data) is batches[2]
    examples = retrieval_support.examples(model, batches[:2])
    assert_statistics(found.by_rows["text"], examples)


def test_ablation_compares_answers():
    model, batches = several_texts(2)
    marks = weights(batches)
    data = [
        (dict(x, needle=np.array([0, 1])), None, mark)
        for x, mark in zip(batches, marks, strict=True)
    ]
    # Five heads of eight are chosen: the three others are left out.
    plain = find_retrieval_heads(model, data)
    fifth = np.sort(plain.score, axis=None)[-5] / plain.score.max()
    found = find_retrieval_heads(
        model, data, threshold=fifth - 1e-6, ablate=True
    )
    assert plain.ablation is None and len(found.heads) == 5
    every = {(layer, head) for layer in range(2) for head in range(4)}
    for name, heads in (
        ("without_chosen", found.heads),
        ("without_others", every - set(found.heads)),
    ):
        same = answers_kept_without(model, batches, heads, marks)
        assert found.ablation[name] == pytest.approx(np.mean(same)), name
    # Unmarked, the token after a prompt is the answer.
    found = find_retrieval_heads(model, batches, ablate=True)
    last = [np.eye(16)[x["padding_mask"].sum(1) - 1] for x in batches]
    same = answers_kept_without(model, batches, found.heads, last)
    assert found.ablation["without_chosen"] == pytest.approx(np.mean(same))


def answers_kept_without(model, batches, heads, marks):
    """Whether each marked answer stays without some rows of kernels."""
    whole = [answers(model, x) for x in batches]
    kernels = [
        layer.layer._output_dense.kernel for layer in attention_layers(model)
    ]
    before = [ops.convert_to_numpy(kernel) for kernel in kernels]
    for layer, kernel in enumerate(kernels):
        kept = [
            (layer, head) not in heads for head in range(len(before[layer]))
        ]
        kernel.assign(before[layer] * np.reshape(kept, (-1, 1, 1)))
    part = [answers(model, x) for x in batches]
    for kernel, value in zip(kernels, before, strict=True):
        kernel.assign(value)
    same = np.equal(whole, part)
    return same[np.asarray(marks) > 0]


def answers(model, inputs):
    inputs = {name: inputs[name] for name in model.backbone.input}
    return to_numpy(model(inputs)).argmax(axis=-1)


def test_table():
    model, batches = several_texts(1)
    found = find_retrieval_heads(model, batches)
    lines = found.table(3).splitlines()
    assert lines[0] == (
        "| layer | head | chosen | score | mass | sharpness | selectivity | "
        "needle |"
    )
    (layer, head), *_ = found.heads
    text = found.by_rows["text"]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        f"{layer}",
        f"{head}",
        "yes",
        f"{found.score[layer, head]:.2f}",
        f"{text.mass[layer, head]:.2f}",
        f"{text.sharpness[layer, head]:.2f}",
        f"{text.selectivity[layer, head]:.2f}",
        "nan",
    ]
    assert len(lines) == 5
    assert len(found.table().splitlines()) == 2 + 8
    scores = [float(line.split("|")[4]) for line in lines[2:]]
    assert scores == sorted(scores, reverse=True)


RETRIEVING = {(1, 1), (1, 2), (1, 3)}


@pytest.fixture(scope="module")
def teacher():
    return MultiImagePaliGemmaCausalLM.from_preset(keras_laid.presets.TEACHER)


def haystacks(teacher, seed, size=20):
    return keras_laid.Haystacks(
        keras_laid.Digits("train"), teacher.preprocessor, 32, (size,), seed=seed
    )


def test_the_heads_of_the_embedded_teacher(teacher):
    with unchanged(teacher):
        found = [
            find_retrieval_heads(
                teacher, haystacks(teacher, seed), ablate=seed == 1
            )
            for seed in (1, 2)
        ]
    for each in found:
        assert set(each.heads) == RETRIEVING, each.table()
        assert each.threshold == 0.5
    ablation = found[0].ablation
    assert ablation["without_chosen"] < ablation["without_others"] - 0.05


def test_the_heads_of_the_embedded_teacher_without_needles(teacher):
    ((x, y, weight),) = haystacks(teacher, 1)
    del x["needle"]
    found = find_retrieval_heads(teacher, [(x, y, weight)])
    assert set(found.heads) == RETRIEVING, found.table()
    assert found.threshold == 0.9
