"""Computes what distilling one model into another takes of each device."""

import concurrent.futures
import dataclasses
import math

import keras
import keras_hub

from keras_laid.backbones import attention_layers
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import global_layers
from keras_laid.distribution import split_axis
from keras_laid.ops.logits_divergence import chunked

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks of one shape that run one after the other.

    Attributes:
        layers: Integer, how many.
        width: Integer, numbers of a token between blocks.
        inner: Integer, numbers of a token inside that can be split by heads and
            feedforward units: queries, keys, values, what attention puts out,
            and two feedforward activations and their product.
        tokens: Integer, of one example.
    """

    layers: int
    width: int
    inner: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model's shapes, without its weights."""

    variables: list  # Tuples of path, shape, dtype, and whether it is trained.
    stacks: list
    compute_dtype: str
    vocabulary: int
    width: int
    captured: int  # Numbers of a token in one layer's queries and keys.

    @property
    def parameters(self):
        return sum(math.prod(shape) for _, shape, _, _ in self.variables)

    def bytes(self, devices, trained_only=False):
        """Bytes of the weights on one of the devices that share the model."""
        total = 0
        for path, shape, dtype, trained in self.variables:
            if trained_only and not trained:
                continue
            axis = split_axis(path, shape, devices)
            share = 1 if axis is None else devices
            total += math.prod(shape) * BYTES[dtype] // share
        return total

    def kept(self):
        """Bytes that an example leaves for the backward pass: block inputs."""
        numbers = sum(s.layers * s.tokens * s.width for s in self.stacks)
        return numbers * BYTES[self.compute_dtype]

    def at_work(self, devices, backward):
        """Bytes of an example inside one block, of the largest kind."""
        numbers = max(
            s.tokens * (2 * s.width + -(-s.inner // devices))
            for s in self.stacks
        )
        return numbers * BYTES[self.compute_dtype] * (2 if backward else 1)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device, part by part; its string is a table.

    Attributes:
        parts: Dictionary from names to bytes.
        total: Integer, their sum, in bytes.
        memory: Float, what a device has, in bytes, or `None`.
        teacher_parameters: Integer.
        student_parameters: Integer.
        mesh_shape: Tuple of two integers.
    """

    parts: dict
    teacher_parameters: int
    student_parameters: int
    mesh_shape: tuple
    memory: float | None = None

    @property
    def total(self):
        return sum(self.parts.values())

    @property
    def fits(self):
        """Whether the total is no more than a device has."""
        return self.memory is None or self.total <= self.memory

    def __str__(self):
        batch, model = self.mesh_shape
        lines = [
            f"{self.teacher_parameters / 1e9:.2f}B -> "
            f"{self.student_parameters / 1e9:.2f}B parameters, "
            f"{batch} x {model} devices (batch x model)",
            f"{'Memory of each device':<40}{'GB':>8}",
        ]
        for name, size in self.parts.items():
            lines.append(f"{name:<40}{size / 1e9:>8.2f}")
        lines.append(f"{'total':<40}{self.total / 1e9:>8.2f}")
        if self.memory is not None:
            verdict = "fits in" if self.fits else "does not fit in"
            lines.append(f"{verdict} {self.memory / 1e9:.0f} GB")
        return "\n".join(lines)

    __repr__ = __str__


def plan(
    teacher,
    student,
    image_tokens,
    text_tokens,
    batch_size=1,
    mesh_shape=(1, 1),
    memory=None,
    teacher_dtype="bfloat16",
    student_dtype="mixed_bfloat16",
    optimizer_slots=2,
    matched_layers=1,
):
    """Computes the memory of each device for distilling a pair of models.

    No weight is allocated. Weights, gradients and the optimizer's state are
    counted variable by variable, split as `keras_laid.ModelParallel` splits
    them. Activations are those of a distiller with `rematerialize=True` and of
    attention that stores no map: what blocks are given, and what is alive in
    one block while it runs. What compilers and communication need on top is not
    counted.

    Args:
        teacher: A KerasHub model, the name or folder of a preset, or a function
            without arguments that returns a model or a backbone; the latter
            two are built without weights, with the dtypes below.
        student: Likewise.
        image_tokens: Integer, tokens of all images of an example.
        text_tokens: Integer, tokens of its text.
        batch_size: Integer, examples of all devices together. Defaults to `1`.
        mesh_shape: Tuple of two integers: over how many devices a batch is
            split, and over how many the models. Defaults to `(1, 1)`.
        memory: Float, bytes of a device, to be told whether it fits. Defaults
            to `None`.
        teacher_dtype: A dtype policy's name. Defaults to `"bfloat16"`.
        student_dtype: A dtype policy's name. Defaults to `"mixed_bfloat16"`:
            weights in float32.
        optimizer_slots: Integer, numbers that the optimizer keeps of each
            trained weight: 2 for Adam and AdamW. Defaults to `2`.
        matched_layers: Integer, pairs of layers in the layer map. Defaults to
            `1`.

    Returns:
        A `MemoryPlan`.

    Raises:
        ValueError: If a number is not positive, or a model's family is unknown.

    Example:

    ```python
    print(
        keras_laid.plan(
            "pali_gemma2_pt_10b_448",
            "pali_gemma2_pt_3b_448",
            image_tokens=8 * 1024,
            text_tokens=128,
            batch_size=2,
            mesh_shape=(2, 4),
            memory=80e9,
        )
    )
    ```
    """
    batch_axis, model_axis = mesh_shape
    for name, value, least in (
        ("image_tokens", image_tokens, 0),
        ("text_tokens", text_tokens, 1),
        ("batch_size", batch_size, 1),
        ("mesh_shape", min(mesh_shape), 1),
        ("optimizer_slots", optimizer_slots, 0),
        ("matched_layers", matched_layers, 0),
    ):
        if value < least:
            raise ValueError(
                f"`{name}` must be at least {least}. Received: {name}={value}"
            )
    if batch_size % batch_axis:
        raise ValueError(
            "The batch must be split evenly. Received: "
            f"batch_size={batch_size}, mesh_shape={tuple(mesh_shape)}"
        )
    of_teacher, of_student = (
        blueprint(model, dtype, image_tokens, text_tokens)
        for model, dtype in (
            (teacher, teacher_dtype),
            (student, student_dtype),
        )
    )
    examples = batch_size // batch_axis
    trained = of_student.bytes(model_axis, trained_only=True)
    captured = sum(
        each.captured * BYTES[each.compute_dtype]
        for each in (of_teacher, of_student)
    )
    tokens = image_tokens + text_tokens
    rows = max(chunked.ROWS, chunked.ELEMENTS // of_student.vocabulary)
    rows = min(rows, examples * text_tokens)
    # A block's logits, probabilities and slopes; and the kernel's gradient.
    logits = 4 * of_student.vocabulary * (6 * rows + of_student.width)
    return MemoryPlan(
        parts={
            "teacher: weights": of_teacher.bytes(model_axis),
            "student: weights": of_student.bytes(model_axis),
            "student: gradients": trained,
            "student: optimizer": optimizer_slots * trained,
            "student: what blocks are given": examples * of_student.kept(),
            "one block at work": examples
            * max(
                of_student.at_work(model_axis, backward=True),
                of_teacher.at_work(model_axis, backward=False),
            ),
            "queries and keys that are matched": (
                examples * tokens * matched_layers * captured
            ),
            "logits": logits // model_axis,
        },
        teacher_parameters=of_teacher.parameters,
        student_parameters=of_student.parameters,
        mesh_shape=tuple(mesh_shape),
        memory=memory,
    )


def blueprint(model, dtype, image_tokens, text_tokens):
    """The `Blueprint` of a model, of a preset, or of what a function builds."""
    if isinstance(model, keras.Model):
        return blueprint_of_built(model, image_tokens, text_tokens)
    if isinstance(model, str):
        name = model

        def model():
            return keras_hub.models.Backbone.from_preset(
                name, load_weights=False
            )

    # Variables made in a stateless scope have no values. Keras would give them
    # some later, but only to those of the same thread.
    def build():
        keras.config.set_dtype_policy(dtype)
        with keras.StatelessScope(initialize_variables=False):
            return blueprint_of_built(model(), image_tokens, text_tokens)

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(build).result()


def blueprint_of_built(model, image_tokens, text_tokens):
    backbone = backbone_of(model)
    layers = attention_layers(model)
    last = layers[global_layers(model)[-1]]
    heads = (last.num_query_heads + last.num_key_value_heads) * last.head_dim
    decoder = Stack(
        layers=len(layers),
        width=backbone.hidden_dim,
        inner=2 * heads + 3 * backbone.intermediate_dim,
        tokens=image_tokens + text_tokens,
    )
    return Blueprint(
        variables=[
            (v.path, tuple(v.shape), v.dtype, v.trainable)
            for v in backbone.variables
            if v.dtype in BYTES
        ],
        stacks=[decoder, *vision_stacks(backbone, image_tokens)],
        compute_dtype=backbone.token_embedding.compute_dtype,
        vocabulary=backbone.vocabulary_size,
        width=backbone.hidden_dim,
        captured=heads,
    )


def vision_stacks(backbone, image_tokens):
    """The vision encoder's blocks, by the names that the families use."""
    if not image_tokens:
        return []
    encoder = getattr(backbone, "vision_encoder", None)
    config = backbone.get_config() if encoder is None else encoder.get_config()

    def find(*names):
        return next(config[name] for name in names if name in config)

    width = find("vit_hidden_dim", "hidden_dim", "hidden_size")
    inner = find(
        "vit_intermediate_dim", "intermediate_dim", "intermediate_size"
    )
    side = config.get("pool_size") or config.get("spatial_merge_size") or 1
    return [
        Stack(
            layers=find("vit_num_layers", "num_layers", "depth"),
            width=width,
            inner=4 * width + 2 * inner,
            tokens=image_tokens * side**2,
        )
    ]
