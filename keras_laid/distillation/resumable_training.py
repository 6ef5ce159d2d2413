"""Lets a training run be killed at any moment, and resumes it."""

import json
import math
import pathlib
import random
import shutil
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_laid.arguments import check_path
from keras_laid.distillation.callback_states import list_being_called
from keras_laid.distillation.callback_states import read_states
from keras_laid.distillation.callback_states import set_states
from keras_laid.distillation.callback_states import states_of
from keras_laid.distillation.callback_states import write_states
from keras_laid.typing import PathLike

SEED = "seed_generator_state"  # What paths of seed generators end with.


class ResumableTraining(keras.callbacks.Callback):
    """Saves all that training needs after each epoch, and restores it.

    A run that was killed, also during a save, and is started again by the same
    command, takes the same steps as one that was not, bit for bit. The last
    state is in the folder `epoch_<number>`, complete or not there at all:

    - weights of the student and the mixers, optimizer, step counters;
    - seeds of layers, and the states of Python's, NumPy's and torch's own
      random numbers, by which data are shuffled;
    - the attribute `epoch` of `data`, and the logs of every epoch;
    - the states of other callbacks of the same `fit`, wherever they stand in
      the list: `EarlyStopping` with its best weights, `ModelCheckpoint`,
      `ReduceLROnPlateau`, `SwapEMAWeights`, those derived from these, and any
      callback with methods `get_state()` and `set_state(state)`. A state is
      made of numbers, strings, `None`, arrays, lists, and dictionaries whose
      keys are strings.

    Not restored are: other callbacks' own variables, those of a
    `LambdaCallback` for example; files that callbacks write, so pass
    `append=True` to `CSVLogger`, which may have the last epoch twice, and
    expect `TensorBoard` to count steps from 0; the place in a generator, in a
    `tf.data.Dataset`, or in data of which `steps_per_epoch` takes a part an
    epoch; operations of TensorFlow that are random without a seed.

    With `keras.callbacks.BackupAndRestore` a kill between its two files, or in
    the middle of one, gives other steps or none.

    An epoch is the most that is lost: pass short ones to `fit` where steps are
    long. A run that has ended takes no further step, be it by its number of
    epochs or since a callback has set `model.stop_training`. To pause a run,
    end the process.

    The loss of an epoch that is not finite, which one image of NaN is enough
    for, is never saved: the last state before it stays, to resume from when the
    data or the learning rate are mended.

    Args:
        folder: Path of a folder for only this run; made if it is not there.
        data: The training data, if they change with the epoch by an attribute
            `epoch`, as `keras_laid.Haystacks` with stretched positions do; or a
            list of all such data, those of validation included.

    Attributes:
        history: List of dictionaries, the logs of every epoch so far, those
            before the run was killed included.

    Raises:
        TypeError: If `folder` is not a path, or the state of a callback is of
            another kind.
        ValueError: If `data` have no attribute `epoch`; before the first step,
            if a folder `epoch_<number>` holds something else, or states of
            other callbacks.
        OSError: If the folder cannot be written to, before the first step; or
            if a state cannot be saved, since the disk is full for example. The
            one before it is kept.
        FloatingPointError: If the loss of an epoch is not finite. Its state is
            not saved; the one before it is kept.

    Example:

    ```python
    distiller.fit(
        haystacks,
        epochs=100,
        callbacks=[
            keras_laid.ResumableTraining("runs/a", haystacks),
            keras.callbacks.EarlyStopping("loss", patience=3),
        ],
    )
    ```
    """

    def __init__(
        self,
        folder: PathLike,
        data: keras.utils.PyDataset
        | Sequence[keras.utils.PyDataset]
        | None = None,
    ) -> None:
        super().__init__()
        check_path("folder", folder)
        self.data = keras.tree.flatten(data) if data is not None else []
        for each in self.data:
            if not hasattr(each, "epoch"):
                raise ValueError(
                    "`data` must have an attribute `epoch`. Received: data of "
                    f"type {type(each).__name__}. Leave out data that do not "
                    "change with the epoch."
                )
        self.folder = pathlib.Path(folder)
        self.history: list[dict[str, float]] = []
        self._beside: list[keras.callbacks.Callback] = []

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        # States are saved once all callbacks have seen the end of an epoch.
        self._beside = list_being_called().callbacks
        self._beside.append(AfterAll(self))

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.new.mkdir(exist_ok=True)
            shutil.rmtree(self.new)
        except OSError as error:
            raise OSError(
                "The folder of a resumable training must be writable. "
                f"Received: folder={str(self.folder)!r} ({error})"
            ) from error
        # An earlier `fit` may have resumed from an epoch.
        self.model._initial_epoch = None
        saved = self.saved()
        if saved:
            self.restore(saved[-1])

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        # A later `fit` begins at its own first epoch.
        self.model._initial_epoch = None

    def restore_callbacks(self) -> None:
        """Restores the states of other callbacks, once all have begun."""
        saved = self.saved()
        if saved:
            set_states(self._beside, read_states(saved[-1]))

    def end_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        """Saves the state after an epoch, once all callbacks have seen it."""
        logs = {name: float(value) for name, value in logs.items()}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"The loss of epoch {epoch} is {logs['loss']}. The state "
                f"before it is kept in {str(self.folder)!r}. Lower the "
                "learning rate, clip gradients with `clipnorm`, or look for "
                "images that are not finite."
            )
        self.history.append(logs)
        try:
            self.save(epoch + 1)
        except OSError as error:
            raise OSError(
                f"The state after epoch {epoch} cannot be saved ({error}). The "
                f"one before it is kept in {str(self.folder)!r}: make room, "
                "and start again."
            ) from error

    @property
    def new(self) -> pathlib.Path:
        """The folder of a state that is not complete."""
        return self.folder / "new"

    def saved(self) -> list[pathlib.Path]:
        """Folders of complete states, first to last; two after a kill."""
        paths: Iterable[pathlib.Path] = self.folder.glob("epoch_*")
        paths = [path for path in paths if path.name[6:].isdigit()]
        return sorted(paths, key=lambda path: int(path.name[6:]))

    def save(self, epochs: int) -> None:
        """Saves the state after so many epochs, in place of those before."""
        before = self.saved()
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir()
        self.model.save_weights(self.new / "state.weights.h5")
        _, keys, *position = np.random.get_state()
        state = {
            "epochs": epochs,
            "history": self.history,
            "seeds": [
                keras.ops.convert_to_numpy(seed).tolist()
                for seed in self.seeds()
            ],
            "data_epoch": [data.epoch for data in self.data],
            "stopped": bool(self.model.stop_training),
            "random": random.getstate(),
            # A tuple, and not the dictionary that one may ask for.
            "numpy_random": [keys.tolist(), *position],  # type: ignore[attr-defined]
            "torch_random": torch_random_states(),
        }
        (self.new / "training.json").write_text(json.dumps(state))
        write_states(self.new, states_of(self._beside))
        self.new.rename(self.folder / f"epoch_{epochs}")
        for path in before:
            shutil.rmtree(path)

    def restore(self, path: pathlib.Path) -> None:
        """Restores the state in a folder."""
        state = read_state(path)
        self.model.optimizer.build(self.model.trainable_variables)
        self.model.load_weights(path / "state.weights.h5")
        for seed, value in zip(self.seeds(), state["seeds"], strict=True):
            seed.assign(value)
        version, internal, gauss = state["random"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(("MT19937", *state["numpy_random"]))
        set_torch_random_states(state["torch_random"])
        self.history = state["history"]
        # Where Keras's own callback says it too.
        self.model._initial_epoch = state["epochs"]
        if state.get("stopped"):  # By a callback, before its last epoch.
            self.model._initial_epoch = max(
                state["epochs"], self.params["epochs"]
            )
        # Keras counts one more while it builds the model.
        for data, epoch in zip(self.data, self.epochs_in(state), strict=True):
            data.epoch = epoch

    def epochs_in(self, state: dict[str, Any]) -> list[int]:
        """The epochs of data in a state, which must be as many as the data."""
        # Version 0.1.0 wrote a number, or `None`, in place of a list.
        epochs = keras.tree.flatten(state["data_epoch"])
        epochs = [epoch for epoch in epochs if epoch is not None]
        if len(epochs) != len(self.data):
            raise ValueError(
                "A training must be resumed with the data that it was started "
                f"with. Received: {len(self.data)} of them in `data`, where "
                f"{len(epochs)} were saved. Pass the same ones, or another "
                "folder."
            )
        return epochs

    def seeds(self) -> list[keras.Variable]:
        return [v for v in self.model.variables if v.path.endswith(SEED)]


class AfterAll(keras.callbacks.Callback):
    """The last callback of a `fit`, for one that stands anywhere in it."""

    def __init__(self, resumable: ResumableTraining) -> None:
        super().__init__()
        self.resumable = resumable

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self.resumable.restore_callbacks()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, float] | None = None
    ) -> None:
        self.resumable.end_epoch(epoch, logs or {})


def read_state(path: pathlib.Path) -> dict[str, Any]:
    """The content of a state's JSON file."""
    try:
        state = json.loads((path / "training.json").read_bytes())
    except (FileNotFoundError, ValueError):
        state = None
    if not isinstance(state, dict) or "seeds" not in state:
        raise ValueError(
            "The folder of a resumable training must hold only states of this "
            f"training. Received: {str(path)!r}, which is none. Delete it, or "
            "pass another folder."
        )
    return state


def torch_random_states() -> list[list[int]]:
    """The random states of the CPU and of each GPU, on PyTorch."""
    if keras.backend.backend() != "torch":
        return []
    import torch

    states = torch.get_rng_state(), *torch.cuda.get_rng_state_all()
    return [state.tolist() for state in states]


def set_torch_random_states(states: list[list[int]]) -> None:
    # A state goes to another backend without them.
    if keras.backend.backend() != "torch" or not states:
        return
    import torch

    cpu, *gpus = [torch.tensor(state, dtype=torch.uint8) for state in states]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpus)
