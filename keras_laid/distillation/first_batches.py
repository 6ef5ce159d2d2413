"""The first batches of whatever `fit` takes, without using them up."""

from collections.abc import Iterator
from typing import Any

import keras


def first_batches(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
    count: int = 1,
) -> list[Any]:
    """Returns up to `count` batches, as tuples or dictionaries.

    Args:
        x: A dictionary of arrays, a `keras.utils.PyDataset`, a
            `tf.data.Dataset`, a `torch.utils.data.DataLoader`, or another
            iterable that begins again each time it is iterated over.
        y: Arrays, where `x` is a dictionary.
        sample_weight: The same.
        batch_size: Integer, the same. Defaults to `32`, as in `fit`.
        count: Integer.

    Raises:
        ValueError: If `x` is a generator, whose batches can be read only once.
    """
    if isinstance(x, dict):
        size = batch_size or 32
        length = len(next(iter(x.values())))
        starts = range(0, min(length, size * count), size)
        return [
            keras.tree.map_structure(
                lambda array: array[start : start + size],  # noqa: B023
                tuple(
                    part for part in (x, y, sample_weight) if part is not None
                ),
            )
            for start in starts
        ]
    if isinstance(x, Iterator):
        raise ValueError(
            "The teacher's retrieval heads are found on the first batches, and "
            f"these can be read only once. Received: data of type "
            f"{type(x).__name__}. Call `distiller.find_heads(batches)` with a "
            "list of batches before `fit`."
        )
    return [batch for _, batch in zip(range(count), x, strict=False)]
