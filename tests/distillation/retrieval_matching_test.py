"""Matching where the teacher's retrieval heads look."""

import logging

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import DistanceWeighting
from keras_laid import PositionStretching
from keras_laid.backbones.attention_capture import run_capturing
from keras_laid.distillation import RetrievalMatching
from keras_laid.distillation.description import Description
from tests.backbones import small_models
from tests.support import FEW_STEPS
from tests.support import PALI_GEMMA
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import make_preprocessor
from tests.support import make_terms
from tests.support import to_numpy

HEADS = ((0, 1), (1, 0), (1, 3))


@pytest.fixture(scope="module")
def preprocessor():
    return make_preprocessor()


def make_distiller(preprocessor, weighting=None, **kwargs):
    size = preprocessor.tokenizer.vocabulary_size()
    teacher = make_multi_image(
        seed=1, vocabulary_size=size, hidden_dim=24, num_query_heads=4
    )
    student = make_multi_image(seed=2, vocabulary_size=size)
    distiller = DistanceWeightedAttentionDistillation(
        teacher, student, weighting, terms=make_terms(**kwargs)
    )
    distiller.compile(keras.optimizers.SGD(0.1), **FEW_STEPS)
    return distiller


def maps_of(model, batch, layer):
    """Whole attention maps of text rows, `(batch, heads, rows, keys)`."""
    x, _, _ = batch
    (attention,) = run_capturing(model, x, [layer])
    query, key = (
        to_numpy(each).astype("float64")
        for each in (attention.query, attention.key)
    )
    length = x["token_ids"].shape[1]
    query = query[:, -length:]
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = attention.scale * np.einsum("bihd,bjhd->bhij", query, key)
    images = key.shape[1] - length
    response = x["response_mask"] > 0
    prompt = (x["padding_mask"] > 0) & ~response
    seen = np.ones((len(query), images), "bool")
    prefix = np.concatenate([seen, prompt], axis=1)
    later = np.concatenate([~seen, response], axis=1)
    earlier = (
        np.arange(key.shape[1]) <= np.arange(images, key.shape[1])[:, None]
    )
    allowed = prefix[:, None] | (later[:, None] & earlier)
    maps = np.exp(logits) * allowed[:, None]
    return maps / maps.sum(axis=-1, keepdims=True)


def by_image(maps, images):
    """Attention to each image: `(batch, heads, rows, images)`."""
    tokens = 4 * images
    return maps[..., :tokens].reshape(*maps.shape[:-1], images, 4).sum(-1)


def expected_term(distiller, batch, heads, layers, strength):
    """The term in its plainest form; `layers` maps a layer to its heads."""
    x, _, sample_weight = batch
    images = x["images"].shape[1]
    length = x["token_ids"].shape[1]
    last = [np.flatnonzero(row)[-1] for row in sample_weight]
    counted = np.arange(length) <= np.array(last)[:, None]
    counted &= x["padding_mask"] > 0
    positions = x.get("positions", np.arange(4 * images + length)[None])
    positions = np.broadcast_to(positions, (len(counted), 4 * images + length))
    places = positions[:, : 4 * images].reshape(-1, images, 4).mean(-1)
    distance = abs(positions[:, 4 * images :, None] - places[:, None])
    span = positions.max(1) - places.min(1)
    weights = 1 + strength * distance / np.maximum(span, 1)[:, None, None]
    total, total_weight = 0.0, 0.0
    for layer, its_heads in layers.items():
        head_maps = [
            by_image(maps_of(distiller.teacher, batch, t), images)[:, h]
            for t, h in its_heads
        ]
        teacher = np.mean(head_maps, axis=0)
        mass = teacher.sum(-1)
        p = teacher / mass[..., None]
        sharpness = 1 + (p * np.log(p)).sum(-1) / np.log(images)
        g = mass * sharpness * counted
        student = by_image(maps_of(distiller.student, batch, layer), images)
        q = student / student.sum(-1, keepdims=True)
        p = p[:, None]
        terms = weights[:, None] * (p * np.log(p / q) - p + q)
        total += (terms.sum(-1).mean(1) * g).sum(1)
        total_weight += g.sum(1)
    return (total / total_weight).mean()


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize(
    ("layers", "matched"),
    [
        (None, {0: HEADS[:1], 1: HEADS[1:]}),
        ((1,), {1: HEADS}),
        ((0, 1), {0: HEADS, 1: HEADS}),
    ],
)
def test_term_is_the_plain_computation(
    preprocessor, layers, matched, stretched
):
    distiller = make_distiller(
        preprocessor,
        DistanceWeighting(3.0, schedule="constant"),
        teacher_heads=HEADS,
        student_layers=layers,
    )
    batch = make_haystacks(
        preprocessor,
        sizes=(3,),
        stretching=PositionStretching(9, 4) if stretched else None,
    )[0]
    logs = distiller.test_on_batch(*batch, return_dict=True)
    expected = expected_term(distiller, batch, HEADS, matched, 3.0)
    np.testing.assert_allclose(logs["retrieval"], expected, rtol=1e-4)


def test_rows_after_the_last_marked_token_do_not_count(preprocessor):
    distiller = make_distiller(preprocessor, teacher_heads=HEADS)
    x, y, sample_weight = make_haystacks(preprocessor, sizes=(3,))[0]
    only_first = sample_weight * (np.cumsum(sample_weight, axis=1) == 1)
    before = distiller.test_on_batch(x, y, only_first, return_dict=True)
    response = x["response_mask"] > 0
    x["token_ids"] = np.where(response, 5, x["token_ids"])
    distiller.reset_metrics()
    after = distiller.test_on_batch(x, y, only_first, return_dict=True)
    np.testing.assert_allclose(before["retrieval"], after["retrieval"], 1e-6)


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize("pooling", ["heads", "rows"])
def test_pooled_heads_have_learned_weights(preprocessor, pooling):
    distiller = make_distiller(
        preprocessor,
        DistanceWeighting(0.0),
        teacher_heads=HEADS,
        pooling=pooling,
        logits_weight=0.0,
        supervised_weight=0.0,
    )
    # Two layers of two heads.
    assert tuple(distiller.head_pooling.mixture().shape) == (1, 4)
    before = to_numpy(distiller.head_pooling.mixture())
    haystacks = make_haystacks(preprocessor, sizes=(3,), batch_size=8)
    history = distiller.fit(haystacks, epochs=6, verbose=0).history
    assert history["retrieval"][-1] < history["retrieval"][0]
    assert (to_numpy(distiller.head_pooling.mixture()) != before).all()


def description(num_layers):
    return Description.from_model(
        make_pali_gemma(dict(PALI_GEMMA, num_layers=num_layers))
    )


def test_layers_are_matched_by_their_relative_depth():
    deep, shallow = description(8), description(4)
    heads = ((2, 1), (3, 0), (7, 1))

    def matches(heads, student, teacher, **kwargs):
        matching = RetrievalMatching(teacher_heads=heads, **kwargs)
        matching.bind(student, teacher, None)
        return matching.matches

    found = matches(heads, shallow, deep)
    assert found == ((1, ((2, 1), (3, 0))), (3, ((7, 1),)))
    # A student that is deeper, and heads in one layer.
    assert matches([(1, 0)], deep, shallow) == ((2, ((1, 0),)),)
    every = matches(heads, shallow, deep, pooling="heads")
    assert every == tuple((layer, heads) for layer in range(4))


def test_negative_layers_count_from_the_last():
    teacher, student = description(8), description(4)
    matching = RetrievalMatching(
        teacher_heads=[(-1, 1), (7, 1), (0, 0)], student_layers=(-1,)
    )
    matching.bind(student, teacher, None)
    assert matching.heads == ((7, 1), (0, 0))
    assert matching.student_attention() == {3}


def heads_found(preprocessor, data):
    distiller = make_distiller(preprocessor)
    return keras_laid.find_retrieval_heads(distiller.teacher, data).heads


@pytest.mark.parametrize(
    "entry",
    [
        "fit",
        *(
            pytest.param(entry, marks=pytest.mark.extra_large_but_on("torch"))
            for entry in ("evaluate", "train_on_batch", "test_on_batch")
        ),
    ],
)
def test_heads_are_found_on_the_first_batches_and_logged(
    preprocessor, entry, caplog
):
    haystacks = make_haystacks(preprocessor, 32, sizes=(3,), batch_size=8)
    distiller = make_distiller(preprocessor, DistanceWeighting(steps=4))
    with caplog.at_level(logging.INFO, logger="keras_laid"):
        if entry.endswith("batch"):
            getattr(distiller, entry)(*haystacks[0])
            expected = heads_found(preprocessor, [haystacks[0]])
        else:
            getattr(distiller, entry)(haystacks, verbose=0)
            expected = heads_found(preprocessor, haystacks)
    assert distiller.retrieval_heads == expected
    assert str(expected) in caplog.text
    distiller.evaluate(haystacks, verbose=0)
    assert caplog.text.count("Retrieval heads") == 1


@pytest.mark.extra_large_but_on("torch")
def test_heads_of_arrays_are_those_of_batches(preprocessor):
    haystacks = make_haystacks(preprocessor, 8, sizes=(3,), batch_size=8)
    x, y, sample_weight = haystacks[0]
    distiller = make_distiller(preprocessor)
    distiller.fit(x, y, sample_weight=sample_weight, batch_size=8, verbose=0)
    assert distiller.retrieval_heads == heads_found(preprocessor, haystacks)


def generator(batches):
    yield from batches


@pytest.mark.extra_large_but_on("torch")
def test_batches_that_can_be_read_once_are_not_used_up(preprocessor):
    haystacks = make_haystacks(preprocessor, sizes=(3,))
    batches = [haystacks[0], haystacks[1]]
    distiller = make_distiller(preprocessor)
    with pytest.raises(ValueError, match="read only once.*find_heads"):
        distiller.fit(generator(batches), steps_per_epoch=2, verbose=0)
    found = distiller.find_heads(batches)
    assert distiller.retrieval_heads == found.heads
    distiller.fit(generator(batches), steps_per_epoch=2, verbose=0)
    assert int(distiller.step) == 2


@pytest.mark.extra_large_but_on("torch")
def test_weight_files_hold_the_heads(preprocessor, tmp_path):
    haystacks = make_haystacks(preprocessor, sizes=(3,))
    distiller = make_distiller(preprocessor)
    distiller.fit(haystacks, verbose=0)
    matching = distiller.term(RetrievalMatching)
    distiller.set_heads(matching, ((0, 2),))  # Heads that would not be found.
    path = str(tmp_path / "state.weights.h5")
    distiller.save_weights(path)
    other = make_distiller(preprocessor)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    assert other.retrieval_heads == ((0, 2),)
    assert int(other.step) == 2
    without = make_distiller(preprocessor, retrieval_weight=0.0)
    without.optimizer.build(without.trainable_variables)
    without.load_weights(path)
    assert without.retrieval_heads == ()


@pytest.mark.extra_large_but_on("torch")
def test_prompts_of_one_image_have_no_retrieval(preprocessor):
    distiller = make_distiller(preprocessor)
    haystacks = make_haystacks(preprocessor, sizes=(1,))
    with pytest.warns(UserWarning, match="The retrieval term is 0"):
        history = distiller.fit(haystacks, verbose=0).history
    assert history["retrieval"] == [0.0]
    assert history["loss"][0] > 0


@pytest.mark.extra_large_but_on("torch")
def test_a_stored_teacher_has_the_same_heads(preprocessor, tmp_path):
    haystacks = make_haystacks(preprocessor, 16, sizes=(3,), batch_size=8)
    beside = make_distiller(preprocessor)
    expected = beside.evaluate(haystacks, verbose=0, return_dict=True)
    store = keras_laid.store_teacher(
        beside.teacher, haystacks, tmp_path, top_k=16
    )
    assert store.retrieval_heads == tuple(sorted(beside.retrieval_heads))
    alone = DistanceWeightedAttentionDistillation(store, beside.student)
    alone.compile(**FEW_STEPS)
    found = alone.evaluate(
        store.targets_for(haystacks), verbose=0, return_dict=True
    )
    np.testing.assert_allclose(found["retrieval"], expected["retrieval"], 1e-3)
    stored = store.read(haystacks[0])
    assert {name.split("_")[1] for name in stored} == {
        "shares",
        "logits",
        "index",
        "others",
    }
    for name, array in stored.items():
        if "shares" in name:  # For each example, row and image.
            assert array.shape == (8, 14, 3) and array.dtype == "float16"
    with pytest.raises(ValueError, match="must have the retrieval heads"):
        DistanceWeightedAttentionDistillation(
            store,
            beside.student,
            terms=[RetrievalMatching(teacher_heads=[(0, 0), (0, 1)])],
        )


@pytest.mark.parametrize(
    "family",
    [
        small_models.llama,
        pytest.param(
            small_models.gemma_3, marks=pytest.mark.extra_large_but_on("torch")
        ),
    ],
    ids=small_models.name_of,
)
def test_segments_of_any_kind(family):
    teacher = small_models.make_model(family, seed=5, **small_models.LARGER)
    student = small_models.make_model(family)
    inputs = small_models.make_inputs(student)
    segments = np.append(np.arange(12) // 4 + 1, np.zeros(4, int))
    inputs["segments"] = np.tile(segments, (2, 1))
    distiller = DistanceWeightedAttentionDistillation(
        teacher,
        student,
        distance_weighting=DistanceWeighting(0.0),
        terms=[RetrievalMatching(num_segments=3)],
    )
    distiller.compile(keras.optimizers.Adam(3e-3), **FEW_STEPS)
    history = distiller.fit(
        inputs,
        inputs["token_ids"],
        sample_weight=inputs["padding_mask"],
        epochs=5,
        verbose=0,
    ).history
    assert 0 < history["retrieval"][-1] < history["retrieval"][0]
    missing = make_without_count(teacher, student)
    with pytest.raises(ValueError, match="Pass the largest number"):
        missing.test_on_batch(inputs, inputs["token_ids"])


def make_without_count(teacher, student):
    distiller = DistanceWeightedAttentionDistillation(
        teacher,
        student,
        terms=[RetrievalMatching(teacher_heads=[(-1, 0)])],
    )
    distiller.compile(run_eagerly=True)
    return distiller
