"""Compiles kernels that `lower_pallas.py` wrote, for an H100.

Prints the resources that each kernel takes, as JSON.
"""

import json
import pathlib
import sys

import triton
from triton.backends.compiler import GPUTarget

from tests.ops.compile_for_hopper import assembled


def main(folder):
    for path in sorted(folder.glob("*.ttir")):
        settings = json.loads(path.with_suffix(".json").read_text())
        compiled = triton.compile(
            str(path),
            target=GPUTarget("cuda", 90, 32),
            options={n: settings[n] for n in ("num_warps", "num_stages")},
        )
        takes = settings | {
            "shared_bytes": compiled.metadata.shared,
            **assembled(compiled.asm["ptx"]),
        }
        sys.stdout.write(json.dumps(takes) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
