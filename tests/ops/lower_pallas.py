"""Writes Pallas kernels as Triton's, which need no GPU, to a folder.

`compiled_test.py` runs it, then `compile_lowered.py`: JAX and Triton cannot be
loaded into the same process.
"""

import json
import pathlib
import sys

import jax
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jaxlib.triton import dialect
from keras import ops

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops.attention_divergence.pallas import attention_divergence
from keras_laid.ops.attention_output.pallas import attention_output

LENGTH = 2**14
CALL = "__gpu$xla.gpu.triton"


def output(query, key, value):
    mask = AttentionMask.from_lengths(LENGTH, [LENGTH], [LENGTH // 2])
    return attention_output(Attention(query, key, 0.1), value, mask)


def divergence(query, key, value):
    mask = AttentionMask.from_lengths(LENGTH, [LENGTH], [LENGTH // 2])
    attention = Attention(query, key, 0.1)
    index = ops.arange(LENGTH)[None]
    distance = Distance(index, index, 3.0)
    return attention_divergence(attention, attention, mask, distance, None)


def lowered(function, heads, key_heads, width):
    """The settings of each kernel, in the order of their calls."""

    def loss(*tensors):
        return ops.sum(ops.cast(function(*tensors), "float32"))

    shapes = [
        jax.ShapeDtypeStruct((1, LENGTH, count, width), "bfloat16")
        for count in (heads, key_heads, key_heads)
    ]
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    found = []

    def visit(operation):
        if CALL in str(operation.attributes.get("call_target_name", "")):
            config = operation.attributes["mhlo.backend_config"]
            found.append({each.name: each.attr for each in config})
        return ir.WalkResult.ADVANCE

    with module.context:
        module.operation.walk(visit)
    return found


def as_text(bytecode):
    with mlir.make_ir_context() as context, ir.Location.unknown():
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        module = ir.Module.parse(bytecode)
        return module.operation.get_asm(enable_debug_info=False)


def main(folder):
    shapes = (16, 16, 64), (16, 16, 128), (16, 4, 128), (8, 1, 256)
    for function in (output, divergence):
        for shape in shapes:
            for number, kernel in enumerate(lowered(function, *shape)):
                settings = {
                    "op": function.__name__,
                    "kernel": kernel["name"].value,
                    "shape": shape,
                    "num_warps": kernel["num_warps"].value,
                    "num_stages": kernel["num_stages"].value,
                }
                name = f"{function.__name__}_{'_'.join(map(str, shape))}"
                path = folder / f"{name}_{number}.ttir"
                path.write_text(as_text(kernel["ir"].value_bytes))
                path.with_suffix(".json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
