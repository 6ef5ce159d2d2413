"""Distance-weighted divergence between two attention maps."""

import importlib
import importlib.util

import keras
from keras import ops

from keras_laid.ops.attention_divergence import chunked
from keras_laid.ops.attention_divergence import definition
from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select

WIDEST = 256  # Head dim that a fused kernel holds on the chip.


def kernel(name):
    """The op of one of the kernels' modules, imported on its first call."""

    def run(*arguments):
        module = importlib.import_module(f"{__name__}.{name}")
        return module.attention_divergence(*arguments)

    return run


def why_not_pallas(student, teacher, mask, distance, mixture):
    if keras.backend.backend() != "jax":
        return f"it needs JAX, not {keras.backend.backend()}."
    import jax

    if jax.default_backend() != "gpu":
        return f"it runs on GPUs, and JAX runs on {jax.default_backend()}."
    return (
        why_not_mask(mask)
        or why_not_capability(jax.devices()[0].compute_capability)
        or why_not_inputs(student, teacher, ("bfloat16", "float16"))
    )


def why_not_triton(student, teacher, mask, distance, mixture):
    if keras.backend.backend() != "torch":
        return f"it needs torch, not {keras.backend.backend()}."
    device = student.query.device
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}."
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed."
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return (
        why_not_mask(mask)
        or why_not_capability(f"{major}.{minor}")
        or why_not_inputs(student, teacher, ("bfloat16", "float16", "float32"))
    )


def why_not_mask(mask):
    if mask.block is not None:
        return "it knows no blocks of keys."
    return None


def why_not_capability(capability):
    """Other chips lack memory for the tiles, or what reads them."""
    if capability.split(".")[0] not in ("9", "10"):
        return (
            "its tiles fit GPUs of compute capability 9 and 10, and this one "
            f"has {capability}."
        )
    return None


def why_not_inputs(student, teacher, dtypes):
    for side in (student, teacher):
        dtype = keras.backend.standardize_dtype(side.query.dtype)
        if dtype not in dtypes:
            return f"queries must be one of {dtypes}, and some are {dtype}."
        if side.query.shape[3] > WIDEST:
            return (
                f"head dims must be at most {WIDEST}, and one is "
                f"{side.query.shape[3]}."
            )
    return None


# In order of preference.
IMPLEMENTATIONS = (
    Implementation("pallas", kernel("pallas"), why_not_pallas),
    Implementation("triton", kernel("triton"), why_not_triton),
    Implementation("chunked", chunked.attention_divergence),
    Implementation("definition", definition.attention_divergence),
)


def attention_divergence(
    student, teacher, mask, distance, mixture=None, implementation=None
):
    """Divergence of a student's attention from a teacher's, row by row.

    For row `i`, teacher map `p` and student map `q`,

    `D_i = sum_j w_ij (p_ij log(p_ij / q_ij) - p_ij + q_ij)`,

    the generalised Kullback-Leibler divergence with weights `w_ij` that grow
    with the distance of the two tokens. No term is negative, and `D_i` is 0
    only where the maps agree. With every weight 1 it is `KL(p || q)`.

    Masking: keys outside `mask` have no attention on either side; a row without
    any key contributes 0.

    Args:
        student: `keras_laid.ops.Attention` of the student.
        teacher: `keras_laid.ops.Attention` of the teacher, with the same batch,
            rows and keys. Head dims may differ. No gradient reaches it.
        mask: `keras_laid.ops.AttentionMask` of both.
        distance: `keras_laid.ops.Distance`, positions and weights.
        mixture: Optional float32 tensor of shape
            `(student_heads, teacher_heads)` whose rows sum to 1: `p` of student
            head `s` is `sum_t mixture[s, t] * p_t`. `None` pairs equal heads.
        implementation: `None` for the first that can, or one of `"pallas"`
            (fused, JAX) and `"triton"` (fused, torch), both on NVIDIA GPUs of
            compute capability 9 and 10 such as the H100, `"chunked"`
            (anywhere, holds some rows of the maps at a time) and
            `"definition"` (holds whole maps).

    Returns:
        A float32 tensor of shape `(batch, student_heads, rows)`, in nats.

    Raises:
        ValueError: If shapes do not fit, a scale is not greater than 0, or
            `implementation` is unknown.
        NotImplementedError: If the named `implementation` cannot run here.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), "progressive
       distance-weighted attention matching"; the formula is ours.
    """
    check_arguments(student, teacher, mixture)
    teacher = teacher._replace(
        query=ops.stop_gradient(teacher.query),
        key=ops.stop_gradient(teacher.key),
    )
    arguments = (student, teacher, mask, distance, mixture)
    chosen = select(
        "attention_divergence", IMPLEMENTATIONS, implementation, *arguments
    )
    return chosen.run(*arguments)


def check_arguments(student, teacher, mixture):
    student_heads = student.query.shape[2]
    teacher_heads = teacher.query.shape[2]
    for name, side in (("student", student), ("teacher", teacher)):
        if side.scale <= 0:
            raise ValueError(
                "`scale` must be greater than 0. Received: "
                f"{name}.scale={side.scale}"
            )
        heads, key_heads = side.query.shape[2], side.key.shape[2]
        if heads % key_heads or side.query.shape[3] != side.key.shape[3]:
            raise ValueError(
                "Query heads must be a multiple of key heads, and head dims "
                f"must be equal. Received: {name}.query.shape="
                f"{tuple(side.query.shape)}, {name}.key.shape="
                f"{tuple(side.key.shape)}"
            )
    if mixture is None and student_heads != teacher_heads:
        raise ValueError(
            "Without `mixture` the student and the teacher must have the same "
            f"number of heads. Received: student heads={student_heads}, "
            f"teacher heads={teacher_heads}. Pass the mixture of a "
            "`keras_laid.HeadMixer`."
        )
    expected = (student_heads, teacher_heads)
    if mixture is not None and tuple(mixture.shape) != expected:
        raise ValueError(
            "`mixture` must have shape (student_heads, teacher_heads) = "
            f"{expected}. Received: mixture.shape={tuple(mixture.shape)}"
        )
    for name, one, other in (
        ("batch", student.query.shape[0], teacher.query.shape[0]),
        ("rows", student.query.shape[1], teacher.query.shape[1]),
        ("keys", student.key.shape[1], teacher.key.shape[1]),
    ):
        if None not in (one, other) and one != other:
            raise ValueError(
                f"Student and teacher must have the same {name}. "
                f"Received: student {name}={one}, teacher {name}={other}"
            )
