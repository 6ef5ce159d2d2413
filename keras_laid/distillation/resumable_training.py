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

SEED = "seed_generator_state"  # The end of seed generators' paths.


class ResumableTraining(keras.callbacks.Callback):
    """Saves all that training needs after each epoch, and restores it.

    If a run is killed, even during a save, start it again by the same command.
    It takes the same steps as a run that was not killed, bit for bit. The last
    state is in the folder `epoch_<number>`, which is complete or not there at
    all. It holds:

    - weights of the student and the mixers, optimizer, step counters;
    - seeds of layers, and the states of the random number generators of Python,
      NumPy and torch, which shuffle data;
    - the attribute `epoch` of `data`, and the logs of every epoch;
    - the states of other callbacks of the same `fit`, wherever they stand in
      the list: `EarlyStopping` with its best weights, `ModelCheckpoint`,
      `ReduceLROnPlateau`, `SwapEMAWeights`, those derived from these, and any
      callback with methods `get_state()` and `set_state(state)`. A state is
      made of numbers, strings, `None`, arrays, lists, and dictionaries whose
      keys are strings.

    These are not restored:

    - variables of other callbacks, such as those of a `LambdaCallback`;
    - files that callbacks write: pass `append=True` to `CSVLogger`, whose file
      may have the last epoch twice, and expect `TensorBoard` to count steps
      from 0;
    - the position in a generator, in a `tf.data.Dataset`, or in data of which
      `steps_per_epoch` takes only a part in each epoch;
    - random operations of TensorFlow that have no seed.

    `keras.callbacks.BackupAndRestore` writes two files: after a kill between
    them, or in the middle of one, a run takes other steps or cannot resume.

    A kill loses at most one epoch: choose short epochs if steps take long. A
    run that has ended, by its number of epochs or because a callback has set
    `model.stop_training`, takes no further step. To pause a run, end the
    process.

    The state after an epoch whose loss is not finite is never saved; one image
    with NaN is enough for such a loss. The last state before it is kept, to
    resume from after you correct the data or the learning rate.

    Args:
        folder: Path of a folder that holds only this run; created if it does
            not exist.
        data: Optional `keras.utils.PyDataset`, the training data, if they
            change with their attribute `epoch`, as `keras_laid.Haystacks` with
            stretched positions do; or a list of all data that change with it,
            validation data included. Defaults to `None`.

    Attributes:
        history: List of dictionaries, the logs of every epoch so far, including
            those before the run was killed.

    Raises:
        TypeError: If `folder` is not a path, or the state of a callback holds a
            value of another type than those above.
        ValueError: If `data` have no attribute `epoch`. Before the first step,
            if a folder `epoch_<number>` does not hold a state of this training,
            or holds one of other callbacks.
        OSError: Before the first step, if the folder cannot be written to.
            After an epoch, if its state cannot be saved, for example because
            the disk is full. The state before it is kept.
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
                f"one before it is kept in {str(self.folder)!r}: free disk "
                "space, and start again."
            ) from error

    @property
    def new(self) -> pathlib.Path:
        """The folder of a state that is not complete."""
        return self.folder / "new"

    def saved(self) -> list[pathlib.Path]:
        """Folders of complete states, oldest first; a kill may leave two."""
        paths: Iterable[pathlib.Path] = self.folder.glob("epoch_*")
        paths = [path for path in paths if path.name[6:].isdigit()]
        return sorted(paths, key=lambda path: int(path.name[6:]))

    def save(self, epochs: int) -> None:
        """Saves the state after `epochs` epochs, and deletes older ones."""
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
            # A tuple, since `legacy=False` was not passed.
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
        # Keras's own `BackupAndRestore` sets the first epoch here, too.
        self.model._initial_epoch = state["epochs"]
        if state.get("stopped"):  # By a callback, before the last epoch.
            self.model._initial_epoch = max(
                state["epochs"], self.params["epochs"]
            )
        # Keras has added 1 to `epoch` while it built the model.
        for data, epoch in zip(self.data, self.epochs_in(state), strict=True):
            data.epoch = epoch

    def epochs_in(self, state: dict[str, Any]) -> list[int]:
        """The epochs of data in a state, which must be as many as the data."""
        # Version 0.1.0 wrote a number, or `None`, in place of a list.
        epochs = keras.tree.flatten(state["data_epoch"])
        epochs = [epoch for epoch in epochs if epoch is not None]
        if len(epochs) != len(self.data):
            raise ValueError(
                "Training must be resumed with the data that it was started "
                f"with. Received: {len(self.data)} of them in `data`, where "
                f"{len(epochs)} were saved. Pass the same ones, or another "
                "folder."
            )
        return epochs

    def seeds(self) -> list[keras.Variable]:
        return [v for v in self.model.variables if v.path.endswith(SEED)]


class AfterAll(keras.callbacks.Callback):
    """The last callback of a `fit`, which saves for a `ResumableTraining`."""

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
            f"training. Received: {str(path)!r}, which has none. Delete it, or "
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
    # A state can be restored on another backend than it was saved on.
    if keras.backend.backend() != "torch" or not states:
        return
    import torch

    cpu, *gpus = [torch.tensor(state, dtype=torch.uint8) for state in states]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(gpus)
