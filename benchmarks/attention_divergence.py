"""Time and peak memory of the attention divergence over length.

    KERAS_BACKEND=jax python -m benchmarks.attention_divergence

Appends rows to `benchmarks/results/attention_divergence.csv`: value and
gradients of student queries and keys, for every implementation that runs here,
beside the platform's own attention, forward and backward, at the same shape.
Each measurement has a process of its own, so that its peak memory is its own.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time

import keras
import numpy as np
from keras import ops

from benchmarks.compare_methods import RESULTS
from benchmarks.compare_methods import commit
from benchmarks.compare_methods import machine
from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops import attention_divergence
from keras_laid.ops.attention_divergence import IMPLEMENTATIONS

PATH = RESULTS.parent / "attention_divergence.csv"
BACKEND = keras.backend.backend()
ATTENTION = "dot_product_attention"  # keras.ops': the platform's own.


def loss(implementation, student_query, student_key, query, key):
    """What is differentiated: a mean, so that gradients have one scale."""
    length = query.shape[1]
    if implementation == ATTENTION:
        return ops.mean(
            ops.dot_product_attention(
                student_query, student_key, key, is_causal=True
            )
        )
    index = ops.arange(length)
    divergence = attention_divergence(
        Attention(student_query, student_key, query.shape[-1] ** -0.5),
        Attention(query, key, query.shape[-1] ** -0.5),
        AttentionMask.from_lengths(length, [length] * query.shape[0]),
        Distance(index[None], index[None], 4.0),
        implementation=implementation,
    )
    return ops.mean(divergence)


def make_inputs(length, heads, head_dim, dtype):
    rng = np.random.default_rng(0)
    shape = (1, length, heads, head_dim)
    return [
        ops.convert_to_tensor(rng.standard_normal(shape).astype("f4"), dtype)
        for _ in range(4)
    ]


def make_step(implementation, inputs):
    """A function of nothing that computes and waits, and its memory if known.

    Returns:
        A tuple `(step, temporary_bytes)`; the latter is `None` where only the
        process can tell.
    """
    if BACKEND == "jax":
        import jax

        gradient = jax.jit(
            jax.value_and_grad(
                lambda *inputs: loss(implementation, *inputs), (0, 1)
            )
        )
        compiled = gradient.lower(*inputs).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return lambda: jax.block_until_ready(compiled(*inputs)), temporary
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def gradient(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs[:2])
                value = loss(implementation, *inputs)
            return value, tape.gradient(value, inputs[:2])

        return lambda: float(gradient(*inputs)[0]), None
    import torch

    trained = [tensor.requires_grad_() for tensor in inputs[:2]]

    def step():
        value = loss(implementation, *trained, *inputs[2:])
        torch.autograd.grad(value, trained)
        return value.item()  # Waits.

    return step, None


def measure(implementation, length, heads, head_dim, dtype, repeats):
    """Median milliseconds of a step, and its peak temporary mebibytes."""
    inputs = make_inputs(length, heads, head_dim, dtype)
    peak_bytes()  # What making them took is past.
    before = peak_bytes()
    step, temporary = make_step(implementation, inputs)
    step()
    if temporary is None:
        temporary = peak_bytes() - before
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "ms": round(float(np.median(times)), 2),
        "peak_mib": round(temporary / 2**20, 1),
    }


def peak_bytes():
    """The most memory in use, on a GPU since the last call."""
    if BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()  # To what is held now.
            return peak
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_apart(implementation, length, args):
    """The same in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.attention_divergence",
            *("--one", implementation),
            *("--lengths", str(length)),
            *("--heads", str(args.heads)),
            *("--head-dim", str(args.head_dim)),
            *("--dtype", args.dtype),
            *("--repeats", str(args.repeats)),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def device():
    if BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    if BACKEND == "jax":
        import jax

        return jax.devices()[0].device_kind
    return "cpu"


def write_row(row):
    new = not PATH.exists()
    with PATH.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row)


def main():
    names = [implementation.name for implementation in IMPLEMENTATIONS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--implementations", nargs="+", default=[*names, ATTENTION]
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192]
    )
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--definition-up-to",
        type=int,
        default=4096,
        help="beyond, its maps do not fit",
    )
    parser.add_argument("--one", help="measure this one here, and print it")
    args = parser.parse_args()
    if args.one:
        print(
            json.dumps(
                measure(
                    args.one,
                    args.lengths[0],
                    args.heads,
                    args.head_dim,
                    args.dtype,
                    args.repeats,
                )
            )
        )
        return
    for length in args.lengths:
        for name in args.implementations:
            if name == "definition" and length > args.definition_up_to:
                continue
            measured = measure_apart(name, length, args)
            write_row(
                {
                    "backend": BACKEND,
                    "implementation": name,
                    "length": length,
                    "heads": args.heads,
                    "head_dim": args.head_dim,
                    "dtype": args.dtype,
                    **measured,
                    "repeats": args.repeats,
                    "keras": keras.__version__,
                    "device": device(),
                    "commit": commit(),
                    "machine": machine(),
                }
            )


if __name__ == "__main__":
    main()
