"""Time and peak memory of the attention divergence over length.

    KERAS_BACKEND=jax python -m benchmarks.attention_divergence

Appends rows to `benchmarks/results/attention_divergence.csv`. They measure the
value and the gradients with respect to the student's queries and keys, for
every implementation that runs here. For comparison, the platform's own
attention is measured at the same shape, forward and backward. An implementation
of `keras_laid.ops.attention_output` is measured only if `--implementations`
names it, as in `attention_output/triton`. On a CPU each measurement runs in a
separate process, so that the peak memory of the process is that of the
measurement. At the end all rows are drawn, in one picture for each backend and
device.
"""

import argparse
import json

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import ops

from benchmarks import measuring
from benchmarks import rows
from benchmarks.markdown import markdown_table
from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops import attention_divergence
from keras_laid.ops import attention_output
from keras_laid.ops.attention_divergence import IMPLEMENTATIONS

PATH = rows.RESULTS / "attention_divergence.csv"
BACKEND = keras.backend.backend()
ATTENTION = "dot_product_attention"  # Of `keras.ops`: the platform's own.
OUTPUT = "attention_output/"  # Prefix of an implementation's name.
REPLAYED = {"triton", f"{OUTPUT}triton", ATTENTION}


def make_loss(implementation, length):
    """The function to differentiate: a mean, for gradients of one scale."""
    # Made outside of the loss: training makes these once for all layers.
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

    def output(query, key, value, _):
        attention = Attention(query, key, query.shape[-1] ** -0.5)
        name = implementation.removeprefix(OUTPUT)
        return ops.mean(attention_output(attention, value, mask, name))

    if implementation == ATTENTION:
        return lambda query, key, value, _: attention(query, key, value)
    if implementation.startswith(OUTPUT):
        return output
    return divergence


def make_inputs(length, heads, head_dim, dtype):
    rng = np.random.default_rng(0)
    shape = (1, length, heads, head_dim)
    return [
        ops.convert_to_tensor(rng.standard_normal(shape, "float32"), dtype)
        for _ in range(4)
    ]


def measure(implementation, length, args):
    """A measurement in this process."""
    inputs = make_inputs(length, args.heads, args.head_dim, args.dtype)
    return measuring.measure(
        make_loss(implementation, length),
        inputs[:2],
        inputs[2:],
        args.repeats,
        replay=BACKEND == "torch" and implementation in REPLAYED,
    )


def measure_apart(implementation, length, args):
    """A measurement in a new process, whose peak memory is that of this one."""
    return measuring.in_new_process(
        "benchmarks.attention_divergence",
        [
            *("--one", implementation),
            *("--lengths", length),
            *("--heads", args.heads),
            *("--head-dim", args.head_dim),
            *("--dtype", args.dtype),
            *("--repeats", args.repeats),
        ],
    )


def read_lines():
    """Rows by platform, shape of heads and implementation."""
    lines = {}
    for row in rows.read_rows(PATH):
        platform = row["backend"], row["device"]
        shape = int(row["heads"]), int(row["head_dim"])
        by_implementation = lines.setdefault(platform, {}).setdefault(shape, {})
        by_implementation.setdefault(row["implementation"], []).append(row)
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
            for name, line in lines.items():
                line = sorted(line, key=lambda row: int(row["length"]))
                lengths = [int(row["length"]) for row in line]
                ms = [float(row["device_ms"] or row["ms"]) for row in line]
                column[0].plot(lengths, ms, marker="o", label=name)
                mib = [float(row["peak_mib"]) for row in line]
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


TIMES = ("ms", "device_ms")  # Called from Python, and only of the GPU.


def attention_divergence_cpu():
    """Chunked against the definition, 4 heads of 64."""

    def row(backend, name, length):
        return rows.only(
            "attention_divergence",
            backend=backend,
            implementation=name,
            length=length,
            head_dim=64,
        )

    lines = []
    for backend, label in rows.BACKENDS.items():
        chunked = {n: row(backend, "chunked", n) for n in (2048, 4096, 8192)}
        plain = {n: row(backend, "definition", n) for n in (2048, 4096)}
        ratios = (
            rows.ratio("ms", chunked[2048], plain[2048]),
            rows.ratio("peak_mib", chunked[4096], plain[4096]),
            rows.ratio("peak_mib", chunked[8192], chunked[2048]),
        )
        compiled = ", compiled" if backend == "tensorflow" else ""
        time, memory, growth = ratios
        lines.append(
            [label + compiled, f"{time:.2f}", f"{memory:.2f}", f"{growth:.1f}"]
        )
    header = [
        "",
        "time at 2,048",
        "memory at 4,096",
        "growth of memory, 2,048 to 8,192",
    ]
    return markdown_table(header, lines)


def gpu_rows(implementation, backend="torch"):
    """Yields the first cells of a table's line, and its row of a GPU."""
    for heads, head_dim in ((16, 128), (8, 256)):
        found = rows.read(
            "attention_divergence",
            backend=backend,
            implementation=implementation,
            heads=heads,
            head_dim=head_dim,
            dtype="bfloat16",
        )
        label = f"{heads} heads of {head_dim}"
        for row in sorted(found, key=lambda row: int(row["length"])):
            yield [label, f"{int(row['length']):,}"], row
            label = ""


def beside(row, implementation):
    """The row of PyTorch for the same shape."""
    names = ("length", "heads", "head_dim", "dtype")
    return rows.only(
        "attention_divergence",
        backend="torch",
        implementation=implementation,
        **{name: row[name] for name in names},
    )


def attention_divergence_gpu():
    """The Triton kernels against torch's flash attention."""
    lines = []
    for start, row in gpu_rows("triton"):
        attention = beside(row, "dot_product_attention")
        cells = [milliseconds(each, "device_ms") for each in (row, attention)]
        over_attention = f"{rows.ratio('device_ms', row, attention):.2f}"
        memory = f"{float(row['peak_mib']):.1f} MiB"
        lines.append([*start, *cells, over_attention, memory])
    header = ["", "length", "Triton", "attention", "ratio"]
    return markdown_table([*header, "memory beyond gradients"], lines)


def attention_divergence_pallas():
    """The Pallas kernels against those of Triton."""
    lines = []
    for start, row in gpu_rows("pallas", "jax"):
        triton = beside(row, "triton")
        cells = [milliseconds(each, "ms") for each in (row, triton)]
        ratios = (float(row["ms"]) / float(triton[n]) for n in TIMES)
        lines.append([*start, *cells, *(f"{each:.2f}" for each in ratios)])
    header = ["", "length", "Pallas", "Triton", "ratio"]
    return markdown_table([*header, "over Triton's time of the GPU"], lines)


def attention_output_gpu():
    """The kernels of `attention_output` against flash attention."""
    pallas = {
        (row["heads"], row["length"]): milliseconds(row, "ms")
        for _, row in gpu_rows("attention_output/pallas", "jax")
    }
    lines = []
    for start, row in gpu_rows("attention_output/triton"):
        attention = beside(row, "dot_product_attention")
        cells = [milliseconds(each, "ms") for each in (attention, row)]
        key = row["heads"], row["length"]
        lines.append([*start, *cells, pallas.get(key, "")])
    header = ["", "length", "flash attention", "Triton", "Pallas"]
    return markdown_table(header, lines)


def milliseconds(row, column):
    """Formats milliseconds with three digits or more."""
    value = float(row[column])
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f} ms"


TABLES = {
    "attention_divergence_cpu": attention_divergence_cpu,
    "attention_divergence_gpu": attention_divergence_gpu,
    "attention_divergence_pallas": attention_divergence_pallas,
    "attention_output_gpu": attention_output_gpu,
}


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
        help="longer maps do not fit in memory",
    )
    parser.add_argument("--one", help="measure only this, print it")
    parser.add_argument(
        "--missing", action="store_true", help="skip rows of this commit"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw the existing rows"
    )
    args = parser.parse_args()
    if args.draw:
        draw()
        return
    if args.one:
        print(json.dumps(measure(args.one, args.lengths[0], args)))
        return
    on_cpu = measuring.device() == "cpu"
    measure_one = measure_apart if on_cpu else measure
    for length in args.lengths:
        for name in args.implementations:
            if name == "definition" and length > args.definition_up_to:
                continue
            row = {
                "backend": BACKEND,
                "implementation": name,
                "length": length,
                "heads": args.heads,
                "head_dim": args.head_dim,
                "dtype": args.dtype,
            }
            names = [*row, "device", "commit"]
            provenance = measuring.provenance()
            if args.missing and rows.is_done(PATH, row | provenance, names):
                continue
            row |= measure_one(name, length, args)
            row |= {"repeats": args.repeats, **provenance}
            rows.append_row(PATH, row)
            print(row)
    draw()


if __name__ == "__main__":
    main()
