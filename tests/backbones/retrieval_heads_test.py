"""Retrieval heads: those of the embedded teacher, and planted ones."""

import numpy as np
import pytest
from keras import ops

import keras_laid
from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid import find_retrieval_heads
from keras_laid.backbones import attention_layers
from keras_laid.backbones import decoder
from keras_laid.backbones import retrieval_heads
from tests.backbones import retrieval_support
from tests.backbones import small_models
from tests.backbones.retrieval_support import assert_statistics
from tests.backbones.retrieval_support import image_prompts
from tests.backbones.retrieval_support import prompts
from tests.backbones.retrieval_support import several_images
from tests.backbones.retrieval_support import several_texts
from tests.backbones.small_models import make_model
from tests.bad_input.table import unchanged
from tests.support import to_numpy


def with_needles(batches, examples, head):
    """Batches with needles where a head looks most, and these needles."""
    needles = []
    for each in examples:
        _, _, shares = retrieval_support.sharpest(
            each.maps[head], each.numbers, each.rows
        )
        needles.append(int(shares.argmax()))
    by_batch = np.reshape(needles, (len(batches), -1))
    batches = [
        dict(inputs, needle=needle)
        for inputs, needle in zip(batches, by_batch, strict=True)
    ]
    return batches, needles


@small_models.EACH_CALLED
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
            for each, needle in zip(layer_examples, needles, strict=True)
        ]
        for layer, layer_examples in examples.items()
    }
    assert_statistics(found.by_rows["text"], examples)


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
    model, (inputs,) = several_texts(1)
    examples = retrieval_support.examples(model, [inputs])

    def best_score(example, needle):
        """The best score of all heads, in one example."""
        return max(
            retrieval_support.statistics(
                [layer_examples[example]._replace(needle=needle)]
            )["needle"].max()
            for layer_examples in examples.values()
        )

    worst = [
        min((best_score(example, needle), needle) for needle in range(4))[1]
        for example in range(2)
    ]
    found = find_retrieval_heads(model, [dict(inputs, needle=np.array(worst))])
    assert found.score.max() < 0
    assert found.heads == ()


def test_ablation_compares_answers():
    model, batches = several_texts(2)
    marks = [np.ones((2, small_models.LENGTH), "float32")] * 2
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


@pytest.mark.parametrize("chosen, others", [(2, 2), (5, 3), (8, 0)])
def test_others_are_the_worst_that_are_not_chosen(chosen, others, monkeypatch):
    monkeypatch.setattr(
        retrieval_heads, "answers_kept", lambda model, batches, heads: heads
    )
    model, batches = several_texts(2)
    score = find_retrieval_heads(model, batches).score
    least = np.sort(score, axis=None)[-chosen] / score.max()
    found = find_retrieval_heads(
        model, batches, threshold=least - 1e-6, ablate=True
    )
    order = retrieval_heads.ranked(score)
    assert found.ablation == {
        "without_chosen": tuple(order[:chosen]),
        "without_others": order[::-1][:others],
    }


def answers_kept_without(model, batches, heads, marks):
    """Whether each marked answer stays the same without some heads."""
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


@pytest.mark.extra_large_but_on("tensorflow", "torch")
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
