"""Lets a training run be killed at any moment, and goes on with it."""

import json
import math
import pathlib
import random
import shutil
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_laid.arguments import check_path
from keras_laid.typing import PathLike

SEED = "seed_generator_state"  # What paths of seed generators end with.


class ResumableTraining(keras.callbacks.Callback):
    """Saves all that training needs after each epoch, and restores it.

    A run that was killed, also during a save, and is started again by the same
    command, takes the same steps as one that was not. The last state is in the
    folder `epoch_<number>`, complete or not there at all: weights of the
    student and the mixers, optimizer, step counters, seeds of layers and of
    shuffling, and the logs of every epoch. With
    `keras.callbacks.BackupAndRestore` a kill between its two files, or in the
    middle of one, gives other steps or none.

    An epoch is the most that is lost: pass short ones to `fit` where steps are
    long. A run that has ended takes no further step.

    Args:
        folder: Path of a folder for this run alone; made if it is not there.
        data: The training data, if they change with the epoch by an attribute
            `epoch`, as `keras_laid.Haystacks` with stretched positions do.

    Attributes:
        history: List of dictionaries, the logs of every epoch so far, those
            before the run was killed included.

    Raises:
        TypeError: If `folder` is no path.
        ValueError: If `data` have no attribute `epoch`; before the first step,
            if a folder `epoch_<number>` holds something else.
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
        callbacks=[keras_laid.ResumableTraining("runs/a", haystacks)],
    )
    ```
    """

    def __init__(
        self, folder: PathLike, data: keras.utils.PyDataset | None = None
    ) -> None:
        super().__init__()
        check_path("folder", folder)
        if data is not None and not hasattr(data, "epoch"):
            raise ValueError(
                "`data` must have an attribute `epoch`. Received: data of type "
                f"{type(data).__name__}. Leave out data that do not change "
                "with the epoch."
            )
        self.folder = pathlib.Path(folder)
        self.data = data
        self.history: list[dict[str, float]] = []

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
        # An earlier `fit` may have gone on from an epoch.
        self.model._initial_epoch = None
        saved = self.saved()
        if saved:
            self.restore(saved[-1])

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        # A later `fit` begins at its own first epoch.
        self.model._initial_epoch = None

    def on_epoch_end(
        self, epoch: int, logs: dict[str, float] | None = None
    ) -> None:
        logs = {name: float(value) for name, value in (logs or {}).items()}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"The loss of epoch {epoch} is {logs['loss']}. The state "
                f"before it is kept in {str(self.folder)!r}. Lower the "
                "learning rate, or clip gradients with `clipnorm`."
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
            "data_epoch": getattr(self.data, "epoch", None),
            "random": random.getstate(),
            # A tuple, and not the dictionary that one may ask for.
            "numpy_random": [keys.tolist(), *position],  # type: ignore[attr-defined]
            "torch_random": torch_random_states(),
        }
        (self.new / "training.json").write_text(json.dumps(state))
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
        if self.data is not None:
            # Keras counts one more while it builds the model.
            self.data.epoch = state["data_epoch"]

    def seeds(self) -> list[keras.Variable]:
        return [v for v in self.model.variables if v.path.endswith(SEED)]


def read_state(path: pathlib.Path) -> dict[str, Any]:
    """What the JSON file of a state says."""
    try:
        state = json.loads((path / "training.json").read_bytes())
    except (FileNotFoundError, ValueError):
        state = None
    if not isinstance(state, dict) or "seeds" not in state:
        raise ValueError(
            "The folder of a resumable training must hold states of this "
            f"training alone. Received: {str(path)!r}, which is none. Delete "
            "it, or pass another folder."
        )
    return state


def torch_random_states() -> list[list[int]]:
    """Those of the CPU and of each GPU; other backends have none."""
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
