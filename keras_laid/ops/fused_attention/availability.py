"""Which inputs fused kernels can take; each op's README.md says why."""

import importlib
import importlib.util
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras

from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.dispatch import Implementation
from keras_laid.typing import Tensor

WIDEST = 256  # Head dim that a fused kernel holds on the chip.


def implementations(
    op: str, inputs: Callable[..., tuple[Sequence[Tensor], AttentionMask]]
) -> list[Implementation]:
    """The fused implementations of an op.

    Args:
        op: String, the name of the op and of its folder.
        inputs: Called with the op's arguments. Returns those that decide
            whether the kernels can run: a list of queries (and values), and
            their mask.

    Returns:
        A list of `Implementation`s.
    """

    def implementation(
        name: str, why_not: Callable[..., str | None]
    ) -> Implementation:
        def run(*arguments: Any) -> Tensor:
            # Imported on the first call.
            module = importlib.import_module(f"keras_laid.ops.{op}.{name}")
            return getattr(module, op)(*arguments)

        return Implementation(
            name, run, lambda *arguments: why_not(*inputs(*arguments))
        )

    return [
        implementation("pallas", why_not_pallas),
        implementation("triton", why_not_triton),
    ]


def why_not_pallas(
    tensors: Sequence[Tensor], mask: AttentionMask
) -> str | None:
    if keras.backend.backend() != "jax":
        return f"it needs JAX, not {keras.backend.backend()}."
    import jax

    if jax.default_backend() != "gpu":
        return f"it runs on GPUs, and JAX runs on {jax.default_backend()}."
    return (
        why_not_mask(mask)
        or why_not_capability(jax.devices()[0].compute_capability)
        or why_not_tensors(tensors, ("bfloat16", "float16"))
    )


def why_not_triton(
    tensors: Sequence[Tensor], mask: AttentionMask
) -> str | None:
    if keras.backend.backend() != "torch":
        return f"it needs torch, not {keras.backend.backend()}."
    device = tensors[0].device
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}."
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed."
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return (
        why_not_mask(mask)
        or why_not_capability(f"{major}.{minor}")
        or why_not_tensors(tensors, ("bfloat16", "float16", "float32"))
    )


def why_not_mask(mask: AttentionMask) -> str | None:
    if mask.block is not None:
        return "it supports no blocks of keys (`mask.block`)."
    return None


def why_not_capability(capability: str) -> str | None:
    """Other chips lack memory for the tiles, or the unit that loads them."""
    if capability.split(".")[0] not in ("9", "10"):
        return (
            "its tiles fit GPUs of compute capability 9 and 10, and this one "
            f"has {capability}."
        )
    return None


def why_not_tensors(
    tensors: Sequence[Tensor], dtypes: tuple[str, ...]
) -> str | None:
    for tensor in tensors:
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if dtype not in dtypes:
            return (
                f"its inputs must have one of the dtypes {dtypes}, and some "
                f"are {dtype}."
            )
        if tensor.shape[3] > WIDEST:
            return (
                f"head dims must be at most {WIDEST}, and one is "
                f"{tensor.shape[3]}."
            )
    return None
