"""Attention in linear memory, against an oracle in float64."""

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import ops

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import attention_output
from keras_laid.ops import row_blocks
from keras_laid.ops.attention import log_attention
from keras_laid.ops.fused_attention import tiles
from tests.ops import kernels
from tests.ops.kernels import FUSED
from tests.ops.kernels import IMPLEMENTATION
from tests.ops.kernels import KERNEL
from tests.ops.kernels import is_interpretable
from tests.support import assert_as_good_as
from tests.support import has_gpu
from tests.support import to_numpy
from tests.support import value_and_grads

pytestmark = pytest.mark.usefixtures("small_tiles")
NAMES = ("output", "query", "key", "value")
KERNELS = ("pallas", "triton")
CHOOSE_TILES = tiles.choose_tiles


class Case:
    """Random arguments as NumPy arrays; a third of the keys is padding."""

    def __init__(
        self,
        rows=13,
        keys=19,
        heads=(4, 2),
        widths=(6, 3),
        dtype="float32",
        soft_cap=2.0,
        window=None,
        blocks=False,
        prefix=None,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.arrays = []
        width, value_width = widths
        for shape in (
            (rows, heads[0], width),
            (keys, heads[1], width),
            (keys, heads[1], value_width),
        ):
            array = rng.standard_normal((2, *shape)).astype("float32")
            tensor = ops.convert_to_tensor(array, dtype)
            self.arrays.append(to_numpy(tensor))  # Rounded to the dtype.
        upstream = rng.standard_normal((2, rows, heads[0], value_width))
        self.upstream = upstream.astype("float32")
        kind = rng.integers(0, 3, (2, keys))
        if prefix is not None:  # A prompt with its response.
            kind[:] = np.where(np.arange(keys) < prefix, 1, 2)
            kind[1, keys - 3 :] = 0
        self.bidirectional, self.causal = kind == 1, kind == 2
        self.row_index = np.sort(rng.permutation(keys)[:rows])
        self.soft_cap, self.window = soft_cap, window
        self.block = None
        if blocks:  # Blocks of up to five keys; 0 is no block.
            self.block = np.tile(np.arange(keys) // 5, (2, 1))

    def run(self, implementation, query, key, value):
        mask = AttentionMask(
            ops.convert_to_tensor(self.bidirectional),
            ops.convert_to_tensor(self.causal),
            ops.convert_to_tensor(self.row_index),
            self.window,
            None if self.block is None else ops.convert_to_tensor(self.block),
        )
        attention = Attention(query, key, 0.7, self.soft_cap)
        if implementation == "rounded":
            return output_of_rounded_maps(attention, value, mask)
        return kernels.run(
            attention_output, implementation, attention, value, mask
        )

    def tensors(self):
        return [ops.convert_to_tensor(a, self.dtype) for a in self.arrays]

    def output_and_grads(self, implementation):
        def loss(*tensors):
            output = self.run(implementation, *tensors)
            upstream = ops.convert_to_tensor(self.upstream)
            return ops.sum(ops.cast(output, "float32") * upstream)

        _, gradients = value_and_grads(loss, *self.tensors())
        return self.run(implementation, *self.tensors()), *gradients

    def allows(self, example, row, key):
        at = self.row_index[row]
        causal = self.causal[example, key]
        allowed = self.bidirectional[example, key] or (causal and at >= key)
        if self.block is not None and causal:
            block = self.block[example]
            allowed = allowed or (block[key] > 0 and block[key] == block[at])
        return allowed and (self.window is None or abs(at - key) < self.window)


def output_of_rounded_maps(attention, value, mask):
    """Like KerasHub's layers, rounds attention maps to the dtype of values."""
    allowed = mask.allowed()
    p = ops.where(allowed, ops.exp(log_attention(attention, allowed)), 0.0)
    value_of_each_head = attention.repeat_heads(value)
    return ops.einsum(
        "bhij,bjhd->bihd",
        ops.cast(p, value.dtype),
        ops.cast(value_of_each_head, value.dtype),
    )


def oracle(case, arrays=None):
    """The output and all gradients, row by row, in NumPy float64."""
    query, key, value = (
        np.asarray(a, "float64") for a in (arrays or case.arrays)
    )
    output = np.zeros(case.upstream.shape)
    query_gradient, key_gradient, value_gradient = (
        np.zeros_like(a) for a in (query, key, value)
    )
    for b, i, h in np.ndindex(*output.shape[:3]):
        seen = [j for j in range(key.shape[1]) if case.allows(b, i, j)]
        if not seen:
            continue
        g = h // (query.shape[2] // key.shape[2])
        q, k, v = query[b, i, h], key[b, seen, g], value[b, seen, g]
        logits, slope = 0.7 * k @ q, 0.7
        if case.soft_cap:
            slope = 0.7 / np.cosh(logits / case.soft_cap) ** 2
            logits = case.soft_cap * np.tanh(logits / case.soft_cap)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        output[b, i, h] = p @ v
        up = case.upstream[b, i, h]
        logits_gradient = slope * p * (v @ up - output[b, i, h] @ up)
        query_gradient[b, i, h] = logits_gradient @ k
        key_gradient[b, seen, g] += np.outer(logits_gradient, q)
        value_gradient[b, seen, g] += np.outer(p, up)
    return output, query_gradient, key_gradient, value_gradient


def test_oracles_gradients_are_slopes_of_its_values():
    case = Case()
    _, *gradients = oracle(case)
    rng = np.random.default_rng(1)
    for which, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [a.astype("float64") for a in case.arrays]
            moved[which] += step * direction
            ends.append((oracle(case, moved)[0] * case.upstream).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(
            (gradient * direction).sum(), slope, rtol=1e-6
        )


KINDS = pytest.mark.parametrize(
    "kind",
    [
        dict(),
        dict(rows=1, keys=1, heads=(1, 1)),
        dict(rows=5, heads=(3, 1), soft_cap=None),
        dict(window=4),
        dict(blocks=True, keys=31, rows=31),
    ],
    ids=["odd", "one", "one_block", "window", "blocks"],
)


@KINDS
@IMPLEMENTATION
def test_is_the_oracles_in_float32(implementation, kind):
    if "blocks" in kind and implementation in KERNELS:
        pytest.skip("Kernels do not support blocks.")
    case = Case(**kind)
    found = case.output_and_grads(implementation)
    for name, one, other in zip(NAMES, found, oracle(case), strict=True):
        np.testing.assert_allclose(
            to_numpy(one), other, 1e-4, 1e-5, err_msg=name
        )


def assert_is_as_good(implementation, case):
    """Allows twice the error of the plain form in the same dtype.

    Kernels round attention maps, and so does their plain form.
    """
    plain = "rounded" if implementation in KERNELS else "definition"
    plain = case.output_and_grads(plain)
    found = case.output_and_grads(implementation)
    for name, *arrays in zip(NAMES, found, plain, oracle(case), strict=True):
        assert_as_good_as(*arrays, name=name, terms=1.0)


FAST = pytest.mark.parametrize("implementation", [*FUSED, "chunked"])


@FAST
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_is_as_good_as_the_definition(implementation, dtype):
    if not is_interpretable(implementation, dtype):
        pytest.skip("Triton's interpreter lacks bfloat16: run it on a GPU.")
    assert_is_as_good(implementation, Case(dtype=dtype))


@IMPLEMENTATION
def test_rows_without_keys_put_out_zeros(implementation):
    case = Case()
    case.bidirectional[0] = case.causal[0] = False
    for found in case.output_and_grads(implementation):
        found = to_numpy(found)
        assert (found[0] == 0).all()
        assert np.isfinite(found).all() and (found[1] != 0).any()


@FAST
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_that_are_whole_are_as_good(implementation, window):
    # Kernels skip the mask in tiles where every row attends every key.
    case = Case(61, 70, (2, 1), window=window, prefix=20)
    assert_is_as_good(implementation, case)


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("rows", "keys", "by_key", "in_registers"),
    [(16, 32, True, False), (32, 16, False, True)],
)
def test_tiles_of_any_form_are_as_good(
    monkeypatch, implementation, dtype, rows, keys, by_key, in_registers
):
    def choose(kernel, *_, **__):
        form = by_key and kernel == "key_value", in_registers
        return tiles.Tiles(rows, keys, 4, 1, *form)

    monkeypatch.setattr(tiles, "choose_tiles", choose)
    assert_is_as_good(implementation, Case(43, 50, (2, 1), dtype=dtype))


@pytest.mark.parametrize("implementation", FUSED)
def test_tiles_are_chosen_by_rows_or_keys_of_all_heads(
    implementation, chosen_by
):
    case = Case(rows=7, keys=19, heads=(4, 2), widths=(8, 4))
    case.output_and_grads(implementation)
    # The wider head dim, and examples times rows or keys times heads.
    rows, keys = (8, 2 * 7 * 4), (8, 2 * 19 * 2)
    assert chosen_by == {"forward": rows, "query": rows, "key_value": keys}


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="Needs JAX or torch on a GPU.")
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_that_fill_a_gpu(monkeypatch, dtype, width, window):
    if (KERNEL, dtype) == ("pallas", "float32"):
        pytest.skip("Pallas takes queries and keys of 16 bits.")
    monkeypatch.setattr(tiles, "choose_tiles", CHOOSE_TILES)
    case = Case(
        203, 331, (4, 2), (width, width), dtype, soft_cap=20.0, window=window
    )
    # Logits of the size that trained models have.
    for which in (0, 1):
        array = case.arrays[which] / width**0.25
        tensor = ops.convert_to_tensor(array, dtype)
        case.arrays[which] = to_numpy(tensor)
    assert_is_as_good(KERNEL, case)


@strategies.composite
def cases(draw):
    keys = draw(strategies.integers(1, 40))
    return Case(
        rows=draw(strategies.integers(1, keys)),
        keys=keys,
        heads=draw(strategies.sampled_from([(1, 1), (4, 2), (3, 1)])),
        widths=draw(strategies.sampled_from([(6, 3), (3, 6), (16, 17)])),
        dtype=draw(strategies.sampled_from(["float32", "float16", "bfloat16"])),
        soft_cap=draw(strategies.sampled_from([None, 0.5])),
        window=draw(strategies.sampled_from([None, 1, 6])),
        blocks=draw(strategies.booleans()),
        seed=draw(strategies.integers(0, 99)),
    )


@FAST
@hypothesis.given(case=cases())
def test_is_as_good_on_any_case(implementation, case):
    hypothesis.assume(is_interpretable(implementation, case.dtype))
    if implementation in KERNELS:
        case.block = None
    assert_is_as_good(implementation, case)


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Only JAX reports a compiled program's memory.",
)
def test_memory_is_linear_in_length(monkeypatch):
    import jax

    monkeypatch.setattr(row_blocks, "ROWS", 128)

    def temporary_bytes(length, implementation):
        def loss(query, key, value):
            mask = AttentionMask.from_lengths(length, [length])
            attention = Attention(query, key, 0.1)
            return ops.sum(
                attention_output(attention, value, mask, implementation)
            )

        shape = jax.ShapeDtypeStruct((1, length, 2, 16), "float32")
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = gradient.lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = (temporary_bytes(n, "chunked") for n in (2048, 8192))
    assert long < 4.5 * short
    assert short < 0.25 * temporary_bytes(2048, "definition")


@pytest.mark.skipif(has_gpu(), reason="A kernel can run on this GPU.")
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_are_refused_where_they_cannot_run(implementation):
    query, key, value = Case().tensors()
    mask = AttentionMask.from_lengths(19, [19, 19], row_index=ops.arange(13))
    with pytest.raises(NotImplementedError, match="it (needs|runs on)"):
        attention_output(
            Attention(query, key, 1.0), value, mask, implementation
        )
