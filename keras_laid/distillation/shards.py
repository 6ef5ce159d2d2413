"""Writes the shards of a store, and resumes at the first missing one."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from keras_laid.distillation import checks
from keras_laid.distillation import stored_teacher
from keras_laid.distillation.description import Description
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.typing import PathLike


class Batch(NamedTuple):
    """A batch of the data, whose targets are stored.

    Attributes:
        x: Dictionary of arrays, the inputs.
        y: Array of shape `(batch, length)`, the next tokens.
        marked: Boolean array of shape `(batch, length)`: the tokens whose
            logits are stored.
        first: Integer, the number of examples of the epoch before this batch.
        is_last: Boolean, whether this is the last batch of the epoch.
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    marked: np.ndarray
    first: int
    is_last: bool


# A function from a batch to a record of each example, and their tokens.
Records = Callable[[Batch], tuple[list[bytes], int]]


def write_store(
    model: keras.Model,
    records: Records,
    data: keras.utils.PyDataset,
    folder: PathLike,
    settings: dict[str, Any],
    description: Description,
) -> StoredTeacher:
    """Writes the shards that are missing, in order.

    Args:
        model: The model whose inputs the data must be.
        records: Function from a `Batch` to the records of its examples, as
            bytes, and the number of their tokens.
        data: A `keras.utils.PyDataset`.
        folder: Path of the store.
        settings: Dictionary, all that the targets depend on besides the data.
        description: The teacher's `Description`.

    Returns:
        The `StoredTeacher` of the folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begin(folder, settings, description)
    shards = [
        stored_teacher.shard_path(folder, settings, number)
        for number in range(stored_teacher.num_shards(settings))
    ]
    total = sum(
        len(batches_of(settings, number))
        for number, shard in enumerate(shards)
        if not is_complete(shard)
    )
    sizes: list[int] = []  # Examples of each batch, over all epochs.
    first_epoch = getattr(data, "epoch", None)
    try:
        with tqdm(total=total, unit="batch") as progress:
            for number, shard in enumerate(shards):
                if is_complete(shard):
                    sizes += sizes_in(shard)
                    continue
                batches = batches_of(settings, number)
                write_shard(
                    shard, model, records, data, batches, sizes, progress
                )
    finally:
        if first_epoch is not None:
            data.epoch = first_epoch
    return StoredTeacher(folder)


def check_batches(
    settings: dict[str, Any], data: keras.utils.PyDataset
) -> None:
    """Refuses data without batches, and epochs that are all the same."""
    if not settings["batches"]:
        raise ValueError(
            "`data` must have at least one batch. Received: data of length 0"
        )
    if settings["epochs"] > 1 and not hasattr(data, "epoch"):
        raise ValueError(
            "`epochs` must be 1 for data without an attribute `epoch`, which "
            "are the same in every epoch. "
            f"Received: epochs={settings['epochs']}, {type(data).__name__}"
        )


def begin(
    folder: pathlib.Path, settings: dict[str, Any], description: Description
) -> None:
    """Writes the settings of all shards, or compares them with the file's."""
    path = folder / stored_teacher.SETTINGS
    has_shards = any(folder.glob("*.array_record-*.json"))
    if not (path.is_file() and has_shards):
        values = {"settings": settings, "description": description.to_json()}
        # `item` makes NumPy's numbers into Python's.
        write_whole(path, json.dumps(values, default=lambda x: x.item()))
        return
    before = stored_teacher.read_json(path, ("settings",))["settings"]
    changed = sorted(k for k in settings if settings[k] != before.get(k))
    if changed:
        raise ValueError(
            "A store must be resumed with its own settings. Received: other "
            f"{changed} than those in {str(folder)!r}. Pass another folder."
        )


def is_complete(shard: pathlib.Path) -> bool:
    return shard.is_file() and stored_teacher.sidecar(shard).is_file()


def batches_of(settings: dict[str, Any], number: int) -> range:
    """The range of batches, over all epochs, that a shard holds."""
    size = settings["batches_per_shard"]
    return range(settings["batches"])[number * size : (number + 1) * size]


def sizes_in(shard: pathlib.Path) -> list[int]:
    """The number of examples in each batch of a complete shard."""
    sidecar = stored_teacher.sidecar(shard)
    batches = stored_teacher.read_json(sidecar, ("batches",))["batches"]
    return [batch["examples"] for batch in batches]


def write_shard(
    shard: pathlib.Path,
    model: keras.Model,
    records: Records,
    data: keras.utils.PyDataset,
    indices: range,
    sizes: list[int],
    progress: tqdm,
) -> None:
    """Writes a range of batches; adds the number of their examples to `sizes`.

    Indices count over all epochs.
    """
    array_record, _ = stored_teacher.file_formats()
    new = shard.with_name("new")
    writer = array_record.ArrayRecordWriter(
        str(new), "group_size:1,uncompressed"
    )
    batches = []
    for index in indices:
        epoch, batch_index = divmod(index, len(data))
        if hasattr(data, "epoch"):
            data.epoch = epoch
        given = data[batch_index]
        x, marked = stored_teacher.inputs_and_marked(given)
        batch = Batch(
            x,
            ops.convert_to_numpy(given[1]),
            marked,
            first=sum(sizes[epoch * len(data) :]),
            is_last=batch_index == len(data) - 1,
        )
        checks.check_batch(model, (x, batch.y, marked))
        check_finite(x, batch_index)
        examples, tokens = records(batch)
        for example in examples:
            writer.write(example)
        sizes.append(len(examples))
        batches.append(
            {
                "fingerprint": stored_teacher.fingerprint(x, marked),
                "examples": len(examples),
                "tokens": tokens,
            }
        )
        progress.update()
    try:
        writer.close()
    except RuntimeError as error:
        raise OSError(
            "A shard must be written as a whole. Received this error: "
            f"{error}. Free disk space and call this again: complete shards "
            "are kept."
        ) from error
    values = {"sha256": stored_teacher.checksum(new), "batches": batches}
    new.replace(shard)
    write_whole(stored_teacher.sidecar(shard), json.dumps(values))


def record(arrays: dict[str, np.ndarray]) -> bytes:
    """An example's targets as they are written."""
    _, safetensors = stored_teacher.file_formats()
    return safetensors.save(
        {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    )


def check_finite(x: dict[str, np.ndarray], index: int) -> None:
    """Refuses inputs that would make all targets of an example NaN."""
    for name, array in x.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                "The inputs of a teacher must be finite. Received: NaN or "
                f"infinity in {name!r} of batch {index}. Correct the data."
            )


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it never exists in part."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    os.replace(new, path)
