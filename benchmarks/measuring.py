"""Time and peak memory of a value and its gradients, on any backend."""

import importlib.metadata
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import keras
import numpy as np
from tqdm import tqdm

from benchmarks import rows

BACKEND = keras.backend.backend()
# GPU memory that JAX preallocates would not be available to other processes.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Prepared(keras.utils.PyDataset):
    """Batches made beforehand, which no pipeline can beat."""

    def __init__(self, data):
        super().__init__()
        self.batches = [data[i] for i in range(len(data))]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def ms_by_feeder(fit, feeders, steps, epochs):
    """Median milliseconds of a training step, by what feeds it.

    Feeders take turns, with one epoch each.

    Args:
        fit: Function of data that trains for an epoch.
        feeders: Dictionary from names to data.
        steps: Integer, the steps of an epoch.
        epochs: Integer, how many epochs of each are measured.
    """
    times = {name: [] for name in feeders}
    for epoch in tqdm(range(epochs + 1), desc="epochs of each feeder"):
        for name, data in feeders.items():
            started = time.perf_counter()
            fit(data)
            if epoch:  # The first epoch includes compilation.
                took = time.perf_counter() - started
                times[name].append(1e3 * took / steps)
    return {name: float(np.median(each)) for name, each in times.items()}


def make_step(loss, trained, others):
    """A function without arguments that computes and waits, and its memory.

    Args:
        loss: Function of `(*trained, *others)` that returns a scalar.
        trained: List of tensors that gradients are computed for.
        others: List of tensors, the further arguments of `loss`.

    Returns:
        A tuple `(step, temporary_bytes)`; the latter is `None` where memory can
        only be measured while the step runs.
    """
    count = len(trained)
    if BACKEND == "jax":
        import jax

        gradient = jax.jit(jax.value_and_grad(loss, tuple(range(count))))
        compiled = gradient.lower(*trained, *others).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return (
            lambda: jax.block_until_ready(compiled(*trained, *others)),
            temporary,
        )
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def gradient(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs[:count])
                value = loss(*inputs)
            return value, tape.gradient(value, inputs[:count])

        return lambda: float(gradient(*trained, *others)[0]), None
    import torch

    trained = [tensor.requires_grad_() for tensor in trained]

    def step():
        value = loss(*trained, *others)
        torch.autograd.grad(value, trained)
        wait()

    return step, None


def replayed(step):
    """Records a step of torch as a CUDA graph; returns a function to replay it.

    A replay takes only the time of the GPU, without that of Python, which
    otherwise starts each kernel.
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
    """Waits for torch on a GPU, except while a CUDA graph is recorded."""
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


def measure(loss, trained, others, repeats, replay=False):
    """Median milliseconds of a step, and its peak temporary mebibytes.

    The memory of the gradients themselves does not count.
    """
    before = held_bytes()
    step, temporary = make_step(loss, trained, others)
    step()
    if temporary is None:
        gradients = sum(
            math.prod(tensor.shape) * (2 if "16" in str(tensor.dtype) else 4)
            for tensor in trained
        )
        temporary = peak_bytes() - before - gradients
    row = {"ms": median_ms(step, repeats), "device_ms": None}
    if replay and device() != "cpu":
        row["device_ms"] = median_ms(replayed(step), repeats)
    row["peak_mib"] = round(temporary / 2**20, 1)
    return row


def held_bytes():
    """Returns the memory in use, a GPU's or the process's, and resets its peak.

    JAX on a GPU cannot reset it: there the peak is that of the whole process.
    """
    if BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
    if BACKEND == "jax":
        import jax

        if statistics := jax.devices()[0].memory_stats():
            return statistics["bytes_in_use"]
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes():
    """The most memory in use since `held_bytes`."""
    if BACKEND == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    if BACKEND == "jax":
        import jax

        if statistics := jax.devices()[0].memory_stats():  # Of a GPU.
            return statistics["peak_bytes_in_use"]
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def in_new_process(module, arguments):
    """Runs `python -m module`; returns the JSON in its last line of output.

    Each measurement runs in a separate process, so that the peak memory of the
    process is that of the measurement.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
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


def provenance():
    """Columns of a row: versions, device, commit and machine."""
    return {
        "keras": keras.__version__,
        "backend_version": importlib.metadata.version(BACKEND),
        "device": device(),
        "commit": rows.commit(),
        "machine": rows.machine(),
    }
