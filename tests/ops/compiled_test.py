"""Compilers accept the kernels for an H100, which need not be present."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from keras import ops

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from tests.ops.kernels import H100
from tests.ops.kernels import needs_jax
from tests.ops.kernels import needs_triton


@pytest.mark.extra_large
@needs_triton
def test_triton_compiles_for_an_h100():
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_for_hopper"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 48 + 4  # Four of them with a mixture.
    for kernel in kernels:
        assert kernel["shared_bytes"] <= H100, kernel
        # The fastest tiles spill no more than this.
        assert kernel["spilled_bytes"] <= 440, kernel


@pytest.mark.extra_large
@needs_jax
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton compiles the kernels.",
)
def test_pallas_compiles_for_an_h100(tmp_path):
    for module, backend in (
        ("lower_pallas", "jax"),
        ("compile_lowered", "torch"),
    ):
        environment = dict(os.environ, KERAS_BACKEND=backend)
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-m", f"tests.ops.{module}", str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 24
    for kernel in kernels:
        assert kernel["shared_bytes"] <= H100, kernel
        assert kernel["spilled_bytes"] <= 2300, kernel


@needs_jax
@pytest.mark.parametrize("op", ["attention_divergence", "attention_output"])
def test_pallas_lowers_to_a_gpus_kernels(op):
    import jax

    from keras_laid.ops.attention_divergence import pallas as divergence_pallas
    from keras_laid.ops.attention_output import pallas as output_pallas

    length = 200

    def loss(query, key, value):
        attention = Attention(query, key, 0.1, 50.0)
        mask = AttentionMask.from_lengths(length, [length], 90, window=70)
        if op == "attention_output":
            result = output_pallas.attention_output(attention, value, mask)
        else:
            index = ops.arange(length)[None]
            result = divergence_pallas.attention_divergence(
                attention, attention, mask, Distance(index, index), None
            )
        return ops.sum(ops.cast(result, "float32"))

    call = "__gpu$xla.gpu.triton"
    shapes = [(1, length, heads, 128) for heads in (8, 1, 1)]
    # After JAX 0.10, lowering needs to know the GPU.
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(
            jax.jit(jax.grad(loss, (0, 1, 2))),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
        )(*[jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes])
    calls = re.findall(re.escape(call), exported.mlir_module())
    # Forward, gradient of queries, gradient of keys.
    assert len(calls) == 3
