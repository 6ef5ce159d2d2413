"""Compiles the distiller's training step for chips that are not there.

    make compile-for ARGS="--chip v5e --pair 'SmolLM2 135M' --tokens 8192"

Appends a row to `benchmarks/results/compiled_step.csv`: the bytes of arguments
and of temporaries on one chip, the operations that XLA counts (of a loop, one
round), how long it took, and the total of `keras_laid.plan`. A step that does
not fit the chip gets a row without bytes. No weight is made. The TPU compiler
comes with `pip install "jax[tpu]"`.

With all of its optimizations, the TPU compiler takes too long for a large pair.
`--optimization O0`, the default, leaves most of them out: the program is
slower, and its memory is not exactly that of the optimized one.
"""

import argparse
import importlib.metadata

from benchmarks.compile_for.chips import CHIPS
from benchmarks.compile_for.chips import describe

describe()

import jax  # noqa: E402

import keras_laid  # noqa: E402
from benchmarks import rows  # noqa: E402
from benchmarks.compile_for.pairs import PAIRS  # noqa: E402
from benchmarks.compile_for.pairs import image_tokens  # noqa: E402
from benchmarks.compile_for.step import compile_step  # noqa: E402

PATH = rows.RESULTS / "compiled_step.csv"
KEY = ("chip", "pair", "tokens", "optimization")
LEVELS = ("O0", "O1", "O2", "O3")  # As JAX names them.
MEASURED = (
    "argument_bytes",
    "temporary_bytes",
    "operations",
    "bytes_accessed",
    "lower_seconds",
    "compile_seconds",
)


def measure(key):
    """The row of a step."""
    chip, pair = CHIPS[key["chip"]], PAIRS[key["pair"]]
    row = key | dict(
        mesh_shape=chip.mesh_shape,
        plan_bytes=plan(pair, chip.mesh_shape, key["tokens"]).total,
        jax=jax.__version__,
        libtpu=importlib.metadata.version("libtpu"),
        commit=rows.commit(),
        **rows.versions(),
    )
    try:
        step, _, seconds = compile_step(
            pair, key["tokens"], chip.devices(), chip.mesh_shape
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(str(error).split("\n")[0], flush=True)
        return row | dict.fromkeys(MEASURED, "") | dict(fits=False)
    memory, cost = step.memory_analysis(), step.cost_analysis()
    return row | dict(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        operations=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        lower_seconds=round(seconds["lower"], 1),
        compile_seconds=round(seconds["compile"], 1),
        fits=True,
    )


def plan(pair, mesh_shape, tokens):
    of_images = image_tokens(pair, tokens)
    return keras_laid.plan(
        pair.teacher,
        pair.student,
        image_tokens=of_images,
        text_tokens=tokens - of_images,
        batch_size=mesh_shape[0],
        mesh_shape=mesh_shape,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", choices=CHIPS, required=True)
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--optimization", choices=LEVELS, default="O0")
    args = parser.parse_args()
    jax.config.update("jax_optimization_level", args.optimization)
    for tokens in args.tokens:
        key = dict(
            chip=args.chip,
            pair=args.pair,
            tokens=tokens,
            optimization=args.optimization,
        )
        if not rows.is_done(PATH, key, KEY):
            print(f"Compiling {key}", flush=True)
            rows.append_row(PATH, measure(key))


if __name__ == "__main__":
    main()
