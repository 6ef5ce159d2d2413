"""The first batches of whatever `fit` takes, without using them up."""

import operator
from collections.abc import Iterator
from typing import Any

import keras

# Heads are compared over examples, of which a few tens are needed.
BATCHES = 4
EXAMPLES = 32


def first_batches(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
) -> list[Any]:
    """Returns the first batches: at least 4, with at least 32 examples.

    If the data end before that, all batches are returned.

    Args:
        x: A dictionary of arrays, a `keras.utils.PyDataset`, a
            `tf.data.Dataset`, a `torch.utils.data.DataLoader`, or another
            iterable that begins again each time it is iterated over.
        y: Array of labels if `x` is a dictionary, else `None`.
        sample_weight: Array of weights if `x` is a dictionary, or `None`.
        batch_size: Optional integer, the number of examples in a batch if `x`
            is a dictionary. Defaults to `32`, as in `fit`.

    Returns:
        A list of batches, as tuples or dictionaries.

    Raises:
        ValueError: If `x` is a generator, whose batches can be read only once.
    """
    if isinstance(x, Iterator):
        raise ValueError(
            "The teacher's retrieval heads are found on the first batches, and "
            "these can be read only once. Received: data of type "
            f"{type(x).__name__}. Call `distiller.find_heads(batches)` with a "
            "list of batches before `fit`."
        )
    if isinstance(x, dict):
        x = slices((x, y, sample_weight), batch_size or 32)
    batches, examples = [], 0
    for batch in x:
        batches.append(batch)
        examples += len(keras.tree.flatten(batch)[0])
        if len(batches) >= BATCHES and examples >= EXAMPLES:
            break
    return batches


def slices(arrays: tuple[Any, Any, Any], size: int) -> Iterator[Any]:
    """Batches of `(x, y, sample_weight)`, of which some may be `None`."""
    given = tuple(part for part in arrays if part is not None)
    length = len(keras.tree.flatten(given)[0])
    for start in range(0, length, size):
        stop = start + size
        yield keras.tree.map_structure(
            operator.itemgetter(slice(start, stop)), given
        )
