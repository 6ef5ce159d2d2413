"""One suite, run against every implementation, with an oracle in float64."""

import argparse
import math
from types import SimpleNamespace
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from keras import ops

from benchmarks import attention_divergence as benchmark
from benchmarks import measuring
from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops import attention_divergence
from keras_laid.ops import row_blocks
from keras_laid.ops.fused_attention import tiles
from tests.ops import kernels
from tests.ops.kernels import BACKEND
from tests.ops.kernels import FUSED
from tests.ops.kernels import IMPLEMENTATION
from tests.ops.kernels import KERNEL
from tests.ops.kernels import is_interpretable
from tests.ops.kernels import needs_jax
from tests.ops.kernels import needs_triton
from tests.support import assert_as_good_as
from tests.support import has_gpu
from tests.support import to_numpy
from tests.support import value_and_grads

pytestmark = pytest.mark.usefixtures("small_tiles")
NAMES = ("student_query", "student_key", "mixture")
CHOOSE_TILES = tiles.choose_tiles


def run(implementation, *arguments):
    return kernels.run(attention_divergence, implementation, *arguments)


class Shape(NamedTuple):
    rows: int
    keys: int
    student: tuple  # Query heads, key heads, head dim.
    teacher: tuple


SHAPES = {
    "one": Shape(1, 1, (1, 1, 4), (1, 1, 4)),
    "odd": Shape(7, 19, (2, 1, 8), (4, 2, 6)),
    "blocks": Shape(23, 41, (3, 3, 4), (2, 1, 12)),
}


class Case:
    """Random arguments as NumPy arrays, turned into the op's on call."""

    def __init__(
        self,
        shape,
        seed=0,
        dtype="float32",
        mixed=True,
        window=None,
        exponent=1.5,
        soft_caps=(2.0, None),
        blocks=False,
        prefix=None,
        strength=3.0,
    ):
        shape = SHAPES.get(shape, shape)
        rows, keys = shape.rows, shape.keys
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.arrays = []
        for heads, key_heads, width in (shape.student, shape.teacher):
            for size in ((rows, heads, width), (keys, key_heads, width)):
                array = rng.standard_normal((2, *size)).astype("float32")
                tensor = ops.convert_to_tensor(array, dtype)
                self.arrays.append(to_numpy(tensor))  # Rounded to the dtype.
        heads = shape.student[0], shape.teacher[0]
        mixture = rng.random(heads) + 0.1
        mixture = mixture / mixture.sum(axis=1, keepdims=True)
        self.mixture = mixture.astype("float32") if mixed else None
        kind = rng.integers(0, 3, size=(2, keys))  # 0 is padding
        if prefix is not None:  # A prompt with its response.
            kind[:] = np.where(np.arange(keys) < prefix, 1, 2)
            kind[1, keys - 3 :] = 0
        self.bidirectional, self.causal = kind == 1, kind == 2
        self.row_index = np.arange(keys - rows, keys)
        self.positions = np.sort(rng.integers(0, 99, (2, keys)))
        self.row_positions = self.positions[:, keys - rows :]
        self.row_weight = rng.random((2, heads[0], rows)).astype("float32")
        self.strength, self.exponent = strength, exponent
        self.soft_caps = soft_caps
        self.window = window
        self.block = None
        if blocks:  # Blocks of up to five keys; 0 is no block.
            self.block = np.tile(np.arange(keys) // 5, (2, 1))

    def tensors(self):
        """Student queries and keys, and the mixture if there is one."""
        tensors = [
            ops.convert_to_tensor(array, self.dtype)
            for array in self.arrays[:2]
        ]
        if self.mixture is not None:
            tensors.append(ops.convert_to_tensor(self.mixture))
        return tensors

    def run(self, implementation, query, key, mixture=None):
        teacher = [
            ops.convert_to_tensor(array, query.dtype)
            for array in self.arrays[2:]
        ]
        return run(
            implementation,
            Attention(query, key, 0.7, self.soft_caps[0]),
            Attention(*teacher, 0.9, self.soft_caps[1]),
            AttentionMask(
                ops.convert_to_tensor(self.bidirectional),
                ops.convert_to_tensor(self.causal),
                ops.convert_to_tensor(self.row_index),
                self.window,
                None
                if self.block is None
                else ops.convert_to_tensor(self.block),
            ),
            Distance(
                ops.convert_to_tensor(self.row_positions),
                ops.convert_to_tensor(self.positions),
                self.strength,
                self.exponent,
            ),
            mixture,
        )

    def value_and_grads(self, implementation):
        """Divergences, and gradients of their weighted sum."""

        def scalar(row_weight, *tensors):
            divergence = self.run(implementation, *tensors)
            return ops.sum(ops.multiply(divergence, row_weight))

        row_weight = ops.convert_to_tensor(self.row_weight)
        # The weights' gradient is the divergence itself.
        return value_and_grads(scalar, row_weight, *self.tensors())[1]


def oracle(case, arrays=None):
    """The definition in NumPy float64, row by row, sharing no code.

    Returns:
        Divergences, and gradients of their weighted sum for the student's
        queries and keys and for the mixture.
    """
    sq, sk, tq, tk = (np.asarray(a, "float64") for a in (arrays or case.arrays))
    batch, rows, heads = sq.shape[:3]
    key_index = np.arange(sk.shape[1])
    mixture = np.eye(heads) if case.mixture is None else case.mixture
    values = np.zeros((batch, heads, rows))
    query_gradient, key_gradient, mixture_gradient = (
        np.zeros_like(sq),
        np.zeros_like(sk),
        np.zeros(mixture.shape),
    )

    def attention(query, key, scale, cap):
        logits = scale * key @ query
        slope = scale * np.ones_like(logits)
        if cap:
            slope /= np.cosh(logits / cap) ** 2
            logits = cap * np.tanh(logits / cap)
        e = np.exp(logits - logits.max())
        return e / e.sum(), slope

    for b, i in np.ndindex(batch, rows):
        at = case.row_index[i]
        earlier = key_index <= at
        if case.block is not None and case.block[b, at]:
            earlier |= case.block[b] == case.block[b, at]
        seen = case.bidirectional[b] | (case.causal[b] & earlier)
        if case.window:
            seen &= abs(key_index - at) < case.window
        if not seen.any():
            continue
        positions = case.positions[b]
        every = [*positions, *case.row_positions[b]]
        span = max(max(every) - min(every), 1)
        distance = np.abs(case.row_positions[b, i] - positions[seen]) / span
        w = 1 + case.strength * distance**case.exponent
        group = tq.shape[2] // tk.shape[2]
        maps = np.stack(
            [
                attention(
                    tq[b, i, h], tk[b, seen, h // group], 0.9, case.soft_caps[1]
                )[0]
                for h in range(tq.shape[2])
            ]
        )
        group = heads // sk.shape[2]
        for h in range(heads):
            key = sk[b, seen, h // group]
            q, slope = attention(sq[b, i, h], key, 0.7, case.soft_caps[0])
            p = mixture[h] @ maps
            values[b, h, i] = (w * (p * np.log(p / q) - p + q)).sum()
            g = case.row_weight[b, h, i]
            logits_gradient = (
                g * slope * (w * (q - p) - q * (w * (q - p)).sum())
            )
            query_gradient[b, i, h] += logits_gradient @ key
            key_gradient[b, seen, h // group] += (
                logits_gradient[:, None] * sq[b, i, h]
            )
            mixture_gradient[h] += g * maps @ (w * np.log(p / q))
    return (
        values,
        query_gradient,
        key_gradient,
        *([] if case.mixture is None else [mixture_gradient]),
    )


def test_oracles_gradients_are_slopes_of_its_values():
    case = Case("odd", window=15)
    _, *gradients = oracle(case)
    rng = np.random.default_rng(1)
    for which, name in enumerate(NAMES):
        mixture = case.mixture
        direction = rng.standard_normal(gradients[which].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [a.astype("float64") for a in case.arrays]
            if which < 2:
                moved[which] = moved[which] + step * direction
            else:
                case.mixture = mixture + step * direction
            ends.append((oracle(case, moved)[0] * case.row_weight).sum())
        case.mixture = mixture
        slope = (ends[0] - ends[1]) / 2e-5
        found = (gradients[which] * direction).sum()
        np.testing.assert_allclose(found, slope, rtol=1e-7, err_msg=name)


def assert_is_the_oracles(implementation, case):
    """Allows twice the error of the plain form in the same dtype."""
    exact = oracle(case)
    plain = case.value_and_grads("definition")
    found = case.value_and_grads(implementation)
    for name, *arrays in zip(
        ("value", *NAMES[: len(exact) - 1]), found, plain, exact, strict=True
    ):
        # A row may be 0, the sum of terms of size 1.
        assert_as_good_as(*arrays, name=name, terms=1.0)


@IMPLEMENTATION
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_the_oracles(implementation, shape, dtype):
    if not is_interpretable(implementation, dtype):
        pytest.skip("Triton's interpreter lacks bfloat16: run it on a GPU.")
    assert_is_the_oracles(implementation, Case(shape, dtype=dtype))


@IMPLEMENTATION
def test_a_row_of_one_key_is_the_oracles(implementation):
    # Both maps are 1 there, and their logarithms cancel.
    assert_is_the_oracles(implementation, Case("odd", window=1))


@IMPLEMENTATION
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_tiles_that_are_whole_are_the_oracles(implementation, window, mixed):
    # Kernels skip the mask in tiles where every row attends every key.
    heads = (2, 1, 8)
    shape = Shape(rows=61, keys=70, student=heads, teacher=heads)
    case = Case(shape, mixed=mixed, window=window, prefix=20)
    assert_is_the_oracles(implementation, case)


@strategies.composite
def cases(draw):
    def heads():
        key_heads = draw(strategies.integers(1, 2))
        width = draw(strategies.integers(1, 20))
        return key_heads * draw(strategies.integers(1, 2)), key_heads, width

    student, teacher = heads(), heads()
    rows = draw(strategies.integers(1, 40))
    return Case(
        Shape(rows, rows + draw(strategies.integers(0, 40)), student, teacher),
        seed=draw(strategies.integers(0, 99)),
        dtype=draw(strategies.sampled_from(["float32", "float16", "bfloat16"])),
        mixed=student[0] != teacher[0] or draw(strategies.booleans()),
        window=draw(strategies.sampled_from([None, 1, 7, 30])),
        exponent=draw(strategies.sampled_from([1.0, 0.5, 2.0])),
        soft_caps=draw(
            strategies.sampled_from([(None, None), (1.0, None), (None, 3.0)])
        ),
    )


@IMPLEMENTATION
@hypothesis.given(case=cases())
def test_any_case_is_the_oracles(implementation, case):
    hypothesis.assume(is_interpretable(implementation, case.dtype))
    assert_is_the_oracles(implementation, case)


@IMPLEMENTATION
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_weak_weights_are_the_oracles(implementation, strength):
    assert_is_the_oracles(implementation, Case("odd", strength=strength))


@IMPLEMENTATION
def test_rows_beyond_all_keys_are_the_oracles(implementation):
    case = Case("odd")
    case.row_positions = case.row_positions + 9 * np.arange(len(case.row_index))
    assert_is_the_oracles(implementation, case)


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize(
    ("rows", "keys", "by_key", "in_registers"),
    [(16, 32, True, False), (32, 16, False, True)],
)
def test_tiles_of_any_form_are_the_oracles(
    monkeypatch, implementation, rows, keys, by_key, in_registers
):
    def choose(kernel, *_, **__):
        form = by_key and kernel == "key", in_registers
        return tiles.Tiles(rows, keys, 4, 1, *form)

    monkeypatch.setattr(tiles, "choose_tiles", choose)
    assert_is_the_oracles(implementation, Case("blocks"))


@needs_jax
def test_each_tile_of_rows_has_a_program(monkeypatch):
    # The interpreter may accept a wrong index: it counts negative ones from the
    # end, which a GPU does not.
    from keras_laid.ops.fused_attention import pallas

    grid = 3, 2, 5  # Tiles, examples, heads.
    form = SimpleNamespace(tiles=tiles.Tiles(16, 32, 4, 1))
    monkeypatch.setattr(pallas.pl, "num_programs", grid.__getitem__)
    for program in np.ndindex(grid):
        monkeypatch.setattr(pallas.pl, "program_id", program.__getitem__)
        row = 16 * (2 - program[0])
        assert pallas.own_rows(form) == (program[2], row, 0)


@needs_jax
@pytest.mark.parametrize(("stages", "left"), [(3, 2), (1, 1)])
def test_a_tile_that_pallas_keeps_takes_a_stages_place(
    monkeypatch, stages, left
):
    # Compilers for GPUs refuse 0 stages, which the interpreter does not check.
    from keras_laid.ops.fused_attention import pallas

    kept = tiles.Tiles(32, 16, 4, stages, in_registers=True)
    monkeypatch.setattr(tiles, "choose_tiles", lambda *_: kept)
    own = np.zeros((1, 32, 1, 16))
    chosen = pallas.choose_tiles("forward", own, 16, 2, False)
    assert chosen == kept._replace(stages=left)


@needs_triton
def test_lifting_slopes_rounds_nothing():
    from keras_laid.ops.fused_attention import triton

    assert math.log2(triton.LIFT.value).is_integer()


@pytest.mark.parametrize("implementation", FUSED)
def test_tiles_are_chosen_by_rows_or_keys_of_all_heads(
    implementation, chosen_by
):
    case = Case("odd")
    case.value_and_grads(implementation)
    # The wider head dim, and examples times rows or keys times heads.
    rows, keys = (8, 2 * 7 * 2), (8, 2 * 19 * 1)
    assert chosen_by == {"forward": rows, "query": rows, "key": keys}


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="Needs JAX or torch on a GPU.")
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_that_fill_a_gpu(monkeypatch, dtype, width, mixed, window):
    if (KERNEL, dtype) == ("pallas", "float32"):
        pytest.skip("Pallas takes queries and keys of 16 bits.")
    monkeypatch.setattr(tiles, "choose_tiles", CHOOSE_TILES)
    case = Case(
        Shape(203, 331, (4, 2, width), (4, 4, width)),
        dtype=dtype,
        mixed=mixed,
        window=window,
        soft_caps=(None, None) if mixed else (20.0, None),
    )
    # Logits of the size that trained models have.
    case.arrays = [array / width**0.25 for array in case.arrays]
    case.arrays = [
        to_numpy(ops.convert_to_tensor(array, dtype)) for array in case.arrays
    ]
    assert_is_the_oracles(KERNEL, case)


@IMPLEMENTATION
def test_is_zero_for_equal_maps_and_never_negative(implementation):
    case = Case("odd", mixed=False, soft_caps=(None, None))
    case.arrays[2:] = [0.7 / 0.9 * case.arrays[0], case.arrays[1]]
    equal = to_numpy(case.run(implementation, *case.tensors()))
    np.testing.assert_allclose(equal, 0.0, atol=1e-5)
    assert (equal >= 0).all()


@IMPLEMENTATION
def test_is_plain_divergence_without_distance(implementation):
    case = Case("odd")
    case.strength = 0.0
    divergence = to_numpy(case.run(implementation, *case.tensors()))
    # Without distance weights, the sums of p and q over a row cancel.
    plain, *_ = oracle(case)
    np.testing.assert_allclose(divergence, plain, rtol=2e-5, atol=2e-6)


@IMPLEMENTATION
def test_rows_without_keys_count_nothing(implementation):
    case = Case("blocks")
    case.bidirectional[0] = False
    case.causal[0] = False
    divergence, *gradients, _ = case.value_and_grads(implementation)
    assert (to_numpy(divergence)[0] == 0).all()
    assert (to_numpy(divergence)[1] > 0).any()
    for gradient in gradients:
        assert (to_numpy(gradient)[0] == 0).all()
        assert np.isfinite(to_numpy(gradient)).all()


@pytest.mark.parametrize("implementation", ["chunked", "definition"])
def test_teacher_gets_no_gradient(implementation):
    case = Case("odd", mixed=False)
    query, key = case.tensors()

    def scalar(query, key):
        every = AttentionMask.from_lengths(19, [19, 19], 0, ops.arange(7))
        distance = Distance(ops.ones((1, 7)), ops.ones((1, 19)))
        student = Attention(ops.stop_gradient(query), key, 1.0)
        teacher = Attention(2.0 * query, key, 1.0)
        divergence = run(implementation, student, teacher, every, distance)
        return ops.sum(divergence) + 0.0 * ops.sum(query)

    _, (query_gradient, key_gradient) = value_and_grads(scalar, query, key)
    assert (to_numpy(query_gradient) == 0).all()
    assert (to_numpy(key_gradient) != 0).any()


def test_mask_from_lengths():
    mask = AttentionMask.from_lengths(5, [4, 3], [2, 0], window=3)
    expected = np.zeros((2, 5, 5), bool)
    for b, (length, prefix) in enumerate([(4, 2), (3, 0)]):
        for i, j in np.ndindex(5, 5):
            seen = j < length and (j < prefix or j <= i) and abs(i - j) < 3
            expected[b, i, j] = seen
    np.testing.assert_array_equal(to_numpy(mask.allowed())[:, 0], expected)


@pytest.mark.skipif(
    BACKEND != "jax", reason="Only JAX reports a compiled program's memory."
)
def test_memory_of_chunked_is_linear_in_length(monkeypatch):
    monkeypatch.setattr(row_blocks, "ROWS", 128)

    def temporary_bytes(implementation, length):
        inputs = benchmark.make_inputs(length, 4, 64, "float32")
        loss = benchmark.make_loss(implementation, length)
        return measuring.make_step(loss, inputs[:2], inputs[2:])[1]

    memory = {n: temporary_bytes("chunked", n) for n in (2048, 4096, 8192)}
    assert memory[8192] < 4.5 * memory[2048]
    assert memory[4096] < 0.25 * temporary_bytes("definition", 4096)


@pytest.mark.extra_large
@pytest.mark.skipif(BACKEND == "jax", reason="JAX has the test above.")
def test_peak_memory_of_a_process_is_linear_in_length():
    def peak_mib(implementation, length):
        args = argparse.Namespace(
            heads=4, head_dim=64, dtype="float32", repeats=1
        )
        measured = benchmark.measure_apart(implementation, length, args)
        return measured["peak_mib"]

    memory = {n: peak_mib("chunked", n) for n in (2048, 4096, 8192)}
    assert memory[8192] < 4.5 * memory[2048]
    assert memory[4096] < 0.25 * peak_mib("definition", 4096)


def arguments(case):
    """Arguments of the op, for a teacher that equals the student."""
    query, key, mixture = case.tensors()
    attention = Attention(query, key, 1.0)
    rows, keys = query.shape[1], key.shape[1]
    mask = AttentionMask.from_lengths(
        keys, [keys, keys], row_index=ops.arange(keys - rows, keys)
    )
    distance = Distance(ops.zeros((1, rows)), ops.zeros((1, keys)))
    return [attention, attention, mask, distance]


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"Expected one of .*'chunked'"):
        run("fast", *arguments(Case("odd")))


@pytest.mark.skipif(has_gpu(), reason="A kernel can run on this GPU.")
@pytest.mark.parametrize("implementation", ["pallas", "triton"])
def test_kernels_are_refused_where_they_cannot_run(implementation):
    with pytest.raises(NotImplementedError, match="it (needs|runs on)"):
        attention_divergence(
            *arguments(Case("odd")), implementation=implementation
        )


@pytest.mark.parametrize("implementation", ["chunked", "definition"])
@pytest.mark.parametrize("window", [None, 7])
def test_blocks_see_their_later_keys(implementation, window):
    case = Case("blocks", blocks=True, window=window)
    assert_is_the_oracles(implementation, case)
    without = oracle(Case("blocks", window=window))[0]
    assert np.abs(oracle(case)[0] - without).max() > 0.01
