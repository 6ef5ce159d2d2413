"""States of callbacks, which Keras does not save."""

import inspect
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

# The attributes of Keras's own callbacks that change during a run and decide
# what they do next.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    keras.callbacks.EarlyStopping: (
        "best",
        "best_epoch",
        "best_weights",
        "stopped_epoch",
        "wait",
    ),
    keras.callbacks.ModelCheckpoint: (
        "best",
        "_batches_seen_since_last_saving",
        "_last_batch_seen",
    ),
    keras.callbacks.ReduceLROnPlateau: ("best", "cooldown_counter", "wait"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
}
OWN = ("get_state", "set_state")


def list_being_called() -> keras.callbacks.CallbackList:
    """The `CallbackList` that calls one of its callbacks right now.

    Keras gives a callback no reference to the others: the list is found among
    the callers.

    Raises:
        ValueError: If no caller is a `CallbackList`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller
        frame = frame.f_back
    raise ValueError(
        "A `ResumableTraining` must be one of the callbacks of a `fit`, or of "
        "a `keras.callbacks.CallbackList`. Received: a call from elsewhere. "
        "Pass `fit(..., callbacks=[...])`."
    )


def attributes_of(callback: keras.callbacks.Callback) -> list[str]:
    """Names of a callback's attributes to save, if it is one of Keras's own."""
    return [
        name
        for kind, names in ATTRIBUTES.items()
        if isinstance(callback, kind)
        for name in names
    ]


def has_own_state(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback has both `get_state` and `set_state`."""
    there = [name for name in OWN if hasattr(callback, name)]
    if len(there) == 1:
        raise ValueError(
            f"A callback must have both of {OWN}, or neither. Received: "
            f"{type(callback).__name__} with only {there[0]!r}."
        )
    return bool(there)


def states_of(
    callbacks: Iterable[keras.callbacks.Callback],
) -> list[dict[str, Any]]:
    """The states of those callbacks that have one, in their order."""
    states = []
    for callback in callbacks:
        names, own = attributes_of(callback), has_own_state(callback)
        if names or own:
            states.append(
                {
                    "class": type(callback).__name__,
                    "attributes": {n: getattr(callback, n) for n in names},
                    "own": callback.get_state() if own else None,
                }
            )
    return states


def set_states(
    callbacks: Iterable[keras.callbacks.Callback], states: list[dict[str, Any]]
) -> None:
    """Gives callbacks the states that `states_of` returned.

    Raises:
        ValueError: If the states are of callbacks of other classes.
    """
    callbacks = [c for c in callbacks if attributes_of(c) or has_own_state(c)]
    found = [type(callback).__name__ for callback in callbacks]
    saved = [state["class"] for state in states]
    if found != saved:
        raise ValueError(
            "Training must be resumed with the callbacks that it was started "
            f"with (only those with a state count). Received: {found}, where "
            f"{saved} were saved. Pass the saved ones in that order, or "
            "another folder."
        )
    for callback, state in zip(callbacks, states, strict=True):
        for name, value in state["attributes"].items():
            setattr(callback, name, value)
        if has_own_state(callback):
            callback.set_state(state["own"])


def write_states(folder: pathlib.Path, states: list[dict[str, Any]]) -> None:
    """Writes `callbacks.json` and, for arrays in it, `callbacks.npz`."""
    arrays: list[np.ndarray] = []
    text = json.dumps([packed(state, arrays) for state in states])
    (folder / "callbacks.json").write_text(text)
    if arrays:
        # As bytes, since NumPy's format has no bfloat16.
        raw = [np.frombuffer(array.tobytes(), "uint8") for array in arrays]
        np.savez(folder / "callbacks.npz", *raw)


def read_states(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The states that `write_states` wrote; empty if there is no file."""
    path = folder / "callbacks.json"
    if not path.exists():
        return []
    arrays = {}
    if (folder / "callbacks.npz").exists():
        with np.load(folder / "callbacks.npz") as file:
            arrays = dict(file)
    return [unpacked(state, arrays) for state in json.loads(path.read_bytes())]


def packed(value: Any, arrays: list[np.ndarray]) -> Any:
    """A value for JSON; its arrays are put into `arrays`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict) and all(isinstance(n, str) for n in value):
        return {name: packed(each, arrays) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [packed(each, arrays) for each in value]
    if hasattr(value, "shape"):
        arrays.append(ops.convert_to_numpy(value))
        array = arrays[-1]
        number = f"arr_{len(arrays) - 1}"
        return {number: [str(array.dtype), array.shape]}
    raise TypeError(
        "The state of a callback must be made of numbers, strings, `None`, "
        "arrays, lists, and dictionaries whose keys are strings. Received: "
        f"{value!r:.80} of type {type(value).__name__}"
    )


def unpacked(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [unpacked(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (name := next(iter(value))) in arrays:
        dtype, shape = value[name]
        flat = np.frombuffer(arrays[name].tobytes(), np.dtype(dtype))
        return flat.reshape(shape).copy()
    return {name: unpacked(each, arrays) for name, each in value.items()}
