"""Checks of arguments, made where users pass them."""

import math
import numbers
import os
from collections.abc import Collection
from typing import Any

import keras
import numpy as np

from keras_laid.typing import Tensor


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or NumPy; a boolean is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number of Python or NumPy; a boolean is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_kind(
    name: str,
    value: object,
    kind: type | tuple[type, ...],
    words: str,
    advice: str = "",
) -> None:
    """Refuses a value not of class `kind`, which the error calls `words`."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be {words}. Received: {name} of type "
            f"{type(value).__name__}" + (f". {advice}" if advice else "")
        )


def check_integer(name: str, value: Any, at_least: float = 1) -> None:
    if not is_integer(value):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r:.80} of "
            f"type {type(value).__name__}"
        )
    if value < at_least:
        raise ValueError(
            f"`{name}` must be at least {at_least}. Received: {name}={value}"
        )


def check_number(name: str, value: Any, bounds: str) -> None:
    """Refuses what is not a number in `bounds`, such as `"(0, inf)"`."""
    if not is_number(value):
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r:.80} of "
            f"type {type(value).__name__}"
        )
    low, high = (float(end) for end in bounds[1:-1].split(","))
    above = value >= low if bounds[0] == "[" else value > low
    below = value <= high if bounds[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(
            f"`{name}` must be in {bounds}. Received: {name}={value}"
        )


def check_integers(
    name: str, values: object, at_least: int = 1
) -> tuple[int, ...]:
    """Returns a sequence of one or more integers as a tuple of `int`s."""
    rule = f"`{name}` must be one or more integers of at least {at_least}"
    integers = _tuple(values)
    if integers is None or not all(map(is_integer, integers)):
        raise TypeError(
            f"{rule}. Received: {name}={values!r:.80}. "
            "Pass a tuple, such as `(2,)`."
        )
    if min(integers, default=at_least - 1) < at_least:
        raise ValueError(f"{rule}. Received: {name}={values!r:.80}")
    return tuple(int(value) for value in integers)


def check_scalar(name: str, value: object, bounds: str) -> None:
    """Refuses what is neither a number in `bounds` nor a scalar tensor."""
    if hasattr(value, "shape") and not is_number(value):
        check_shape(name, value)
    else:
        check_number(name, value, bounds)


def check_path(name: str, value: object) -> None:
    check_kind(name, value, (str, os.PathLike), "a path")


def check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be `True` or `False`. "
            f"Received: {name}={value!r:.80}"
        )


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise ValueError(
            f"`{name}` must be one of {list(choices)}. "
            f"Received: {name}={value!r:.80}"
        )


def check_indices(name: str, values: object) -> list[int]:
    """Returns a sequence of integers as a list of `int`s."""
    integers = _tuple(values)
    if integers is None or not all(map(is_integer, integers)):
        raise TypeError(
            f"`{name}` must be a sequence of integers. "
            f"Received: {name}={values!r:.80}"
        )
    return [int(value) for value in integers]


def check_increasing(name: str, values: object, bounds: str) -> None:
    """Refuses what is not two or more increasing numbers in `bounds`."""
    low, high = (float(end) for end in bounds[1:-1].split(","))
    edges = _tuple(values)
    if (
        edges is None
        or len(edges) < 2
        or not all(is_number(edge) and math.isfinite(edge) for edge in edges)
        or not all(a < b for a, b in zip(edges, edges[1:], strict=False))
        or not (low <= edges[0] and edges[-1] <= high)
    ):
        raise ValueError(
            f"`{name}` must be two or more increasing numbers in {bounds}. "
            f"Received: {name}={values!r:.80}"
        )


def check_seed(seed: object) -> None:
    """Refuses what is not one or more integers of at least 0."""
    seeds = (seed,) if is_integer(seed) else _tuple(seed)
    if not seeds or not all(is_integer(s) and s >= 0 for s in seeds):
        raise ValueError(
            "`seed` must be an integer of at least 0, or a sequence of one or "
            f"more. Received: seed={seed!r:.80}"
        )


def check_shape(name: str, tensor: object, **axes: int | None) -> None:
    """Refuses a tensor of another shape.

    Args:
        name: String, the name of the argument in messages.
        tensor: Any object. An axis whose size is not known yet fits any size.
        **axes: Integers, the size of each axis in order, by the name of the
            axis in messages; `None` for any size.
    """
    if not hasattr(tensor, "shape"):
        raise TypeError(
            f"`{name}` must be a tensor. Received: {name} of type "
            f"{type(tensor).__name__}"
        )
    found, sizes = tuple(tensor.shape), tuple(axes.values())
    fits = len(found) == len(sizes) and all(
        None in (one, other) or one == other
        for one, other in zip(found, sizes, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have shape ({', '.join(axes)}) = {sizes}. "
            f"Received: {name}.shape={found}"
        )


def check_dtype(name: str, tensor: Tensor, kind: str) -> None:
    """Refuses a tensor of another kind of dtype: `"int"` or `"bool"`."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if kind not in dtype:
        raise TypeError(
            f"`{name}` must be a tensor of dtype {kind}. "
            f"Received: {name}.dtype={dtype}"
        )


def check_tokens(
    name: str,
    tokens: Tensor,
    vocabulary: int,
    weights: Tensor | None = None,
    least: int | None = None,
) -> None:
    """Refuses tokens outside a vocabulary, if their values can be read.

    Args:
        name: String, the name of the argument in messages.
        tokens: Integer tensor of shape `(batch, length)`.
        vocabulary: Integer, the number of tokens.
        weights: Optional tensor of shape `(batch, length)`; tokens of weight 0
            are not checked. Defaults to `None`, which checks all.
        least: Optional integer, the smallest token that is allowed. Defaults to
            `None`, which allows all negative numbers.
    """
    if not (at_hand(tokens) and (weights is None or at_hand(weights))):
        return
    if weights is not None and weights.shape != tokens.shape:
        return  # Another check refuses weights of another shape.
    values = keras.ops.convert_to_numpy(tokens)
    outside, lower_bound = values >= vocabulary, ""
    if least is not None:
        outside |= values < least
        lower_bound = f", and at least {least}"
    if weights is not None:
        outside &= keras.ops.convert_to_numpy(weights) > 0
    if outside.any():
        place = tuple(np.argwhere(outside)[0].tolist())
        raise ValueError(
            f"`{name}` must be less than {vocabulary}, the size of the "
            f"vocabulary{lower_bound}. Received: {name}{list(place)}="
            f"{values[place]}. Use the model's own tokenizer, and "
            "give labels that do not count a sample weight of 0."
        )


def at_hand(tensor: object) -> bool:
    """Whether values can be read without waiting for a device."""
    if keras.backend.backend() == "torch":
        import torch

        if isinstance(tensor, torch.Tensor):
            # A compiled function cannot depend on values.
            return tensor.is_cpu and not torch.compiler.is_compiling()
    return isinstance(tensor, np.ndarray)


def check_positions(
    positions: Tensor, batch: int | None, length: int | None
) -> None:
    """Refuses positions that do not fit the batch size and length."""
    rank = len(getattr(positions, "shape", ()))
    if rank < 2:
        check_shape("positions", positions, length=length)
    else:
        shared = positions.shape[0] == 1
        check_shape(
            "positions", positions, batch=1 if shared else batch, length=length
        )


def _tuple(values: Any) -> tuple[Any, ...] | None:
    """A list, a tuple or an array as a tuple; anything else as `None`."""
    if isinstance(values, (list, tuple, range)):
        return tuple(values)
    return tuple(values) if getattr(values, "ndim", 0) == 1 else None
