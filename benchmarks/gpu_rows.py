"""Makes the rows that need a GPU, the most important ones first.

    python -m benchmarks.gpu_rows

Each entry of `ROWS` is a separate command. If one fails, the others still run.
Rows that this commit already has are not measured again.
"""

import os
import subprocess
import sys

DIVERGENCE = ("attention_divergence", "--dtype bfloat16 --repeats 10")
STEP = (
    "training_step",
    "--dtype bfloat16 --width 2048 --layers 18 --rematerialize --rounds 1",
)
HEADS_8 = "--heads 8 --head-dim 256"
HEADS_16 = "--heads 16 --head-dim 128"
BESIDE_ATTENTION = "--implementations triton dot_product_attention"
DEFINITION = "--implementations definition --definition-up-to 8192"
BOTH = "--methods keras_laid without_attention --tokens 8192"
OURS = "--methods keras_laid --tokens 32768"

# Backend, benchmark with its shared options, and further options.
ROWS = (
    (
        "torch",
        DIVERGENCE,
        HEADS_8,
        "--lengths 32768 8192 65536 2048",
        BESIDE_ATTENTION,
    ),
    (
        "torch",
        DIVERGENCE,
        HEADS_16,
        "--lengths 65536 32768 8192 2048",
        BESIDE_ATTENTION,
    ),
    ("torch", DIVERGENCE, HEADS_8, "--lengths 8192", DEFINITION),
    ("torch", DIVERGENCE, HEADS_16, "--lengths 8192", DEFINITION),
    (
        "jax",
        DIVERGENCE,
        HEADS_8,
        "--lengths 32768 8192",
        "--implementations pallas",
    ),
    (
        "jax",
        DIVERGENCE,
        HEADS_16,
        "--lengths 32768 8192",
        "--implementations pallas",
    ),
    (
        "torch",
        DIVERGENCE,
        HEADS_8,
        "--lengths 32768",
        "--implementations attention_output/triton",
    ),
    (
        "torch",
        DIVERGENCE,
        HEADS_16,
        "--lengths 32768",
        "--implementations attention_output/triton",
    ),
    (
        "jax",
        DIVERGENCE,
        HEADS_8,
        "--lengths 32768",
        "--implementations attention_output/pallas",
    ),
    (
        "jax",
        DIVERGENCE,
        HEADS_8,
        "--lengths 32768 8192",
        "--implementations dot_product_attention",
    ),
    (
        "jax",
        DIVERGENCE,
        HEADS_16,
        "--lengths 32768 8192",
        "--implementations dot_product_attention",
    ),
    ("jax", STEP, BOTH, "--linear_memory pallas"),
    ("torch", STEP, BOTH, "--linear_memory triton"),
    ("jax", STEP, OURS, "--linear_memory pallas"),
    ("torch", STEP, OURS, "--linear_memory triton"),
)


def command_of(benchmark, shared, *options):
    """The command of an entry of `ROWS`, without its backend."""
    words = " ".join(["--missing", shared, *options]).split()
    return [sys.executable, "-m", f"benchmarks.{benchmark}", *words]


def main():
    failed = []
    for number, (backend, (benchmark, shared), *options) in enumerate(ROWS, 1):
        command = command_of(benchmark, shared, *options)
        print(f"{number} of {len(ROWS)}, {backend}: {command[2:]}", flush=True)
        environment = os.environ | {"KERAS_BACKEND": backend}
        if subprocess.run(command, env=environment).returncode:
            failed.append(number)
    if failed:
        sys.exit(f"These rows failed: {failed} of {len(ROWS)}.")


if __name__ == "__main__":
    main()
