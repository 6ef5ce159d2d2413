"""Run by `compile_for_test.py` in a process that describes TPUs to JAX."""

import json
import re
import sys

from benchmarks.compile_for.chips import CHIPS
from benchmarks.compile_for.chips import describe

describe()

import jax  # noqa: E402

from benchmarks.compile_for.pairs import PAIRS  # noqa: E402
from benchmarks.compile_for.step import compile_step  # noqa: E402

jax.config.update("jax_optimization_level", "O0")


def describe_step(devices, mesh_shape):
    compiled = compile_step(PAIRS["small"], 192, devices, mesh_shape)
    program = compiled.step.as_text()
    (state, _), _ = compiled.step.input_shardings
    return dict(
        operations=compiled.step.cost_analysis()["flops"],
        custom_calls=sorted(
            {*re.findall(r'custom_call_target="(\w+)"', program)}
        ),
        host_transfers=re.findall(
            r" (infeed|outfeed|send|recv)\(|S\(5\)", program
        ),
        collectives=sorted(
            {*re.findall(r" (all-reduce|all-gather)(?:-start)?\(", program)}
        ),
        laid_out=[
            (path, [str(axis) for axis in layout.spec])
            for path, layout in compiled.layouts
        ],
        compiled=[
            [str(axis) for axis in layout.spec]
            for group in state
            for layout in group
        ],
        argument_bytes=compiled.step.memory_analysis().argument_size_in_bytes,
    )


if __name__ == "__main__":
    chip = CHIPS[sys.argv[1]]
    steps = {"tpu": describe_step(chip.devices(), chip.mesh_shape)}
    if chip.mesh_shape == (1, 1):
        steps["cpu"] = describe_step(jax.devices()[:1], (1, 1))
    sys.stdout.write(json.dumps(steps))
