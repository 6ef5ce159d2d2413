"""Keeps batches that workers read ahead in the epoch that they belong to."""

from typing import Any

import keras


def check_workers(x: Any, arguments: dict[str, Any]) -> None:
    """Refuses a `fit` that uses only part of its data per epoch, with workers.

    When an epoch ends, Keras keeps the batches that workers have read ahead,
    and begins the next epoch with them. Which batches these are depends on how
    fast the workers were.

    Args:
        x: The data of a `fit`.
        arguments: Dictionary of the other arguments of the `fit`.
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
                "Data that workers read must be used completely in each epoch. "
                f"Received: {name}={steps}, with workers={data.workers} and "
                f"use_multiprocessing={data.use_multiprocessing}. Leave out "
                f"`{name}`, or make the data with `workers=1`."
            )


class BuiltBesideWorkers:
    """Mixin for Keras models: builds them on a batch not read by workers."""

    def _symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        if data_batch is None:
            data_batch = batch_to_build_on(iterator)
        super()._symbolic_build(iterator, data_batch)  # type: ignore[misc]


def batch_to_build_on(iterator: Any) -> Any:
    """A batch to build a model on, in place of the iterator's next batch.

    Where workers read the data, asking for the next batch makes them read
    others too, and all of these would come again in the first epoch.

    Args:
        iterator: The iterator that Keras passes to `_symbolic_build`, or
            `None`.

    Returns:
        The first batch of the data, or `None` where no workers read it.
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
