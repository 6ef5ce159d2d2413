"""Runs a teacher once over the training data and stores its targets."""

import dataclasses
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_indices
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.arguments import check_path
from keras_laid.backbones.decoder import chosen_layers
from keras_laid.backbones.fingerprint import model_fingerprint
from keras_laid.backbones.forward import forward
from keras_laid.backbones.retrieval_heads import find_retrieval_heads
from keras_laid.distillation import checks
from keras_laid.distillation import stored_teacher
from keras_laid.distillation.description import Description
from keras_laid.distillation.first_batches import first_batches
from keras_laid.distillation.retrieval_shares import Heads
from keras_laid.distillation.retrieval_shares import layers_of
from keras_laid.distillation.retrieval_shares import resolve_heads
from keras_laid.distillation.retrieval_shares import text_log_shares
from keras_laid.distillation.shards import Batch
from keras_laid.distillation.shards import check_batches
from keras_laid.distillation.shards import record
from keras_laid.distillation.shards import write_store
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.ops.top_logits import TopLogits
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import PathLike
from keras_laid.typing import Tensor

ROWS = 16  # Tokens of each example whose logits exist at a time.


def store_teacher(
    teacher: keras.Model,
    data: keras.utils.PyDataset,
    folder: PathLike,
    retrieval_heads: Literal["auto"] | Sequence[tuple[int, int]] = "auto",
    layers: Sequence[int] = (),
    rows: Literal["text", "all"] = "text",
    top_k: int = 64,
    vocabulary_size: int | None = None,
    temperature: float = 1.0,
    dtype: Literal["float16", "float32"] = "float16",
    epochs: int = 1,
    batches_per_shard: int = 64,
    num_segments: int | None = None,
) -> StoredTeacher:
    """Writes a teacher's targets to disk, to train students without it.

    The store holds (sizes are for `dtype="float16"`):

    - the attention that the teacher's retrieval heads give to each image or
      other segment: 2 bytes for each pair of a text token and a segment, in
      each layer with retrieval heads;
    - the keys of `layers` after rotary embedding: `2 * head_dim * key_heads`
      bytes for each token of images and text, in each layer;
    - the queries of `layers` after rotary embedding: `2 * head_dim *
      query_heads` bytes for each row, in each layer;
    - the largest logits of the tokens that `sample_weight` marks:
      `8 * top_k + 8` bytes for each of these tokens.

    `StoredTeacher.bytes_per_token` is the resulting size.

    Shards are `array_record` files with one `safetensors` record for each
    example. Beside each shard, a JSON file holds its SHA-256 and the
    fingerprints of its batches. If the call is stopped, the same call writes
    only the shards that are missing.

    Args:
        teacher: A `keras_hub.models.CausalLM` of a family that
            `keras_laid.backbones.attention_layers` knows, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`.
        data: A `keras.utils.PyDataset` of batches `(x, y, sample_weight)` that
            depend only on their index, and on the attribute `epoch` if the data
            have one, as `keras_laid.Haystacks` do.
        folder: Path of a folder that holds only this store; created if it does
            not exist.
        retrieval_heads: `"auto"`, the heads that
            `keras_laid.find_retrieval_heads` finds on the first batches; or
            pairs of integers `(layer, head)`; or `()` to store none. Defaults
            to `"auto"`.
        layers: Sequence of integers, the layers with full attention whose whole
            attention maps are to be matched; negative indices count from the
            last layer. Defaults to `()`, none.
        rows: `"text"` or `"all"`: whether the queries of `layers` are stored
            for text tokens only, or for image tokens too. Choose the `rows` of
            `keras_laid.distillation.AttentionMatching`. Defaults to `"text"`.
        top_k: Integer, how many of the largest logits are stored for each
            marked token; all other tokens count as one, see
            `keras_laid.ops.TopLogits`. `0` stores no logits. Defaults to `64`.
        vocabulary_size: Optional integer, for a student whose vocabulary is
            smaller than the teacher's: only the logits of this many first
            tokens are used. Defaults to `None`, the whole vocabulary.
        temperature: Float greater than 0, the `temperature` of
            `keras_laid.distillation.NextTokens`. Defaults to `1.0`.
        dtype: `"float16"` or `"float32"`, the dtype of the stored attention,
            queries and keys. Defaults to `"float16"`.
        epochs: Integer, for how many epochs of the data targets are stored. The
            default is right for data that are the same in every epoch. If a
            student trains for more epochs, these are repeated. Defaults to `1`.
        batches_per_shard: Integer, the number of batches in a shard. Defaults
            to `64`.
        num_segments: Optional integer, the largest number of a segment, see
            `keras_laid.distillation.RetrievalMatching`. Defaults to `None`, the
            number of images.

    Returns:
        A `StoredTeacher`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range; if the folder holds a store
            that was written with other settings, or of a teacher with another
            config, other weights or other scopes, such as `keras_laid.yarn`; if
            inputs are not finite; or if queries and keys are too large for
            `dtype`.
        OSError: If the folder cannot be written to. Complete shards are kept.
    """
    checks.check_task("teacher", teacher)
    stored_teacher.check_data(data)
    check_path("folder", folder)
    check_integer("epochs", epochs)
    layers = check_indices("layers", layers)
    if num_segments is not None:
        check_integer("num_segments", num_segments)
    settings: dict[str, Any] = dict(
        layers=chosen_layers(teacher, layers) if layers else [],
        rows=rows,
        top_k=top_k,
        vocabulary_size=vocabulary_size,
        temperature=temperature,
        dtype=dtype,
        epochs=epochs,
        batches=epochs * len(data),
        batches_per_shard=batches_per_shard,
        num_segments=num_segments,
    )
    description = Description.from_model(teacher)
    heads: Heads | None = ()
    if len(retrieval_heads):
        heads = resolve_heads("retrieval_heads", retrieval_heads, description)
    if vocabulary_size is None:
        settings["vocabulary_size"] = description.vocabulary_size
    check_settings(settings, description.vocabulary_size, data)
    if heads is None:
        batches = first_batches(data)
        found = find_retrieval_heads(
            teacher, batches, len(batches), num_segments=num_segments
        )
        heads = found.heads if found else ()
    settings["retrieval_heads"] = sorted(map(list, heads))
    check_not_empty(settings)
    description = dataclasses.replace(
        description, vocabulary_size=settings["vocabulary_size"]
    )
    stored_teacher.file_formats()
    settings["teacher"] = model_fingerprint(teacher)
    return write_store(
        teacher,
        Targets(teacher, settings).records,
        data,
        folder,
        settings,
        description,
    )


def check_settings(
    settings: dict[str, Any], vocabulary_size: int, data: keras.utils.PyDataset
) -> None:
    check_choice("rows", settings["rows"], ("text", "all"))
    check_choice("dtype", settings["dtype"], ("float16", "float32"))
    check_number("temperature", settings["temperature"], "(0, inf)")
    check_integer("batches_per_shard", settings["batches_per_shard"])
    for name, least, most in (
        ("vocabulary_size", 1, vocabulary_size),
        ("top_k", 0, settings["vocabulary_size"]),
    ):
        check_integer(name, settings[name], least)
        if settings[name] > most:
            raise ValueError(
                f"`{name}` must be at most {most}. "
                f"Received: {name}={settings[name]}"
            )
    check_batches(settings, data)


def check_not_empty(settings: dict[str, Any]) -> None:
    wanted = ("retrieval_heads", "layers", "top_k")
    if not any(settings[name] for name in wanted):
        raise ValueError(
            "There must be something to store. Received: "
            + ", ".join(f"{name}={settings[name]}" for name in wanted)
        )


class Targets(keras.Model):
    """The teacher as a function from inputs to the targets to store."""

    def __init__(self, teacher: keras.Model, settings: dict[str, Any]) -> None:
        super().__init__()
        self.teacher = teacher
        self.settings = settings
        self.built = True

    def call(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = dict(inputs)
        marked = inputs.pop("marked")
        layers, heads = (
            self.settings["layers"],
            self.settings["retrieval_heads"],
        )
        unembedding, attention, _ = forward(
            self.teacher, inputs, sorted({*layers, *layers_of(heads)})
        )
        outputs = {}
        length = inputs["token_ids"].shape[1]
        for index in layers:
            query = attention[index].query
            if self.settings["rows"] == "text":
                query = query[:, -length:]
            outputs[f"query_{index}"] = ops.cast(query, "float32")
            outputs[f"key_{index}"] = ops.cast(attention[index].key, "float32")
        if heads:
            log_shares = text_log_shares(
                self.teacher,
                inputs,
                attention,
                heads,
                self.settings["num_segments"],
            )
            for index, values in log_shares.items():
                outputs[f"shares_{index}"] = ops.exp(values)
        if self.settings["top_k"]:
            top = self.top_logits(unembedding, marked)
            outputs |= dict(zip(stored_teacher.TOP_LOGITS, top, strict=True))
        return outputs

    def top_logits(
        self, unembedding: Unembedding, marked: Tensor
    ) -> list[Tensor]:
        """Logits of the tokens at `marked`, `ROWS` of an example at a time."""
        unembedding = unembedding.first(self.settings["vocabulary_size"])
        hidden = ops.take_along_axis(
            unembedding.hidden, marked[:, :, None], axis=1
        )
        batch, slots, width = ops.shape(hidden)
        blocks = ops.reshape(hidden, (batch, slots // ROWS, ROWS, width))

        def top_of_block(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return TopLogits.from_logits(
                unembedding._replace(hidden=hidden).logits(),
                self.settings["top_k"],
                self.settings["temperature"],
            )[:3]

        return [
            ops.reshape(ops.moveaxis(each, 0, 1), (batch, slots, -1))
            for each in ops.map(top_of_block, ops.moveaxis(blocks, 1, 0))
        ]

    def records(self, batch: Batch) -> tuple[list[bytes], int]:
        """The examples of a batch as bytes, and how many tokens they have."""
        x, marked = batch.x, batch.marked
        counts = marked.sum(axis=1)
        slots = max(1, -(-counts.max() // ROWS)) * ROWS
        # The marked tokens of each example come first.
        order = np.argsort(~marked, axis=1, kind="stable")
        order = np.pad(order, ((0, 0), (0, slots)))[:, :slots]
        outputs = self.predict_on_batch(x | {"marked": order.astype("int32")})
        keys = [n for n in outputs if n.startswith("key")]
        tokens = outputs[keys[0]].shape[1] if keys else marked.shape[1]
        examples = []
        for example, count in enumerate(counts):
            arrays = {}
            for name, values in outputs.items():
                if name in stored_teacher.TOP_LOGITS:
                    arrays[name] = values[example, :count]
                else:
                    arrays[name] = self.rounded(name, values[example])
            examples.append(record(arrays))
        return examples, tokens * len(marked)

    def rounded(self, name: str, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            rounded = values.astype(self.settings["dtype"])
        if not np.isfinite(rounded).all():
            raise ValueError(
                "Queries and keys must be finite numbers of `dtype`. Received: "
                f"dtype={self.settings['dtype']!r}, {name} up to "
                f'{np.abs(values).max()}. Pass `dtype="float32"`.'
            )
        return rounded
