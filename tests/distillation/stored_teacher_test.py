"""Training from a teacher's stored targets is training beside the teacher."""

import json
import resource
import shutil

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import PositionStretching
from keras_laid import StoredTeacher
from keras_laid import store_teacher
from tests.support import FEW_STEPS
from tests.support import PALI_GEMMA_2
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import make_terms

STRETCHING = PositionStretching(9, 4)
HEADS = ((1, 0), (1, 3), (3, 2))
QUESTIONS = dict(num_questions=16, sizes=(2,), stretching=STRETCHING)


@pytest.fixture(scope="module")
def preprocessor():
    return make_preprocessor()


@pytest.fixture(scope="module")
def teacher(preprocessor):
    """A teacher with soft caps, and more heads and width than the student."""
    return make_multi_image(PALI_GEMMA_2, preprocessor, seed=1, hidden_dim=24)


@pytest.fixture(scope="module")
def written(teacher, preprocessor, tmp_path_factory):
    """A store of two epochs of four batches, in three shards."""
    folder = tmp_path_factory.mktemp("store")
    data = make_haystacks(preprocessor, **QUESTIONS)
    return store(teacher, data, folder).folder


def in_turn(data):
    """Makes the first epoch of the data follow the second one again."""

    class InTurn(type(data)):
        def on_epoch_end(self):
            self.epoch = (self.epoch + 1) % 2

    data.__class__ = InTurn
    return data


def store(teacher, data, folder, **kwargs):
    arguments = dict(
        retrieval_heads=HEADS,
        layers=(1, 3),
        top_k=data.preprocessor.tokenizer.vocabulary_size(),
        temperature=2.0,
        dtype="float32",
        epochs=2,
        batches_per_shard=3,
    )
    return store_teacher(teacher, data, folder, **arguments | kwargs)


def distil(teacher, data, preprocessor, **kwargs):
    """Trains a student for two epochs; returns its losses and weights."""
    keras.utils.set_random_seed(0)
    student = make_multi_image(preprocessor=preprocessor, seed=2)
    arguments = dict(
        teacher_heads=HEADS,
        attention_weight=1.0,
        query_key_weight=0.1,
        temperature=2.0,
        layer_map=[(0, 1), (1, 3)],
    )
    distiller = DistanceWeightedAttentionDistillation(
        teacher, student, terms=make_terms(**arguments | kwargs)
    )
    distiller.compile(keras.optimizers.SGD(0.1), **FEW_STEPS)
    history = distiller.fit(data, epochs=2, shuffle=False, verbose=0).history
    return history, distiller


def assert_same_losses(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name], values, rtol, 1e-3 * rtol, err_msg=name
        )


@pytest.mark.extra_large_but_on("torch")
def test_a_store_has_whole_questions(teacher, tmp_path):
    """Questions may have more tokens than the preprocessor's length."""
    short = make_preprocessor()
    short.sequence_length = 4
    data = make_haystacks(short, **QUESTIONS)
    stored = store(teacher, data, tmp_path, retrieval_heads=(), epochs=1)
    batch = data[0]
    last = batch[2].argmax(axis=1)  # The answer is the twelfth token.
    logits = stored.read(batch)["teacher_logits"]
    assert (np.abs(logits[np.arange(4), last]).max(axis=1) > 0).all()
    assert batch[1].shape == (4, 12) and (last == 10).all()


def test_inputs_that_are_not_finite_are_refused(
    teacher, preprocessor, tmp_path
):
    data = make_haystacks(preprocessor, **QUESTIONS)
    data._offset = float("nan")  # Like a photograph that was read wrongly.
    with pytest.raises(ValueError, match="infinity in 'images' of batch 0"):
        store(teacher, data, tmp_path)


@pytest.mark.extra_large_but_on("torch")
def test_epochs_of_a_store_can_be_restored(written, preprocessor):
    data = make_haystacks(preprocessor, **QUESTIONS)
    targets = StoredTeacher(written).targets_for(data)
    keras_laid.ResumableTraining("unused", targets)
    targets.epoch = 1
    assert data.epoch == 1
    targets.on_epoch_end()
    assert targets.epoch == 0


@pytest.mark.extra_large_but_on("torch")
def test_losses_are_those_beside_the_teacher(teacher, written, preprocessor):
    data = make_haystacks(preprocessor, **QUESTIONS)
    expected, beside = distil(teacher, in_turn(data), preprocessor)
    stored = StoredTeacher(written)
    data = make_haystacks(preprocessor, **QUESTIONS)
    found, alone = distil(stored, stored.targets_for(data), preprocessor)
    assert_same_losses(found, expected, rtol=1e-4)
    assert len(set(expected["attention"])) == 2  # Epochs do differ.
    weights = [len(model.non_trainable_variables) for model in (beside, alone)]
    assert weights[0] - weights[1] == len(teacher.variables)


@pytest.mark.extra_large_but_on("torch")
def test_losses_to_the_stored_precision_of_all_rows(
    teacher, preprocessor, tmp_path
):
    data = make_haystacks(preprocessor, **QUESTIONS)
    expected, _ = distil(teacher, in_turn(data), preprocessor, rows="all")
    data = make_haystacks(preprocessor, **QUESTIONS)
    stored = store(teacher, data, tmp_path, dtype="float16", rows="all")
    targets = stored.targets_for(data)
    found, _ = distil(stored, targets, preprocessor, rows="all")
    assert_same_losses(found, expected, rtol=1e-3)


@pytest.mark.extra_large_but_on("torch")
def test_few_logits_ask_for_less(teacher, preprocessor, tmp_path):
    data = make_haystacks(preprocessor, num_questions=4, sizes=(2,))
    student = make_multi_image(preprocessor=preprocessor, seed=2)
    terms = []
    for top_k in (1, 4, 16):
        stored = store(
            teacher,
            data,
            tmp_path / str(top_k),
            layers=(),
            top_k=top_k,
            temperature=1.0,
            epochs=1,
        )
        distiller = DistanceWeightedAttentionDistillation(
            stored, student, attention_weight=0.0
        )
        distiller.compile(run_eagerly=True)
        logs = distiller.evaluate(
            stored.targets_for(data), return_dict=True, verbose=0
        )
        terms.append(logs["logits"])
    assert 0 < terms[0] < terms[1] < terms[2]


@pytest.mark.extra_large_but_on("torch")
def test_size_is_the_documented_one(teacher, written):
    stored = StoredTeacher(written)
    layers = [teacher.backbone.transformer_layers[i] for i in (1, 3)]
    key = sum(8 * each.num_key_value_heads for each in layers)
    query = sum(8 * each.num_query_heads for each in layers)
    marked = 2 * (8 * stored.settings["top_k"] + 8)  # "yes" and its end.
    expected = 4 * key + (14 * 4 * query + marked) / (2 * 4 + 14)
    # Names, checksums and blocks add to these small records.
    assert expected < stored.bytes_per_token < 3 * expected


@pytest.mark.extra_large_but_on("torch")
def test_goes_on_where_it_was_stopped(
    teacher, written, preprocessor, tmp_path, monkeypatch
):
    data = make_haystacks(preprocessor, **QUESTIONS)
    read = type(data).__getitem__
    reads = []

    def one_fails(data, index):
        reads.append((data.epoch, index))
        if len(reads) == 5:  # In the second shard.
            raise KeyboardInterrupt
        return read(data, index)

    monkeypatch.setattr(type(data), "__getitem__", one_fails)
    with pytest.raises(KeyboardInterrupt):
        store(teacher, data, tmp_path)
    with pytest.raises(ValueError, match="must be complete.*00001-of-00003"):
        StoredTeacher(tmp_path)
    stored = store(teacher, data, tmp_path)
    assert reads[5:] == [(0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert data.epoch == 0
    for (one, _), (other, _) in zip(
        stored.shards, StoredTeacher(written).shards, strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.extra_large_but_on("torch")
def test_a_full_disk_costs_no_shard(teacher, preprocessor, written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "store")
    *complete, last = [shard for shard, _ in StoredTeacher(folder).shards]
    size = last.stat().st_size
    last.unlink()
    before = {path: path.read_bytes() for path in complete}
    data = make_haystacks(preprocessor, **QUESTIONS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="written as a whole. .*too large"):
            store(teacher, data, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in complete} == before
    with pytest.raises(ValueError, match="must be complete"):
        StoredTeacher(folder)
    store(teacher, data, folder)
    assert last.stat().st_size == size


@pytest.mark.extra_large_but_on("torch")
def test_corrupted_shard_is_named_and_refused(teacher, preprocessor, tmp_path):
    data = make_haystacks(preprocessor, **QUESTIONS)
    stored = store(teacher, data, tmp_path)
    shard, _ = stored.shards[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard.name}.*SHA-256.*Delete it"):
        stored.targets_for(data)[0]
    shard.unlink()
    stored = store(teacher, data, tmp_path)
    assert stored.targets_for(data)[0][0]["teacher_query_1"].shape[2] == 4


def test_other_batches_are_refused(written, preprocessor):
    stored = StoredTeacher(written)
    data = make_haystacks(preprocessor, **QUESTIONS, seed=1)
    with pytest.raises(ValueError, match="bit for bit.*epochs"):
        stored.targets_for(data)[0]


def test_inputs_without_targets_are_refused(written, preprocessor):
    data = make_haystacks(preprocessor, **QUESTIONS)
    with pytest.raises(ValueError, match="targets_for"):
        distil(StoredTeacher(written), data, preprocessor)


def test_store_of_one_layer_without_logits(teacher, preprocessor, tmp_path):
    data = make_haystacks(preprocessor, **QUESTIONS)
    stored = store(teacher, data, tmp_path, top_k=0, layers=(-1,))
    with pytest.raises(ValueError, match="with layers=.3.; wanted: .1."):
        distil(stored, None, preprocessor)
    with pytest.raises(ValueError, match="top_k=0; wanted: 1"):
        distil(stored, None, preprocessor, layer_map="last")
    x, *_ = stored.targets_for(data)[0]
    assert not [name for name in x if "logits" in name]
    assert stored.attention(x, [3])[3].query.shape == (4, 14, 4, 8)


def test_another_store_is_not_gone_on_with(teacher, written, preprocessor):
    data = make_haystacks(preprocessor, **QUESTIONS)
    with pytest.raises(ValueError, match=r"other \['dtype'\]"):
        store(teacher, data, written, dtype="float16")
    other = make_multi_image(PALI_GEMMA_2, preprocessor, seed=3, hidden_dim=24)
    with pytest.raises(ValueError, match=r"other \['teacher'\]"):
        store(other, data, written)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_numbers_too_large_for_float16_are_refused(
    teacher, preprocessor, tmp_path, monkeypatch
):
    from keras_laid.distillation.store_teacher import Targets

    predict = Targets.predict_on_batch

    def predict_large(model, x):
        return {k: 1e6 * v for k, v in sorted(predict(model, x).items())}

    monkeypatch.setattr(Targets, "predict_on_batch", predict_large)
    data = make_haystacks(preprocessor)
    with pytest.raises(ValueError, match="float16.*key_1 up to.*float32"):
        store(teacher, data, tmp_path, epochs=1, dtype="float16")


def test_a_store_says_what_it_is(written):
    values = json.loads((written / "teacher.json").read_text())
    assert values["description"]["model"] == "MultiImagePaliGemmaCausalLM"
    assert values["settings"]["layers"] == [1, 3]
    assert keras_laid.StoredTeacher is StoredTeacher
