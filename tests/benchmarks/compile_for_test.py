"""Training steps compiled for TPUs that are not there."""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="Needs the TPU compiler: `make test-tpu` installs it.",
)
# The TPU compiler's own; none of them leaves the chip.
KNOWN_CALLS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
}


def compiled(chip):
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.compile_small", chip],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_for_a_tpu_has_the_operations_of_a_cpu():
    steps = compiled("v5e")
    tpu, cpu = steps["tpu"], steps["cpu"]
    assert tpu["operations"] == pytest.approx(cpu["operations"], rel=0.01)
    assert {*tpu["custom_calls"]} <= KNOWN_CALLS
    assert not tpu["host_transfers"]


def test_a_step_for_four_tpus_is_split_as_model_parallel_says():
    step = compiled("v5e-4")["tpu"]
    assert step["compiled"] == [spec for _, spec in step["laid_out"]]
    split = {path for path, spec in step["laid_out"] if "model" in spec}
    assert "decoder_block_0/attention/query/kernel" in split
    assert "adam_w/decoder_block_0_attention_query_kernel_momentum" in split
    assert step["collectives"]
    assert not step["host_transfers"]
