"""A store of a server's log probabilities is that of the teacher itself."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import PositionStretching
from keras_laid import StoredTeacher
from keras_laid import store_log_probabilities
from keras_laid import store_teacher
from keras_laid.distillation import NextTokens
from tests.distillation import server_support
from tests.support import FEW_STEPS
from tests.support import Batches
from tests.support import GradientRecorder
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import to_numpy

TOP_K = 6
NAMES = ("logits", "index", "others")
SHAPES = {
    "generated": (server_support.generated, "logprobs"),
    "scored": (server_support.scored, "prompt_logprobs"),
    "chat": (server_support.chat, "logprobs"),
    "chat of ids": (server_support.chat_of_ids, "logprobs"),
}


@pytest.fixture(scope="module")
def preprocessor():
    return make_preprocessor()


@pytest.fixture(scope="module")
def teacher(preprocessor):
    return make_multi_image(None, preprocessor, seed=1)


@pytest.fixture(scope="module")
def student(preprocessor):
    return make_multi_image(None, preprocessor)


@pytest.fixture(scope="module")
def data(preprocessor):
    return make_haystacks(preprocessor, num_questions=8, sizes=(2,))


@pytest.fixture(scope="module")
def responses(teacher, data):
    return list(server_support.responses(teacher, data))


@pytest.fixture(scope="module")
def beside(teacher, data, tmp_path_factory):
    """The store that the teacher itself makes."""
    folder = tmp_path_factory.mktemp("beside")
    return store_teacher(teacher, data, folder, (), top_k=TOP_K)


@pytest.fixture
def store(responses, data, student, tmp_path):
    """Writes lines, and a store of them."""

    def store(shape, k=TOP_K, change=lambda lines: lines, **kwargs):
        make, field = SHAPES[shape]
        tokenizer = student.preprocessor.tokenizer
        lines = [make(*each, k, tokenizer) for each in responses]
        path = server_support.write(tmp_path / "lines.jsonl", change(lines))
        arguments = dict(top_k=TOP_K, field=field, data=data) | kwargs
        return store_log_probabilities(
            path, folder=tmp_path / "store", student=student, **arguments
        )

    return store


@pytest.fixture(scope="module")
def step(beside, student):
    """The losses and the gradients of a step, from the targets of a store."""
    distiller = DistanceWeightedAttentionDistillation(
        beside, student, terms=[NextTokens()]
    )
    recorder = GradientRecorder()
    distiller.compile(recorder, **FEW_STEPS)

    def step(store, data):
        # As `fit` hands them over.
        batch = keras.tree.map_structure(
            ops.convert_to_tensor, store.targets_for(data)[0]
        )
        distiller.reset_metrics()
        losses = distiller.train_on_batch(*batch, return_dict=True)
        return (
            {name: float(value) for name, value in losses.items()},
            [np.array(to_numpy(each)) for each in recorder.gradients],
        )

    return step


@pytest.mark.parametrize("shape", ["scored", "chat"])
def test_loss_and_gradients_are_those_of_the_teachers_own_store(
    shape, store, beside, data, step
):
    expected, teacher_gradients = step(beside, data)
    found, server_gradients = step(store(shape), data)
    assert found.keys() == expected.keys()
    assert expected["logits"] > 0.01
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, 1e-5, 1e-6, name)
    atol = 1e-5 * max(np.abs(each).max() for each in teacher_gradients)
    assert atol > 0
    for one, other in zip(server_gradients, teacher_gradients, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_targets_are_log_probabilities(shape, store, beside, data):
    """Of the same tokens as the teacher's; others weigh what is left."""
    batch = data[0]
    found, expected = store(shape).read(batch), beside.read(batch)
    assert found.keys() == expected.keys()
    marked = batch[2] > 0
    (found, index, rest), (expected, expected_index, expected_rest) = (
        [each[f"teacher_{name}"][marked] for name in NAMES]
        for each in (found, expected)
    )
    np.testing.assert_array_equal(index, expected_index)
    total = np.logaddexp(
        np.logaddexp.reduce(expected, axis=-1), expected_rest[:, 0]
    )
    np.testing.assert_allclose(found, expected - total[:, None], atol=1e-5)
    np.testing.assert_allclose(rest, expected_rest - total[:, None], atol=1e-4)


def test_tokens_besides_the_largest_count_among_the_others(store, beside, data):
    """Servers give more: here, the token itself and three of the largest."""
    few = store("generated", TOP_K + 3).read(data[0])
    expected = beside.read(data[0])["teacher_index"]
    np.testing.assert_array_equal(few["teacher_index"], expected)


def test_all_tokens_leave_nothing(store, student, data):
    size = student.backbone.vocabulary_size
    stored = store("generated", size, top_k=size).read(data[0])
    probabilities = np.exp(stored["teacher_logits"][data[0][2] > 0])
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, atol=1e-5)
    assert (stored["teacher_others"][data[0][2] > 0] < -10).all()


def test_masked_and_unknown_tokens_count_among_the_others(store, data):
    """As those that are not listed."""

    def mask(lines):
        for line in lines:
            for each in line["choices"][0]["logprobs"]["content"]:
                masked, part, *rest = each["top_logprobs"]
                masked["logprob"] = -9999.0
                part |= {"token": "\ufffd", "bytes": [239, 191, 189]}
                each["top_logprobs"] = [*rest, masked, part]
        return lines

    found = store("chat", TOP_K + 2, mask).read(data[0])
    marked = data[0][2] > 0
    logits = found["teacher_logits"][marked].astype("float64")
    others = found["teacher_others"][marked]
    assert (logits > -100).all()
    np.testing.assert_allclose(
        np.exp(logits).sum(axis=-1) + np.exp(others[:, 1]), 1.0, atol=1e-6
    )


def test_file_of_a_batch(store, beside, data):
    def wrap(lines):
        return [
            {
                "id": "vllm-1",
                "custom_id": str(number),
                "response": {"status_code": 200, "body": line},
                "error": None,
            }
            for number, line in enumerate(lines)
        ]

    found = store("chat", change=wrap).read(data[0])["teacher_index"]
    expected = beside.read(data[0])["teacher_index"]
    np.testing.assert_array_equal(found, expected)


def test_ids_of_a_response_tell_it_where_strings_do_not(
    store, responses, beside, data
):
    def with_ids(lines):
        for line, (ids, _) in zip(lines, responses, strict=True):
            (choice,) = line["choices"]
            choice["token_ids"] = ids
            for each in choice["logprobs"]["content"]:
                each |= {"token": "", "bytes": []}
        return lines

    found = store("chat", change=with_ids).read(data[0])["teacher_index"]
    expected = beside.read(data[0])["teacher_index"]
    np.testing.assert_array_equal(found, expected)


def test_a_label_less_than_0_may_be_any_token(store, beside, data):
    """As of prompts without a response."""
    unknown = [(x, np.full_like(y, -1), weight) for x, y, weight in data]
    found = store("chat", data=Batches(*unknown)).read(unknown[1])
    expected = beside.read(data[1])
    np.testing.assert_array_equal(
        found["teacher_index"], expected["teacher_index"]
    )


def test_epochs_and_shards(student, preprocessor, tmp_path):
    """Lines are read again in each epoch, also where a store is resumed."""
    data = make_haystacks(
        preprocessor, 8, (2,), batch_size=2, stretching=PositionStretching(9, 4)
    )
    lines = [
        server_support.generated(*each, 4, None)
        for each in server_support.random_responses(data, 34)
    ]
    path = server_support.write(tmp_path / "lines.jsonl", lines)

    def store():
        return store_log_probabilities(
            path,
            data,
            tmp_path / "store",
            student,
            top_k=4,
            epochs=2,
            batches_per_shard=3,
        )

    stored = store()
    shards = [shard for shard, _ in stored.shards]
    assert len(shards) == 3 and data.epoch == 0
    before = shards[1].read_bytes()
    first = stored.read(data[1])
    data.epoch = 1
    second = stored.read(data[1])
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)
    shards[1].unlink()
    with pytest.raises(ValueError, match="must be complete.*resumes"):
        StoredTeacher(tmp_path / "store")
    store()
    assert shards[1].read_bytes() == before


def test_a_file_that_was_mended_makes_a_store(store, data):
    with pytest.raises(ValueError, match="row 8"):
        store("chat", change=lambda lines: [*lines[:-1], {}])
    stored = store("chat")
    assert stored.settings["top_k"] == TOP_K
    with pytest.raises(ValueError, match=r"other \['teacher'\]"):
        store("chat", change=lambda lines: [{**line, "n": 1} for line in lines])


def test_only_logits_can_be_matched(store, student):
    stored = store("generated")
    with pytest.raises(ValueError, match="retrieval_weight=0"):
        DistanceWeightedAttentionDistillation(stored, student)
    with pytest.raises(ValueError, match="with layers="):
        DistanceWeightedAttentionDistillation(
            stored, student, retrieval_weight=0, attention_weight=1
        )
    with pytest.raises(ValueError, match="with temperature=1.0"):
        DistanceWeightedAttentionDistillation(
            stored, student, terms=[NextTokens(temperature=2.0)]
        )


def test_a_store_says_what_it_is(store):
    settings = json.loads((store("scored").folder / "teacher.json").read_text())
    assert settings["settings"]["field"] == "prompt_logprobs"
    assert settings["settings"]["retrieval_heads"] == []
