"""Time and peak memory of the attention divergence over length.

    KERAS_BACKEND=jax python -m benchmarks.attention_divergence

Appends rows to `benchmarks/results/attention_divergence.csv`: value and
gradients of student queries and keys, for every implementation that runs here,
beside the platform's own attention, forward and backward, at the same shape.
Each measurement has a process of its own, so that its peak memory is its own.
Then draws all rows, a picture for each backend and device.
"""

import argparse
import csv
import importlib.metadata
import json
import resource
import subprocess
import sys
import time

import keras
import matplotlib.pyplot as plt
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
REPLAYED = {"triton", ATTENTION} if BACKEND == "torch" else set()


def make_loss(implementation, length):
    """What is differentiated: a mean, so that gradients have one scale."""
    # Whoever trains makes these once for all layers.
    index = ops.arange(length)
    mask = AttentionMask.from_lengths(length, [length])
    distance = Distance(index[None], index[None], 4.0)

    def attention(query, key, value):
        return ops.mean(
            ops.dot_product_attention(query, key, value, is_causal=True)
        )

    def divergence(*inputs):
        scale = inputs[0].shape[-1] ** -0.5
        return ops.mean(
            attention_divergence(
                Attention(*inputs[:2], scale),
                Attention(*inputs[2:], scale),
                mask,
                distance,
                implementation=implementation,
            )
        )

    if implementation == ATTENTION:
        return lambda query, key, value, _: attention(query, key, value)
    return divergence


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
    loss = make_loss(implementation, inputs[0].shape[1])
    if BACKEND == "jax":
        import jax

        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
        compiled = gradient.lower(*inputs).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return lambda: jax.block_until_ready(compiled(*inputs)), temporary
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def gradient(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs[:2])
                value = loss(*inputs)
            return value, tape.gradient(value, inputs[:2])

        return lambda: float(gradient(*inputs)[0]), None
    import torch

    trained = [tensor.requires_grad_() for tensor in inputs[:2]]

    def step():
        value = loss(*trained, *inputs[2:])
        torch.autograd.grad(value, trained)
        wait()

    return step, None


def replayed(step):
    """Runs a step in torch once for a CUDA graph; calls then replay it.

    The time of the GPU alone: without Python, which starts each kernel.
    """
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay


def wait():
    """Until a GPU has computed what torch told it to, but for CUDA graphs."""
    import torch

    if (
        torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
    ):
        torch.cuda.synchronize()


def median_ms(step, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return round(float(np.median(times)), 3)


def measure(implementation, length, heads, head_dim, dtype, repeats):
    """Median milliseconds of a step, and its peak temporary mebibytes.

    The gradients themselves do not count.
    """
    inputs = make_inputs(length, heads, head_dim, dtype)
    peak_bytes()  # What making them took is past.
    before = peak_bytes()
    step, temporary = make_step(implementation, inputs)
    step()
    if temporary is None:
        gradients = (
            2 * np.prod(inputs[0].shape) * (2 if dtype.endswith("16") else 4)
        )
        temporary = peak_bytes() - before - gradients
    row = {"ms": median_ms(step, repeats), "device_ms": None}
    if implementation in REPLAYED and device() != "cpu":
        row["device_ms"] = median_ms(replayed(step), repeats)
    row["peak_mib"] = round(temporary / 2**20, 1)
    return row


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


def read_lines():
    """Rows by platform, shape of heads and implementation."""
    lines = {}
    with PATH.open() as file:
        for row in csv.DictReader(file):
            platform = row["backend"], row["device"]
            shape = int(row["heads"]), int(row["head_dim"])
            of_shape = lines.setdefault(platform, {}).setdefault(shape, {})
            of_shape.setdefault(row["implementation"], []).append(row)
    return lines


def draw():
    """Time and memory over length, a picture for each platform with rows."""
    for (backend, device_name), shapes in read_lines().items():
        figure, axes = plt.subplots(
            2, len(shapes), figsize=(5 * len(shapes), 7), squeeze=False
        )
        for column, (shape, lines) in zip(
            axes.T, sorted(shapes.items()), strict=True
        ):
            for name, rows in lines.items():
                rows = sorted(rows, key=lambda row: int(row["length"]))
                lengths = [int(row["length"]) for row in rows]
                ms = [float(row["device_ms"] or row["ms"]) for row in rows]
                column[0].plot(lengths, ms, marker="o", label=name)
                mib = [float(row["peak_mib"]) for row in rows]
                column[1].plot(lengths, mib, marker="o", label=name)
            column[0].set_title(f"{shape[0]} heads of {shape[1]}")
            column[0].legend()
            column[1].set_xlabel("length in tokens")
            for axis in column:
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel("ms, value and gradients")
        axes[1, 0].set_ylabel("peak temporary MiB")
        figure.suptitle(f"{backend} on {device_name}")
        figure.tight_layout()
        name = "_".join([PATH.stem, backend, *device_name.lower().split()])
        figure.savefig(PATH.with_name(f"{name}.png"), dpi=120)
        plt.close(figure)


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
    parser.add_argument(
        "--draw", action="store_true", help="only draw the rows there are"
    )
    args = parser.parse_args()
    if args.draw:
        draw()
        return
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
                    "backend_version": importlib.metadata.version(BACKEND),
                    "device": device(),
                    "commit": commit(),
                    "machine": machine(),
                }
            )
    draw()


if __name__ == "__main__":
    main()
