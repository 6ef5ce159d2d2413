"""Time and peak memory of the next-token losses, by share of counted tokens.

    KERAS_BACKEND=jax python -m benchmarks.logits_divergence

Appends rows to `benchmarks/results/logits_divergence.csv`. Each row measures
the value and the gradients with respect to the student's hidden states and
kernel, for one implementation, where all tokens count or only one in sixteen.
Each measurement runs in a separate process, so that the peak memory of the
process is that of the measurement.
"""

import argparse
import itertools
import json

import keras
import numpy as np
from keras import ops

from benchmarks import measuring
from benchmarks import rows
from benchmarks.markdown import markdown_table
from keras_laid.ops import Unembedding
from keras_laid.ops import logits_divergence
from keras_laid.ops.logits_divergence import IMPLEMENTATIONS

PATH = rows.RESULTS / "logits_divergence.csv"
BACKEND = keras.backend.backend()


def measure(implementation, counted, args):
    """A measurement in this process."""
    rng = np.random.default_rng(0)

    def random(*shape):
        array = rng.standard_normal(shape).astype("f4") / shape[-2] ** 0.5
        return ops.convert_to_tensor(array, args.dtype)

    shapes = (1, args.tokens, args.width), (args.width, args.vocabulary)
    weights = (np.arange(args.tokens)[None] * counted) % 1 < counted

    def loss(hidden, kernel, teacher_hidden, teacher_kernel, labels, weights):
        losses = logits_divergence(
            Unembedding(hidden, kernel),
            Unembedding(teacher_hidden, teacher_kernel),
            labels if args.labels else None,
            weights,
            implementation=implementation,
        )
        return losses.loss

    return measuring.measure(
        loss,
        [random(*shape) for shape in shapes],
        [
            *[random(*shape) for shape in shapes],
            ops.convert_to_tensor(
                rng.integers(args.vocabulary, size=(1, args.tokens))
            ),
            ops.convert_to_tensor(weights.astype("float32")),
        ],
        args.repeats,
    )


def table():
    """Chunked against the definition."""
    lines = []
    counted = {"1.0": "all tokens count", "0.0625": "one in 16"}
    for backend, share in itertools.product(("torch", "jax"), counted):
        chunked, plain = (
            rows.only(
                "logits_divergence",
                backend=backend,
                counted=share,
                implementation=name,
            )
            for name in ("chunked", "definition")
        )
        memory = [f"{float(row['peak_mib']):,.0f}" for row in (chunked, plain)]
        lines.append(
            [
                f"{rows.BACKENDS[backend]}, {counted[share]}",
                f"{rows.ratio('ms', chunked, plain):.2f}",
                " against ".join(memory),
            ]
        )
    header = ["", "time, chunked over definition", "peak memory, MiB"]
    return markdown_table(header, lines)


TABLES = {"logits_divergence": table}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=[implementation.name for implementation in IMPLEMENTATIONS],
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--counted", nargs="+", type=float, default=[1.0, 0.0625]
    )
    parser.add_argument("--labels", type=int, default=0, choices=(0, 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help="measure only this, print it")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.counted[0], args)))
        return
    for counted in args.counted:
        for name in args.implementations:
            settings = {
                "tokens": args.tokens,
                "width": args.width,
                "vocabulary": args.vocabulary,
                "dtype": args.dtype,
                "counted": counted,
                "labels": args.labels,
                "repeats": args.repeats,
            }
            flags = [
                part
                for key, value in settings.items()
                for part in (f"--{key}", value)
            ]
            row = {
                "backend": BACKEND,
                "implementation": name,
                **settings,
                **measuring.in_new_process(
                    "benchmarks.logits_divergence", ["--one", name, *flags]
                ),
                **measuring.provenance(),
            }
            rows.append_row(PATH, row)
            print(row)


if __name__ == "__main__":
    main()
