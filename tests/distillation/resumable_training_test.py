"""Runs that are killed, and resume as if they had not been."""

import errno
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from keras_laid import PositionStretching
from keras_laid import ResumableTraining
from keras_laid import attach_gain_modulation
from keras_laid.distillation.distiller import (
    DistanceWeightedAttentionDistillation,
)
from tests.support import FEW_STEPS
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import make_terms
from tests.support import to_numpy

EPOCHS = 4
LONG = 80  # More epochs than ten killed runs reach.


class Noise(keras.utils.PyDataset):
    """Data with other numbers in each epoch."""

    epoch = 0

    def __len__(self):
        return 5

    def __getitem__(self, index):
        rng = np.random.default_rng((index, self.epoch))
        return rng.normal(size=(4, 3)), rng.normal(size=(4, 2))

    def on_epoch_end(self):
        self.epoch += 1


class Killed(BaseException):
    """Stands for a signal that nothing catches."""


def train(folder, callbacks=(), learning_rate=1e-2):
    """A small run with dropout and shuffling; returns the model and history."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    )
    model.compile(keras.optimizers.Adam(learning_rate), "mse")
    data = Noise()
    resumable = ResumableTraining(folder, data)
    model.fit(
        data,
        epochs=EPOCHS,
        shuffle=True,
        verbose=0,
        callbacks=[resumable, *callbacks],
    )
    return model, resumable.history


def assert_same_run(one, other):
    for a, b in zip(one[0].variables, other[0].variables, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    assert one[1] == other[1]
    assert len(one[1]) == EPOCHS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def kill_at(monkeypatch, owner, name, call):
    """Makes a function raise `Killed` at one of its calls."""
    function = getattr(owner, name)
    calls = []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, killing)


@pytest.mark.extra_large_but_on("jax", "torch")
@pytest.mark.parametrize(
    "owner, name",
    [
        (keras.Model, "save_weights"),
        (pathlib.Path, "write_text"),
        (pathlib.Path, "rename"),
        (shutil, "rmtree"),
        (Noise, "__getitem__"),
        (Noise, "on_epoch_end"),
    ],
)
def test_killed_anywhere_it_goes_on(tmp_path, monkeypatch, whole, owner, name):
    call = {"__getitem__": 13, "rmtree": 5}.get(name, 3)
    # TensorFlow wraps what its iterators raise.
    with monkeypatch.context() as patch, pytest.raises((Killed, Exception)):
        kill_at(patch, owner, name, call)
        train(tmp_path)
    assert list(tmp_path.glob("epoch_*"))  # There is something to resume from.
    random.random()  # Another process may have another state.
    assert_same_run(train(tmp_path), whole)


@pytest.mark.parametrize("killed", [False, True])
def test_what_comes_after_a_run_is_trained(tmp_path, killed):
    model, _ = train(tmp_path / "one")
    if killed:
        model, _ = train(tmp_path / "one")  # Resumes at its end.
    data = Noise()
    assert model.fit(data, epochs=2, verbose=0).epoch == [0, 1]
    model._initial_epoch = 3  # As an interrupted `fit` leaves it.
    resumable = ResumableTraining(tmp_path / "two", data)
    history = model.fit(data, epochs=2, verbose=0, callbacks=[resumable])
    assert history.epoch == [0, 1]


def test_killed_while_weights_are_written(tmp_path, monkeypatch, whole):
    save = keras.Model.save_weights
    calls = []

    def truncating(model, path):
        save(model, path)
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(keras.Model, "save_weights", truncating)
        train(tmp_path)
    assert_same_run(train(tmp_path), whole)


def test_what_has_ended_takes_no_step(tmp_path, whole):
    train(tmp_path)
    assert_same_run(train(tmp_path), whole)
    assert [path.name for path in tmp_path.iterdir()] == [f"epoch_{EPOCHS}"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="must be writable.*file/run"):
        train(tmp_path / "file" / "run")


def test_a_full_disk_costs_nothing_saved(tmp_path, monkeypatch, whole):
    save = keras.Model.save_weights

    def full(model, path):
        if "2" in json.dumps([p.name for p in tmp_path.glob("epoch_*")]):
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, path)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save_weights", full)
        with pytest.raises(OSError, match="after epoch 2 cannot.*No space"):
            train(tmp_path)
    assert_same_run(train(tmp_path), whole)


def test_a_loss_that_is_not_finite_keeps_the_state_before(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                variable = self.model.trainable_variables[0]
                variable.assign(np.nan * np.ones(variable.shape))

    with pytest.raises(FloatingPointError, match="loss of epoch 2 is nan"):
        train(tmp_path, [Break()])
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_2"]


def distill(folder, epochs=EPOCHS):
    """A run of the distiller with everything that has a state."""
    keras.utils.set_random_seed(0)
    preprocessor = make_preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    teacher, student = (
        make_multi_image(seed=seed, vocabulary_size=size) for seed in (1, 2)
    )
    attach_gain_modulation(student)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    distiller = DistanceWeightedAttentionDistillation(
        teacher,
        student,
        # TensorFlow's threads sum this term's gradient in a varying order.
        terms=make_terms(0.0 if on_tensorflow else 1.0, query_key_weight=0.1),
    )
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 2 * epochs)
    distiller.compile(keras.optimizers.Adam(schedule), **FEW_STEPS)
    data = make_haystacks(
        preprocessor, 16, (2, 3), stretching=PositionStretching(9, 4)
    )
    resumable = ResumableTraining(folder, data)
    distiller.fit(
        data, epochs=epochs, shuffle=True, verbose=0, callbacks=[resumable]
    )
    return student, resumable.history


@pytest.mark.extra_large_but_on("torch")
def test_the_distiller_goes_on(tmp_path, monkeypatch):
    whole = distill(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, pathlib.Path, "rename", 3)
        distill(tmp_path / "killed")
    assert_same_run(distill(tmp_path / "killed"), whole)


@pytest.mark.extra_large
@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow's threads sum in a varying order.",
)
def test_ten_kills_at_random_moments(tmp_path):
    """`SIGKILL` of a process; its moment differs from run to run."""

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder)],
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "whole").wait() == 0
    killed = tmp_path / "killed"
    for _ in range(10):
        before = set(killed.glob("epoch_*"))
        process = start(killed)
        while not set(killed.glob("epoch_*")) - before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.5))
        assert process.poll() is None
        process.kill()
        process.wait()
    assert start(killed).wait() == 0
    one, other = (
        folder / f"epoch_{LONG}" for folder in (tmp_path / "whole", killed)
    )
    for name in ("training.json", "state.weights.h5"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


if __name__ == "__main__":
    distill(sys.argv[1], LONG)
