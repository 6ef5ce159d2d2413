"""Attention pooled over segments, against an oracle in float64."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from keras import ops

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import row_blocks
from keras_laid.ops import segment_attention
from tests.ops.kernels import BACKEND
from tests.ops.kernels import needs_jax
from tests.support import ROUNDING
from tests.support import assert_as_good_as
from tests.support import to_numpy
from tests.support import value_and_grads

pytestmark = pytest.mark.usefixtures("small_tiles")
NAMES = ("log shares", "query", "key")
MASKED = np.float32(-1e30)
IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", ["chunked", "definition"]
)


class Case:
    """Random arguments as NumPy arrays; a third of the keys is padding.

    Segment numbers go beyond the largest one requested, and some segments have
    no key.
    """

    def __init__(
        self,
        rows=13,
        keys=19,
        heads=(4, 2),
        width=6,
        dtype="float32",
        soft_cap=2.0,
        window=None,
        blocks=False,
        numbers=(0, 1, 2, 4, 6),
        num_segments=5,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.arrays = []
        for shape in ((rows, heads[0], width), (keys, heads[1], width)):
            array = rng.standard_normal((2, *shape)).astype("float32")
            tensor = ops.convert_to_tensor(array, dtype)
            self.arrays.append(to_numpy(tensor))  # Rounded to the dtype.
        shape = (2, heads[0], rows, num_segments)
        self.upstream = rng.standard_normal(shape).astype("float32")
        kind = rng.integers(0, 3, (2, keys))
        self.bidirectional, self.causal = kind == 1, kind == 2
        self.row_index = np.sort(rng.permutation(keys)[:rows])
        self.segments = rng.choice(numbers, (2, keys))
        self.num_segments = num_segments
        self.scale, self.soft_cap, self.window = 0.7, soft_cap, window
        self.block = None
        if blocks:  # Blocks of up to five keys; 0 is no block.
            self.block = np.tile(np.arange(keys) // 5, (2, 1))

    def run(self, implementation, query, key):
        block = self.block
        mask = AttentionMask(
            ops.convert_to_tensor(self.bidirectional),
            ops.convert_to_tensor(self.causal),
            ops.convert_to_tensor(self.row_index),
            self.window,
            None if block is None else ops.convert_to_tensor(block),
        )
        return segment_attention(
            Attention(query, key, self.scale, self.soft_cap),
            mask,
            ops.convert_to_tensor(self.segments),
            self.num_segments,
            implementation,
        )

    def tensors(self):
        return [ops.convert_to_tensor(a, self.dtype) for a in self.arrays]

    def output_and_grads(self, implementation):
        """Log shares, and gradients of their weighted sum."""

        def scalar(upstream, *tensors):
            return ops.sum(self.run(implementation, *tensors) * upstream)

        upstream = ops.convert_to_tensor(self.upstream)
        # The weights' gradient is the log shares themselves.
        return value_and_grads(scalar, upstream, *self.tensors())[1]

    def allows(self, example, row, key):
        at = self.row_index[row]
        causal = self.causal[example, key]
        allowed = self.bidirectional[example, key] or (causal and at >= key)
        if self.block is not None and causal:
            block = self.block[example]
            allowed = allowed or (block[key] > 0 and block[key] == block[at])
        return allowed and (self.window is None or abs(at - key) < self.window)


def oracle(case, arrays=None):
    """Log shares and all gradients, row by row, in NumPy float64."""
    query, key = (np.asarray(a, "float64") for a in (arrays or case.arrays))
    found = np.full(case.upstream.shape, float(MASKED))
    query_gradient, key_gradient = np.zeros_like(query), np.zeros_like(key)
    for b, h, i in np.ndindex(*found.shape[:3]):
        seen = [j for j in range(key.shape[1]) if case.allows(b, i, j)]
        if not seen:
            continue
        group = h // (query.shape[2] // key.shape[2])
        q, k = query[b, i, h], key[b, seen, group]
        logits, slope = case.scale * k @ q, case.scale
        if case.soft_cap:
            slope = case.scale / np.cosh(logits / case.soft_cap) ** 2
            logits = case.soft_cap * np.tanh(logits / case.soft_cap)
        log_a = logits - np.logaddexp.reduce(logits)
        logits_gradient = np.zeros(len(seen))
        for g in range(case.num_segments):
            inside = case.segments[b, seen] == g + 1
            if not inside.any():
                continue
            found[b, h, i, g] = np.logaddexp.reduce(log_a[inside])
            slopes = -np.exp(log_a)
            slopes[inside] += np.exp(log_a[inside] - found[b, h, i, g])
            logits_gradient += case.upstream[b, h, i, g] * slopes
        query_gradient[b, i, h] = logits_gradient * slope @ k
        key_gradient[b, seen, group] += np.outer(logits_gradient * slope, q)
    return found, query_gradient, key_gradient


def without_masked(log_shares):
    """Log shares with 0 for masked ones, which must be exactly -1e30."""
    masked = log_shares < -1e29
    assert (log_shares[masked] == MASKED).all()
    return np.where(masked, 0.0, log_shares)


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
            values = oracle(case, moved)[0]
            ends.append((values * case.upstream)[values > MASKED].sum())
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(
            (gradient * direction).sum(), slope, rtol=1e-6
        )


KINDS = {
    "odd": dict(),
    "one": dict(
        rows=1, keys=1, heads=(1, 1), numbers=(1,), num_segments=1, seed=2
    ),
    "one_block": dict(rows=5, heads=(3, 1), soft_cap=None),
    "window": dict(window=4),
    "blocks": dict(blocks=True, keys=31, rows=31),
    "one_segment": dict(numbers=(0, 1), num_segments=1),
    "no_other_keys": dict(numbers=(1, 2, 3), num_segments=3),
    "no_segment": dict(numbers=(0, 6)),
}


@IMPLEMENTATION
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[(kind, "float32") for kind in KINDS],
        ("odd", "bfloat16"),
        ("odd", "float16"),
    ],
)
def test_is_the_oracles(implementation, kind, dtype):
    case = Case(dtype=dtype, **KINDS[kind])
    exact = list(oracle(case))
    found = [to_numpy(x) for x in case.output_and_grads(implementation)]
    found[0], exact[0] = map(without_masked, (found[0], exact[0]))
    for name, one, other in zip(NAMES, found, exact, strict=True):
        # Log shares come in float32 whatever the dtype.
        rounding = 0.0 if name == "log shares" else ROUNDING.get(dtype, 0.0)
        np.testing.assert_allclose(
            one, other, 1e-4 + rounding, 1e-5, err_msg=name
        )


def assert_is_as_good(case):
    """Allows twice the error of the plain form in the same dtype."""
    plain, found = (
        list(case.output_and_grads(name)) for name in ("definition", "chunked")
    )
    exact = list(oracle(case))
    for each in (plain, found, exact):
        each[0] = without_masked(to_numpy(each[0]))
    for name, *arrays in zip(NAMES, found, plain, exact, strict=True):
        assert_as_good_as(*arrays, name=name, terms=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_is_as_good_as_the_definition(dtype):
    assert_is_as_good(Case(dtype=dtype))


@strategies.composite
def cases(draw):
    keys = draw(strategies.integers(1, 40))
    return Case(
        rows=draw(strategies.integers(1, keys)),
        keys=keys,
        heads=draw(strategies.sampled_from([(1, 1), (4, 2), (3, 1)])),
        width=draw(strategies.sampled_from([3, 6, 17])),
        dtype=draw(strategies.sampled_from(["float32", "float16", "bfloat16"])),
        soft_cap=draw(strategies.sampled_from([None, 0.5])),
        window=draw(strategies.sampled_from([None, 1, 6])),
        blocks=draw(strategies.booleans()),
        num_segments=draw(strategies.integers(1, 7)),
        seed=draw(strategies.integers(0, 99)),
    )


@hypothesis.given(case=cases())
def test_is_as_good_on_any_case(case):
    assert_is_as_good(case)


@IMPLEMENTATION
def test_is_the_logarithm_of_plain_softmax_sums(implementation):
    case = Case(numbers=range(6))
    query, key = case.tensors()
    log_shares = to_numpy(case.run(implementation, query, key))
    allowed = np.array(
        [
            [[case.allows(b, i, j) for j in range(19)] for i in range(13)]
            for b in range(2)
        ]
    )
    logits = to_numpy(Attention(query, key, case.scale, 2.0).logits())
    maps = np.where(allowed[:, None], np.exp(logits), 0.0)
    maps /= np.maximum(maps.sum(-1, keepdims=True), 1e-9)
    sums = [
        (maps * (case.segments == g)[:, None, None]).sum(-1)
        for g in range(1, 6)
    ]
    np.testing.assert_allclose(
        np.exp(log_shares), np.stack(sums, axis=-1), rtol=1e-5, atol=1e-7
    )


@IMPLEMENTATION
@pytest.mark.parametrize("without", ["keys", "segments"])
def test_rows_that_attend_no_segment_have_no_gradient(implementation, without):
    case = Case()
    if without == "keys":
        case.bidirectional[0] = case.causal[0] = False
    else:
        case.segments[0] = 0
    log_shares, *gradients = map(
        to_numpy, case.output_and_grads(implementation)
    )
    assert (log_shares[0] == MASKED).all()
    assert (log_shares[1] > MASKED).any()
    for gradient in gradients:
        assert (gradient[0] == 0).all()
        assert np.isfinite(gradient).all() and (gradient[1] != 0).any()


@IMPLEMENTATION
def test_tiny_shares_are_exact(implementation):
    # Whole numbers and a power of two make every logit exact in float32.
    case = Case(soft_cap=None)
    rng = np.random.default_rng(3)
    case.arrays = [
        rng.integers(-7, 8, a.shape).astype("float32") for a in case.arrays
    ]
    case.scale = 64.0
    exact = list(oracle(case))
    found = [to_numpy(x) for x in case.output_and_grads(implementation)]
    found[0], exact[0] = map(without_masked, (found[0], exact[0]))
    assert exact[0].min() < -1e4
    for name, one, other in zip(NAMES, found, exact, strict=True):
        # Log shares of up to 1e4 are rounded in float32.
        np.testing.assert_allclose(one, other, 1e-3, 1e-3, err_msg=name)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Only TensorFlow traces for any size."
)
@IMPLEMENTATION
def test_how_many_segments_may_be_known_only_later(implementation):
    import tensorflow as tf

    case = Case()
    expected = case.output_and_grads("definition")
    later = Case()

    @tf.function(input_signature=[tf.TensorSpec((), "int64")])
    def found(num_segments):
        later.num_segments = num_segments
        return later.output_and_grads(implementation)

    for one, other in zip(found(5), expected, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-5)


@needs_jax
def test_memory_of_few_rows_is_linear_in_keys(monkeypatch):
    import jax

    monkeypatch.setattr(row_blocks, "ROWS", 128)
    rows, heads, width = 32, 4, 64

    def temporary_mebibytes(keys):
        def loss(query, key, segments):
            mask = AttentionMask.from_lengths(
                keys, [keys], row_index=ops.arange(keys - rows, keys)
            )
            attention = Attention(query, key, 0.1)
            return ops.sum(segment_attention(attention, mask, segments, 50))

        shapes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((1, rows, heads, width), "float32"),
                ((1, keys, heads, width), "float32"),
                ((1, keys), "int32"),
            )
        ]
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
        compiled = gradient.lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    short, long = map(temporary_mebibytes, (8192, 16384))
    assert long < 2.2 * short
    assert long < 48  # Half a number per row, key and segment.
