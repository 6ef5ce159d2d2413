"""Computes the memory that distillation needs on each device."""

import concurrent.futures
import contextlib
import dataclasses
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import keras_hub

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.arguments import check_number
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import global_layers
from keras_laid.backbones.families import layers_with_maps
from keras_laid.devices.model_parallel import split_axis
from keras_laid.ops.logits_divergence import chunked

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks of one shape that run one after the other.

    Attributes:
        layers: Integer, the number of blocks.
        width: Integer, how many numbers a token has between blocks.
        inner: Integer, how many numbers a token has inside a block that can be
            split by heads and feedforward units: queries, keys, values, the
            output of attention, and two feedforward activations and their
            product.
        tokens: Integer, the number of tokens of one example.
    """

    layers: int
    width: int
    inner: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model's shapes, without its weights."""

    # Path, shape, dtype, and whether it is trained.
    variables: list[tuple[str, tuple[int, ...], str, bool]]
    stacks: list[Stack]
    compute_dtype: str
    vocabulary: int
    width: int
    captured: int  # Numbers of a token in one layer's queries and keys.

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape, _, _ in self.variables)

    def bytes(self, devices: int, trained_only: bool = False) -> int:
        """Bytes of the weights on one of the devices that share the model."""
        total = 0
        for path, shape, dtype, trained in self.variables:
            if trained_only and not trained:
                continue
            axis = split_axis(path, shape, devices)
            share = 1 if axis is None else devices
            total += math.prod(shape) * BYTES[dtype] // share
        return total

    def kept(self) -> int:
        """Bytes of an example kept for the backward pass: block inputs."""
        numbers = sum(s.layers * s.tokens * s.width for s in self.stacks)
        return numbers * BYTES[self.compute_dtype]

    def at_work(self, devices: int, backward: bool) -> int:
        """Bytes of an example inside one block, the largest of all stacks."""
        numbers = max(
            s.tokens * (2 * s.width + -(-s.inner // devices))
            for s in self.stacks
        )
        return numbers * BYTES[self.compute_dtype] * (2 if backward else 1)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device, part by part; `print` shows it as a table.

    Attributes:
        parts: Dictionary from names to bytes.
        total: Integer, their sum, in bytes.
        memory: Float, the memory of a device in bytes, or `None`.
        teacher_parameters: Integer, the number of the teacher's parameters.
        student_parameters: Integer, the number of the student's parameters.
        mesh_shape: Tuple of two integers, over how many devices a batch is
            split, and over how many the models.
    """

    parts: dict[str, int]
    teacher_parameters: int
    student_parameters: int
    mesh_shape: tuple[int, int]
    memory: float | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the total is at most `memory`; `True` if that is `None`."""
        return self.memory is None or self.total <= self.memory

    def __str__(self) -> str:
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
    teacher: str | keras.Model | Callable[[], keras.Model],
    student: str | keras.Model | Callable[[], keras.Model],
    image_tokens: int,
    text_tokens: int,
    batch_size: int = 1,
    mesh_shape: Sequence[int] = (1, 1),
    memory: float | None = None,
    teacher_dtype: str = "bfloat16",
    student_dtype: str = "mixed_bfloat16",
    optimizer_slots: int = 2,
    matched_layers: int = 1,
) -> MemoryPlan:
    """Computes the memory of each device for distilling a pair of models.

    No weight is allocated. Weights, gradients and the optimizer's state are
    counted variable by variable, split as `keras_laid.ModelParallel` splits
    them. Activations are those of a distiller with `rematerialize=True` and of
    attention that stores no map: the inputs of all blocks, and the tensors that
    are alive in one block while it runs. Memory for compilers and communication
    is not counted.

    Args:
        teacher: A KerasHub model, the name or folder of a preset, or a function
            without arguments that returns a model or a backbone. Presets and
            functions are built without weights, in `teacher_dtype`, and are not
            compiled.
        student: A KerasHub model, the name or folder of a preset, or a function
            without arguments that returns a model or a backbone. Presets and
            functions are built without weights, in `student_dtype`, and are not
            compiled.
        image_tokens: Integer, the number of tokens of all images of an example.
        text_tokens: Integer, the number of text tokens of an example.
        batch_size: Integer, the number of examples of all devices together.
            Defaults to `1`.
        mesh_shape: Tuple of two integers: over how many devices a batch is
            split, and over how many the models. Defaults to `(1, 1)`.
        memory: Optional float, the memory of a device in bytes. If it is given,
            the plan says whether its total fits. Defaults to `None`.
        teacher_dtype: String, the name of a dtype policy for the teacher.
            Defaults to `"bfloat16"`.
        student_dtype: String, the name of a dtype policy for the student.
            Defaults to `"mixed_bfloat16"`: weights in float32.
        optimizer_slots: Integer, how many numbers the optimizer keeps for each
            trained weight: 2 for Adam and AdamW. Defaults to `2`.
        matched_layers: Integer, the number of pairs of layers whose queries and
            keys are matched. Defaults to `1`.

    Returns:
        A `MemoryPlan`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a number is out of its range, the batch cannot be split
            evenly, or a model's family is unknown.

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
    mesh_shape = check_integers("mesh_shape", mesh_shape)
    if len(mesh_shape) != 2:
        raise ValueError(
            "`mesh_shape` must be two integers: over how many devices a batch "
            "is split, and over how many the models. "
            f"Received: mesh_shape={mesh_shape}"
        )
    batch_axis, model_axis = mesh_shape
    for name, value, least in (
        ("image_tokens", image_tokens, 0),
        ("text_tokens", text_tokens, 1),
        ("batch_size", batch_size, 1),
        ("optimizer_slots", optimizer_slots, 0),
        ("matched_layers", matched_layers, 0),
    ):
        check_integer(name, value, least)
    if memory is not None:
        check_number("memory", memory, "(0, inf)")
    check_dtype_policy("teacher_dtype", teacher_dtype)
    check_dtype_policy("student_dtype", student_dtype)
    if batch_size % batch_axis:
        raise ValueError(
            "The batch must be split evenly over the first axis of the mesh. "
            f"Received: batch_size={batch_size}, mesh_shape={mesh_shape}"
        )
    teacher_blueprint, student_blueprint = (
        blueprint(model, dtype, image_tokens, text_tokens)
        for model, dtype in (
            (teacher, teacher_dtype),
            (student, student_dtype),
        )
    )
    examples = batch_size // batch_axis
    trained = student_blueprint.bytes(model_axis, trained_only=True)
    captured = sum(
        each.captured * BYTES[each.compute_dtype]
        for each in (teacher_blueprint, student_blueprint)
    )
    tokens = image_tokens + text_tokens
    rows = max(chunked.ROWS, chunked.ELEMENTS // student_blueprint.vocabulary)
    rows = min(rows, examples * text_tokens)
    # A block's logits, probabilities and slopes; and the kernel's gradient.
    logits = (
        4 * student_blueprint.vocabulary * (6 * rows + student_blueprint.width)
    )
    return MemoryPlan(
        parts={
            "teacher: weights": teacher_blueprint.bytes(model_axis),
            "student: weights": student_blueprint.bytes(model_axis),
            "student: gradients": trained,
            "student: optimizer": optimizer_slots * trained,
            "student: what blocks are given": examples
            * student_blueprint.kept(),
            "one block at work": examples
            * max(
                student_blueprint.at_work(model_axis, backward=True),
                teacher_blueprint.at_work(model_axis, backward=False),
            ),
            "queries and keys that are matched": (
                examples * tokens * matched_layers * captured
            ),
            "logits": logits // model_axis,
        },
        teacher_parameters=teacher_blueprint.parameters,
        student_parameters=student_blueprint.parameters,
        mesh_shape=(batch_axis, model_axis),
        memory=memory,
    )


def check_dtype_policy(name: str, policy: str) -> None:
    known = keras.dtype_policies.get(policy)
    if policy is None or known.variable_dtype not in BYTES:
        raise ValueError(
            f"`{name}` must be the name of a dtype policy with weights in one "
            f"of {list(BYTES)}. Received: {name}={policy!r}"
        )


def blueprint(
    model: str | keras.Model | Callable[[], keras.Model],
    dtype: str,
    image_tokens: int,
    text_tokens: int,
) -> Blueprint:
    """The `Blueprint` of a model, of a preset, or of what a function builds."""
    if isinstance(model, keras.Model):
        return blueprint_of_built(model, image_tokens, text_tokens)
    if isinstance(model, keras.layers.Layer) or not (
        isinstance(model, str) or callable(model)
    ):
        raise TypeError(
            "A model must be a KerasHub model, the name or folder of a preset, "
            "or a function that returns a model. "
            f"Received: {type(model).__name__}"
        )
    if isinstance(model, str):
        name = model

        def model() -> keras.Model:
            return keras_hub.models.Backbone.from_preset(
                name, load_weights=False
            )

    # Variables made in a stateless scope have no values. Keras would initialize
    # those of this thread later, so they are made in another one.
    def build() -> Blueprint:
        keras.config.set_dtype_policy(dtype)
        with keras.StatelessScope(initialize_variables=False), uncompiled():
            return blueprint_of_built(model(), image_tokens, text_tokens)

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(build).result()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Scope in which new tasks get no optimizer, which would need values."""
    task = keras_hub.models.CausalLM
    compile_task = task.compile
    task.compile = lambda self, *args, **kwargs: None
    try:
        yield
    finally:
        task.compile = compile_task


def blueprint_of_built(
    model: keras.Model, image_tokens: int, text_tokens: int
) -> Blueprint:
    backbone = backbone_of(model)
    last = layers_with_maps(model)[global_layers(model)[-1]]
    heads = (last.num_query_heads + last.num_key_value_heads) * last.head_dim
    decoder = Stack(
        layers=len(backbone.transformer_layers),
        width=backbone.hidden_dim,
        inner=2 * heads + 3 * feedforward_units(backbone, last.index),
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


def feedforward_units(backbone: keras.Model, index: int) -> int:
    """The feedforward units of a block; `intermediate_dim` may be another."""
    block = backbone.transformer_layers[index]
    widths = [
        v.shape[1]
        for v in block.variables
        if len(v.shape) == 2 and v.shape[0] == backbone.hidden_dim
    ]
    return max(widths, default=backbone.intermediate_dim)


def vision_stacks(backbone: keras.Model, image_tokens: int) -> list[Stack]:
    """The vision encoder's blocks, by the names that the families use."""
    if not image_tokens:
        return []
    encoder = getattr(backbone, "vision_encoder", None)
    config = backbone.get_config() if encoder is None else encoder.get_config()

    def find(*names: str) -> int:
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
