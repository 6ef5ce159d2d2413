"""The targets of a teacher that ran before, read from disk."""

import hashlib
import json
import pathlib
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_kind
from keras_laid.arguments import check_path
from keras_laid.backbones.teacher_inputs import check_none
from keras_laid.distillation.description import Description
from keras_laid.ops.attention import MASKED
from keras_laid.ops.attention import TINY
from keras_laid.ops.attention import Attention
from keras_laid.ops.top_logits import TopLogits
from keras_laid.typing import PathLike
from keras_laid.typing import Tensor

SETTINGS = "teacher.json"
TOP_LOGITS = ("logits", "index", "others")
WRITERS = "`keras_laid.store_teacher` or `keras_laid.store_log_probabilities`"


class StoredTeacher:
    """Stored targets, in place of a teacher.

    `keras_laid.store_teacher` and `keras_laid.store_log_probabilities` write
    them.

    Args:
        folder: Path of the folder that one of them wrote.

    Attributes:
        description: The teacher's
            `keras_laid.distillation.description.Description`.
        settings: Dictionary, the arguments that the store was written with.
        bytes_per_token: Float, the size on disk divided by the number of
            tokens: of images and text if queries and keys are stored, else of
            `"token_ids"`.

    Raises:
        TypeError: If `folder` is not a path.
        ValueError: If there is no store in the folder, or it is not complete.

    Example:

    ```python
    keras_laid.store_teacher(teacher, haystacks, "runs/teacher")
    teacher = keras_laid.StoredTeacher("runs/teacher")
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=teacher, student=student
    )
    distiller.compile(optimizer=keras.optimizers.AdamW(1e-5))
    distiller.fit(teacher.targets_for(haystacks))
    ```
    """

    variables: tuple[keras.Variable, ...] = ()  # None of it is in memory.

    def __init__(self, folder: PathLike) -> None:
        check_path("folder", folder)
        self.folder = pathlib.Path(folder)
        path = self.folder / SETTINGS
        if not path.is_file():
            raise ValueError(
                f"`folder` must be one that {WRITERS} wrote. "
                f"Received: folder={str(folder)!r}, without {SETTINGS!r}"
            )
        values = read_json(path, ("settings", "description"))
        self.settings = values["settings"]
        self.description = Description.from_json(values["description"])
        self.shards = []
        self._batches = {}  # Where the batch with a fingerprint is.
        tokens = 0
        for number in range(num_shards(self.settings)):
            shard = shard_path(self.folder, self.settings, number)
            for file in (sidecar(shard), shard):
                if not file.is_file():
                    raise ValueError(
                        "The store must be complete. Received: "
                        f"{str(file)!r} is missing. Call {WRITERS} again, as "
                        "before: it resumes."
                    )
            written = read_json(sidecar(shard), ("sha256", "batches"))
            self.shards.append((shard, written["sha256"]))
            first = 0
            for batch in written["batches"]:
                place = number, first, batch["examples"]
                self._batches[batch["fingerprint"]] = place
                first += batch["examples"]
                tokens += batch["tokens"]
        size = sum(shard.stat().st_size for shard, _ in self.shards)
        self.bytes_per_token = size / tokens
        self._verified: set[int] = set()

    @property
    def retrieval_heads(self) -> tuple[tuple[int, int], ...]:
        """Pairs `(layer, head)` whose attention to segments is stored."""
        heads = self.settings.get("retrieval_heads", ())
        return tuple((layer, head) for layer, head in heads)

    def check_retrieval(
        self, wanted: tuple[tuple[int, int], ...] | None
    ) -> tuple[tuple[int, int], ...]:
        """Returns the stored heads, if they are `wanted`; `None` takes any."""
        stored = self.retrieval_heads
        if not stored or (wanted is not None and {*wanted} != {*stored}):
            raise ValueError(
                "A stored teacher must have the retrieval heads that are "
                f"matched. Received: a store with retrieval_heads={stored}; "
                f"wanted: {'some' if wanted is None else wanted}. Write one "
                "with `keras_laid.store_teacher(..., retrieval_heads=...)`, or "
                "pass `retrieval_weight=0`."
            )
        return stored

    def targets_for(self, data: keras.utils.PyDataset) -> keras.utils.PyDataset:
        """Adds the teacher's targets to the inputs of data.

        Args:
            data: The `keras.utils.PyDataset` that the store was written from,
                or another with batches that are bit for bit the same.

        Returns:
            A `keras.utils.PyDataset`.
        """
        check_data(data)
        return StoredTargets(self, data)

    def check(
        self,
        layers: Collection[int] = (),
        rows: str = "text",
        logits: bool = False,
        temperature: float = 1.0,
    ) -> None:
        """Refuses a term that needs targets which are not stored."""
        missing = set(layers) - set(self.settings["layers"])
        wanted = {
            "layers": (sorted(missing), not missing),
            "rows": (rows, not layers or rows == self.settings["rows"]),
            "top_k": (1, not logits or self.settings["top_k"] > 0),
            "temperature": (
                temperature,
                not logits or temperature == self.settings["temperature"],
            ),
        }
        for name, (value, is_there) in wanted.items():
            if not is_there:
                raise ValueError(
                    "A stored teacher must have what the losses need. "
                    f"Received: a store with {name}={self.settings[name]}; "
                    f"wanted: {value}. Write one with "
                    f"`keras_laid.store_teacher(..., {name}=...)`."
                )

    def check_inputs(self, x: Mapping[str, Tensor]) -> None:
        """Refuses inputs that `targets_for` did not make."""
        missing = [name for name in self.names() if name not in x]
        if missing:
            raise ValueError(
                "With a stored teacher, inputs must have its targets. "
                f"Received: inputs without {missing}. "
                "Pass `teacher.targets_for(data)`."
            )

    def top_logits(self, x: Mapping[str, Tensor]) -> TopLogits:
        """The largest logits, from a batch that `targets_for` made."""
        # On PyTorch, `train_on_batch` leaves NumPy arrays as they are.
        logits, index, others = (
            ops.convert_to_tensor(x[f"teacher_{name}"]) for name in TOP_LOGITS
        )
        return TopLogits(
            logits,
            index,
            others,
            vocabulary=self.description.vocabulary_size,
            temperature=self.settings["temperature"],
        )

    def attention(
        self, x: Mapping[str, Tensor], layers: Collection[int]
    ) -> dict[int, Attention]:
        """Queries and keys of some layers, from a batch of `targets_for`.

        Returns:
            A dictionary from layer to `keras_laid.ops.Attention`.
        """
        described = self.description.layers_with_maps
        return {
            index: Attention(
                x[f"teacher_query_{index}"],
                x[f"teacher_key_{index}"],
                described[index].scale,
                described[index].soft_cap,
            )
            for index in layers
        }

    def log_shares(
        self, x: Mapping[str, Tensor], layers: Collection[int]
    ) -> dict[int, Tensor]:
        """Attention of retrieval heads, from a batch of `targets_for`.

        Returns:
            A dictionary from layer to the logarithm of the attention that its
            heads give to segments, of shape `(batch, rows, segments)`.
        """
        log_shares = {}
        for index in layers:
            shares = ops.cast(x[f"teacher_shares_{index}"], "float32")
            logs = ops.log(ops.maximum(shares, TINY))
            log_shares[index] = ops.where(shares > 0, logs, MASKED)
        return log_shares

    def names(self) -> list[str]:
        """Names of the targets among the inputs."""
        names = TOP_LOGITS if self.settings["top_k"] else ()
        for index in self.settings["layers"]:
            names = (*names, f"query_{index}", f"key_{index}")
        for index in sorted({layer for layer, _ in self.retrieval_heads}):
            names = (*names, f"shares_{index}")
        return [f"teacher_{name}" for name in names]

    def read(self, batch: tuple[Any, ...]) -> dict[str, np.ndarray]:
        """Reads the targets of a batch.

        Args:
            batch: Tuple `(x, y, sample_weight)` of arrays.

        Returns:
            A dictionary of arrays.

        Raises:
            ValueError: If the batch is not in the store, or its shard is not
                what was written.
        """
        array_record, safetensors = file_formats()
        x, marked = inputs_and_marked(batch)
        place = self._batches.get(fingerprint(x, marked))
        if place is None:
            raise ValueError(
                "Batches must be those that the teacher has seen, bit for bit. "
                f"Received: a batch that is not in {str(self.folder)!r}. If "
                "data change with the epoch, store them with `epochs=...`."
            )
        number, first, count = place
        reader = array_record.ArrayRecordReader(str(self.verified(number)))
        examples = [
            safetensors.load(r) for r in reader.read(first, first + count)
        ]
        reader.close()
        targets = {
            f"teacher_{name}": np.stack([each[name] for each in examples])
            for name in examples[0]
            if name not in TOP_LOGITS
        }
        if self.settings["top_k"]:
            targets |= dense_top_logits(examples, marked)
        return targets

    def verified(self, number: int) -> pathlib.Path:
        """The path of a shard, whose checksum is verified on first use."""
        path, expected = self.shards[number]
        if number not in self._verified:
            found = checksum(path)
            if found != expected:
                raise ValueError(
                    "A shard must be what was written. Received: "
                    f"{str(path)!r}, whose SHA-256 is {found}, not {expected}. "
                    f"Delete it and call {WRITERS} again, as before: it writes "
                    "the missing shards."
                )
            self._verified.add(number)
        return path


class StoredTargets(keras.utils.PyDataset):
    """Data with a stored teacher's targets; see `StoredTeacher.targets_for`.

    After the last stored epoch, the first one is used again.
    """

    def __init__(
        self, teacher: StoredTeacher, data: keras.utils.PyDataset
    ) -> None:
        super().__init__(
            workers=data.workers,
            use_multiprocessing=data.use_multiprocessing,
            max_queue_size=data.max_queue_size,
        )
        self.teacher = teacher
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        x, *rest = batch = self.data[index]
        return x | self.teacher.read(batch), *rest

    @property
    def epoch(self) -> int:
        """The epoch of the data, if they change with it."""
        return self.data.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.data.epoch = value

    def on_epoch_begin(self) -> None:
        self.data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self.data.on_epoch_end()
        if hasattr(self.data, "epoch"):
            self.data.epoch %= self.teacher.settings["epochs"]


def file_formats() -> tuple[Any, Any]:
    """The modules that write and read shards, and records in them."""
    try:
        import safetensors.numpy
        from array_record.python import array_record_module
    except ImportError as error:
        raise ImportError(
            "Stored teachers need array_record and safetensors. Received: "
            f'{error}. Install them with `pip install "keras_laid[offline]"`.'
        ) from error
    return array_record_module, safetensors.numpy


def inputs_and_marked(
    batch: tuple[Any, ...],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A batch's inputs, and which tokens' logits count, as arrays."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    if not isinstance(x, dict) or y is None:
        raise ValueError(
            "Data must be batches `(x, y)` or `(x, y, sample_weight)`, with a "
            f"dictionary `x`. Received: x of type {type(x).__name__}, y of "
            f"type {type(y).__name__}"
        )
    check_none(x)
    marked = np.ones(np.shape(y), "bool")
    if sample_weight is not None:
        sample_weight = ops.convert_to_numpy(sample_weight)
        if not (sample_weight >= 0).all():
            raise ValueError(
                "`sample_weight` must be 0 or more. Received: a batch with "
                f"{np.min(sample_weight)}"
            )
        marked = sample_weight > 0
    return {name: ops.convert_to_numpy(x[name]) for name in x}, marked


def fingerprint(x: dict[str, np.ndarray], marked: np.ndarray) -> str:
    """A hash of all that a teacher's targets depend on."""
    parts = hashlib.blake2b(digest_size=16)
    for name, array in sorted((x | {"marked": marked}).items()):
        parts.update(f"{name} {array.dtype} {array.shape} ".encode())
        parts.update(np.ascontiguousarray(array).tobytes())
    return parts.hexdigest()


def dense_top_logits(
    examples: Sequence[dict[str, np.ndarray]], marked: np.ndarray
) -> dict[str, np.ndarray]:
    """Top logits of every token, with zeros for tokens without a mark."""
    targets = {}
    for name in TOP_LOGITS:
        found = np.concatenate([each[name] for each in examples])
        values = np.zeros((*marked.shape, found.shape[-1]), found.dtype)
        values[marked] = found
        targets[f"teacher_{name}"] = values
    return targets


def read_json(path: pathlib.Path, names: Collection[str]) -> dict[str, Any]:
    """The content of a store's JSON file, which must have these names."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:  # The file is cut short, or is not JSON.
        values = None
    if not isinstance(values, dict) or not set(names) <= set(values):
        raise ValueError(
            f"A store's files must be as {WRITERS} wrote them. "
            f"Received: {str(path)!r}, which is not JSON with {list(names)}. "
            "Delete it and call the function again."
        )
    return values


def check_data(data: object) -> None:
    kind = keras.utils.PyDataset
    check_kind("data", data, kind, "a `keras.utils.PyDataset`")


def num_shards(settings: dict[str, Any]) -> int:
    return -(-settings["batches"] // settings["batches_per_shard"])


def shard_path(
    folder: pathlib.Path, settings: dict[str, Any], number: int
) -> pathlib.Path:
    count = num_shards(settings)
    return folder / f"teacher.array_record-{number:05d}-of-{count:05d}"


def sidecar(shard: pathlib.Path) -> pathlib.Path:
    """Path of a complete shard's JSON file: its checksum and contents."""
    return shard.with_name(f"{shard.name}.json")


def checksum(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
