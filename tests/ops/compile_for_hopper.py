"""Compiles Triton's kernels for an H100, which need not be present.

`compiled_test.py` runs it in a process of its own, without the interpreter.
Prints the resources that each kernel takes, as JSON.
"""

import functools
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops.attention_divergence.triton import attention_divergence
from keras_laid.ops.attention_output.triton import attention_output
from keras_laid.ops.fused_attention import triton as kernels

BIN = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
LENGTHS = 2**14, 2**14 - 1  # The second makes addresses unaligned.


class Hopper:
    """The parts of a driver that compiling needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class CompiledOnly:
    """A kernel whose launch compiles it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return functools.partial(self.kernel.warmup, grid=grid)


def compile_only(kernel, form, grid, *arguments):
    compiled = kernel.warmup(
        *arguments,
        grid=grid,
        form=form,
        num_warps=form.tiles.warps,
        num_stages=form.tiles.stages,
    )
    takes = {
        "kernel": f"{kernel.fn.__module__}.{kernel.fn.__name__}",
        **form[0]._asdict(),
        "shared_bytes": compiled.metadata.shared,
        **assembled(compiled.asm["ptx"]),
    }
    sys.stdout.write(json.dumps(takes) + "\n")


def assembled(ptx):
    """Resources of a kernel, as the assembler reports them.

    They are a thread's registers, the bytes spilled from them, and the number
    of instructions.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = (
            pathlib.Path(folder) / f"kernel.{n}" for n in ("ptx", "o")
        )
        path.write_text(ptx)
        said = subprocess.run(
            [BIN / "ptxas", "-v", "-arch=sm_90a", path, "-o", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        listing = subprocess.run(
            [BIN / "cuobjdump", "-sass", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "instructions": len(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.M)
        ),
    }


def main():
    driver.set_active(Hopper())
    kernels.launch = compile_only
    kernels.places_kernel = CompiledOnly(kernels.places_kernel)
    shapes = (16, 16, 64), (16, 16, 128), (16, 4, 128), (8, 1, 256)
    for length, (heads, key_heads, width) in itertools.product(LENGTHS, shapes):
        query, key, value = (
            torch.zeros(1, length, count, width, dtype=torch.bfloat16)
            for count in (heads, key_heads, key_heads)
        )
        for tensor in (query, key, value):
            tensor.requires_grad_()
        attention = Attention(query, key, 0.1)
        mask = AttentionMask.from_lengths(length, [length], [length // 2])
        index = torch.arange(length)
        distance = Distance(index[None], index[None], 3.0)
        attention_output(attention, value, mask).sum().backward()
        mixtures = [None]
        if (length, width) == (LENGTHS[0], 64):  # Once: it takes long.
            mixtures.append(
                torch.full((heads, heads), 1 / heads, requires_grad=True)
            )
        for mixture in mixtures:
            attention_divergence(
                attention, attention, mask, distance, mixture
            ).sum().backward()


if __name__ == "__main__":
    main()
