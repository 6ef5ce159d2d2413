"""Shared by tests of ops with fused kernels."""

import importlib
import importlib.util
import os

import keras
import pytest

BACKEND = keras.backend.backend()
HAS_TRITON = BACKEND == "torch" and importlib.util.find_spec("triton")
KERNEL = {"jax": "pallas", "torch": "triton"}.get(BACKEND)  # On a GPU.
H100 = 227 * 1024  # Bytes of shared memory that a program may use.
needs_jax = pytest.mark.skipif(BACKEND != "jax", reason="A kernel for JAX.")
needs_triton = pytest.mark.skipif(
    not HAS_TRITON,
    reason="A kernel for torch, where Triton is installed.",
)
needs_kernel = pytest.mark.skipif(
    BACKEND != "jax" and not HAS_TRITON, reason="Needs JAX or Triton."
)
FUSED = [
    pytest.param("pallas", marks=needs_jax),
    pytest.param("triton", marks=needs_triton),
]
IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", [*FUSED, "chunked", "definition"]
)


def run(op, implementation, *arguments):
    """An op by one implementation; kernels are interpreted on a CPU."""
    name = op.__name__
    if implementation in ("pallas", "triton"):
        module = f"keras_laid.ops.{name}.{implementation}"
        return getattr(importlib.import_module(module), name)(*arguments)
    return op(*arguments, implementation=implementation)


def is_interpretable(implementation, dtype):
    """False for bfloat16, which Triton's interpreter multiplies wrongly."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return not (
        implementation == "triton" and dtype == "bfloat16" and interpreted
    )
