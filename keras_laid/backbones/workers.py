"""Data that workers read ahead, each batch in its own epoch."""

from typing import Any

import keras


def check_workers(x: Any, arguments: dict[str, Any]) -> None:
    """Refuses a `fit` that takes a part an epoch of what workers read.

    Keras keeps what they have read ahead when an epoch ends, and begins the
    next one with it: which batches these are depends on how fast they were.

    Args:
        x: The data of a `fit`.
        arguments: Dictionary, its other arguments.
    """
    validation, *_ = keras.utils.unpack_x_y_sample_weight(
        arguments.get("validation_data")
    )
    for name, data in (
        ("steps_per_epoch", x),
        ("validation_steps", validation),
    ):
        steps = arguments.get(name)
        if steps is not None and has_workers(data):
            raise ValueError(
                "Data that workers read must be read whole in each epoch. "
                f"Received: {name}={steps}, with workers={data.workers} and "
                f"use_multiprocessing={data.use_multiprocessing}. Leave out "
                f"`{name}`, or make the data with `workers=1`."
            )


class BuiltBesideWorkers:
    """A base class of Keras models that are not built on what workers read."""

    def _symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        if data_batch is None:
            data_batch = batch_to_build_on(iterator)
        super()._symbolic_build(iterator, data_batch)  # type: ignore[misc]


def batch_to_build_on(iterator: Any) -> Any:
    """A batch that Keras is to build a model on, in place of the next one.

    Where workers read, more than the next one is read, and all of it would
    come again in the first epoch.

    Args:
        iterator: What Keras's `_symbolic_build` is given, or `None`.

    Returns:
        A batch, or `None` where no workers read.
    """
    adapter = getattr(iterator, "data_adapter", None)
    data = getattr(adapter, "py_dataset", None)
    if data is None or not has_workers(data):
        return None
    return data[0]


def has_workers(x: Any) -> bool:
    """Whether threads or processes read a dataset ahead."""
    return isinstance(x, keras.utils.PyDataset) and (
        x.workers > 1 or (x.workers > 0 and x.use_multiprocessing)
    )
