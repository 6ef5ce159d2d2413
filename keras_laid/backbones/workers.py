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


def build_without_workers(model: keras.Model, x: Any) -> None:
    """Builds a model on a batch, where Keras would let workers read it.

    Those read more than that batch, and all that they have read would come
    again in the first epoch.
    """
    # On TensorFlow, Keras builds a model when it is traced.
    if has_workers(x) and keras.backend.backend() != "tensorflow":
        model._symbolic_build(data_batch=x[0])


def has_workers(x: Any) -> bool:
    """Whether threads or processes read a dataset ahead."""
    return isinstance(x, keras.utils.PyDataset) and (
        x.workers > 1 or (x.workers > 0 and x.use_multiprocessing)
    )
