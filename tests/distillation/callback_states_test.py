"""Callbacks with a state act in a resumed run as in a whole one."""

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest

from keras_laid import ResumableTraining
from keras_laid.distillation.callback_states import read_states
from keras_laid.distillation.callback_states import write_states
from tests.distillation.resumable_training_test import Killed
from tests.distillation.resumable_training_test import Noise
from tests.support import NO_XLA
from tests.support import to_numpy

EPOCHS = 7
C = keras.callbacks


class Kill(C.Callback):
    """Kills a run at the beginning or end of an epoch, before it is saved."""

    def __init__(self, epoch, at_end):
        super().__init__()
        self.epoch, self.at_end = epoch, at_end

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch and not self.at_end:
            raise Killed

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch and self.at_end:
            raise Killed


class Falls(C.Callback):
    """A user's callback: the learning rate follows how often the loss fell."""

    def __init__(self):
        super().__init__()
        self.last, self.falls = None, np.zeros(2)

    def on_epoch_end(self, epoch, logs=None):
        if self.last is not None:
            self.falls[int(logs["loss"] < self.last)] += 1
        self.last = logs["loss"]
        rate = 0.01 * (1 + float(self.falls @ (1, 3)))
        self.model.optimizer.learning_rate = rate

    def get_state(self):
        return {"last": self.last, "falls": self.falls}

    def set_state(self, state):
        self.last, self.falls = state["last"], state["falls"]


def plateau(**kwargs):
    return C.ReduceLROnPlateau(
        "val_loss", factor=0.5, patience=2, min_delta=10.0, **kwargs
    )


def stopping(**kwargs):
    return C.EarlyStopping("val_loss", patience=4, min_delta=10.0, **kwargs)


def best(folder):
    path = str(folder / "best.weights.h5")
    return C.ModelCheckpoint(
        path, "val_loss", save_best_only=True, save_weights_only=True
    )


def rising():
    """Makes later epochs worse."""
    return C.LearningRateScheduler(lambda epoch: 0.01 if epoch < 3 else 3.0)


CALLBACKS = {
    "plateau": lambda folder: [plateau()],
    "plateau with cooldown": lambda folder: [plateau(cooldown=1)],
    "stopping": lambda folder: [stopping()],
    "stopping at the best": lambda folder: [
        rising(),
        C.EarlyStopping("val_loss", patience=3, restore_best_weights=True),
    ],
    "best checkpoint": lambda folder: [best(folder), rising()],
    "checkpoints of batches": lambda folder: [
        C.ModelCheckpoint(
            str(folder / "{epoch}.weights.h5"),
            save_weights_only=True,
            save_freq=4,
        )
    ],
    "averaged weights": lambda folder: [C.SwapEMAWeights(swap_on_epoch=True)],
    "two at once": lambda folder: [plateau(), stopping()],
    "two of a kind": lambda folder: [stopping(), stopping(start_from_epoch=1)],
    "averages, the best of them kept": lambda folder: [
        C.SwapEMAWeights(swap_on_epoch=True),
        best(folder),
        rising(),
    ],
    "a user's own": lambda folder: [Falls()],
}


def train(folder, name, kill=None, first=True):
    """Trains; returns variables, logs and files, and the number of epochs."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    )
    optimizer = keras.optimizers.Adam(
        0.01, use_ema="average" in name, ema_momentum=0.8
    )
    model.compile(optimizer, "mse", **NO_XLA)
    data, validation = Noise(), Noise()
    folder.mkdir(exist_ok=True)
    resumable = ResumableTraining(folder / "run", [data, validation])
    others = [*CALLBACKS[name](folder), *([kill] if kill else [])]
    taken = model.fit(
        data,
        epochs=EPOCHS,
        validation_data=validation,
        verbose=0,
        callbacks=[resumable, *others] if first else [*others, resumable],
    )
    return {
        "variables": [to_numpy(v) for v in model.variables],
        "optimizer": [to_numpy(v) for v in model.optimizer.variables],
        "history": resumable.history,
        "files": {p.name: arrays_in(p) for p in folder.glob("*.h5")},
    }, len(taken.epoch)


def arrays_in(path):
    """The bytes of each array, without the names of layers in the file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: np.array(item).tobytes()})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


def assert_same(one, other):
    for name in ("variables", "optimizer"):
        for a, b in zip(one[name], other[name], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert one["history"] == other["history"]
    assert one["files"] == other["files"]


@pytest.mark.extra_large_but_on("jax", "torch")
@pytest.mark.parametrize(
    "name",
    [
        "plateau",
        "stopping at the best",
        "averages, the best of them kept",
        "two at once",
        "a user's own",
    ],
)
def test_killed_at_a_random_epoch_it_goes_on(name, tmp_path):
    whole, epochs = train(tmp_path / "whole", name)
    rng = np.random.default_rng(len(name))
    kill = Kill(rng.integers(1, epochs), at_end=rng.integers(2) == 1)
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        train(killed, name, kill)
    resumed, taken = train(killed, name)
    assert 0 < taken < epochs
    assert_same(resumed, whole)
    again, taken = train(killed, name)  # The same command again.
    assert taken == 0
    assert_same(again, whole)


def test_it_may_stand_anywhere(tmp_path):
    name = "averages, the best of them kept"
    whole, _ = train(tmp_path / "whole", name)
    with pytest.raises(Killed):
        train(tmp_path / "killed", name, Kill(4, at_end=False), first=False)
    resumed, _ = train(tmp_path / "killed", name, first=False)
    assert_same(resumed, whole)


@pytest.mark.extra_large
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", CALLBACKS)
def test_killed_in_every_epoch(name, at_end, tmp_path):
    whole, epochs = train(tmp_path / "whole", name)
    for epoch in range(1, epochs):
        with pytest.raises(Killed):
            train(tmp_path / "killed", name, Kill(epoch, at_end))
    assert_same(train(tmp_path / "killed", name)[0], whole)


def test_states_of_all_kinds_are_read_back(tmp_path):
    states = [
        {
            "numbers": [1, 0.1, float("inf"), True, None, "text"],
            "scalar": np.float32(0.1),
            "arrays": {
                "one": np.arange(6).reshape(2, 3),
                "other": np.ones(3, ml_dtypes.bfloat16),
            },
            "tensor": keras.ops.ones((2, 1)),
        },
        {},
    ]
    write_states(tmp_path, states)
    one, other = read_states(tmp_path)
    assert other == {}
    assert one["numbers"] == states[0]["numbers"]
    assert np.float32(one["scalar"]) == np.float32(0.1)
    np.testing.assert_array_equal(one["arrays"]["one"], [[0, 1, 2], [3, 4, 5]])
    assert one["arrays"]["other"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(one["tensor"], [[1], [1]])


def fit(folder, *callbacks, data=None):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    resumable = ResumableTraining(folder, data)
    callbacks = [resumable, *callbacks]
    model.fit(Noise(), epochs=1, verbose=0, callbacks=callbacks)


def test_other_callbacks_and_data_are_refused(tmp_path):
    fit(tmp_path, plateau(), C.TerminateOnNaN())
    before = [path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))]
    for callbacks in ([], [stopping()], [plateau(), plateau()]):
        with pytest.raises(ValueError, match=r"\['ReduceLROnPlateau'\] were"):
            fit(tmp_path, *callbacks)
    with pytest.raises(ValueError, match="1 of them in `data`, where 0 were"):
        fit(tmp_path, plateau(), data=Noise())
    after = [path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))]
    assert after == before
    fit(tmp_path, plateau())  # A stateless callback may be left out.


class Half(C.Callback):
    def get_state(self):
        return 1


class Strange(Half):
    def get_state(self):
        return {"set": {1}}

    def set_state(self, state):
        pass


def test_states_that_cannot_be_restored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Half with only 'get_state'"):
        fit(tmp_path, Half())
    with pytest.raises(TypeError, match=r"Received: \{1\} of type set"):
        fit(tmp_path, Strange())
    assert not list(tmp_path.glob("epoch_*"))
    with pytest.raises(ValueError, match="one of the callbacks of a `fit`"):
        ResumableTraining(tmp_path).set_model(keras.Sequential())
