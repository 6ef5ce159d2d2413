"""Devices and arguments that fused kernels refuse."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
from keras import ops

from keras_laid.ops import AttentionMask
from keras_laid.ops.fused_attention import availability
from tests.ops.kernels import BACKEND
from tests.ops.kernels import KERNEL
from tests.ops.kernels import needs_kernel


@pytest.mark.parametrize(
    ("capability", "fits"),
    [("8.6", False), ("9.0", True), ("12.0", False), ("gfx942", False)],
)
def test_kernels_are_refused_on_chips_without_room(capability, fits):
    reason = availability.why_not_capability(capability)
    assert (reason is None) == fits
    assert fits or capability in reason


@pytest.fixture
def why_not(monkeypatch):
    """A function that tells why a kernel refuses a device and arguments."""

    def ask(
        device="gpu", capability="9.0", dtype="float16", width=64, block=None
    ):
        kind = {"gpu": "cuda"}.get(device, device)
        tensor = SimpleNamespace(
            shape=(1, 4, 2, width),
            dtype=dtype,
            device=SimpleNamespace(type=kind),
        )
        mask = AttentionMask(None, None, None, block=block)
        if BACKEND == "jax":
            import jax

            # JAX computes on the first device, whatever the others are.
            devices = [
                SimpleNamespace(compute_capability=each)
                for each in (capability, "8.0")
            ]
            monkeypatch.setattr(jax, "default_backend", lambda: device)
            monkeypatch.setattr(jax, "devices", lambda: devices)
            refuse = availability.why_not_pallas
        else:
            import torch

            monkeypatch.setattr(
                torch.cuda,
                "get_device_capability",
                lambda _: tuple(map(int, capability.split("."))),
            )
            refuse = availability.why_not_triton
        return refuse([tensor], mask)

    return ask


@needs_kernel
def test_kernels_are_used_on_a_gpu_with_room(why_not):
    assert why_not() is None
    assert why_not(capability="10.0", dtype="bfloat16", width=256) is None
    takes_float32 = why_not(dtype="float32") is None
    assert takes_float32 == (KERNEL == "triton")


@needs_kernel
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"device": "tpu"}, "it runs on .* tpu"),
        ({"capability": "8.6"}, "this one has 8.6"),
        ({"block": 1}, "no blocks"),
        ({"dtype": "float64"}, "some are float64"),
        ({"width": 257}, "one is 257"),
    ],
)
def test_each_reason_alone_is_enough_to_refuse(why_not, what, words):
    assert re.search(words, why_not(**what))


@pytest.mark.skipif(BACKEND != "torch", reason="A kernel for torch.")
def test_triton_is_refused_where_it_is_not_installed(why_not, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in why_not()


def test_kernels_refuse_blocks():
    mask = AttentionMask.from_lengths(5, [5])
    assert availability.why_not_mask(mask) is None
    mask = mask._replace(block=ops.zeros((1, 5), "int32"))
    assert "blocks" in availability.why_not_mask(mask)


def test_kernels_refuse_dtypes_that_they_do_not_take():
    tensors = [ops.zeros((1, 1, 1, 4), each) for each in ("float16", "float32")]
    assert "some are float32" in availability.why_not_tensors(
        tensors, ("float16",)
    )
    assert availability.why_not_tensors(tensors, ("float16", "float32")) is None
