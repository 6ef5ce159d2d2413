"""One suite, run against every implementation, with an oracle in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops import attention_divergence
from keras_laid.ops.attention_divergence import IMPLEMENTATIONS
from keras_laid.ops.attention_divergence import chunked
from tests.support import assert_as_good_as
from tests.support import to_numpy
from tests.support import value_and_grads

NAMES = ("student_query", "student_key", "teacher_query", "teacher_key")
IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", [impl.name for impl in IMPLEMENTATIONS]
)
# rows, keys, student heads, key heads, teacher heads, key heads, head dims
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 4, 4),
    "odd": (7, 19, 2, 1, 4, 2, 8, 6),
    "blocks": (13, 41, 3, 3, 2, 1, 4, 12),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # So that small tests have several blocks, the last one not full.
    monkeypatch.setattr(chunked, "ROWS", 5)


class Case:
    """Random arguments as NumPy arrays, turned into the op's on call."""

    def __init__(self, shape, seed=0, dtype="float32"):
        rows, keys, hs, ks, ht, kt, ds, dt = SHAPES[shape]
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.arrays = [
            rng.standard_normal((2, *s)).astype("float32")
            for s in (
                (rows, hs, ds),
                (keys, ks, ds),
                (rows, ht, dt),
                (keys, kt, dt),
            )
        ]
        mixture = rng.random((hs, ht)) + 0.1
        self.mixture = (mixture / mixture.sum(1, keepdims=True)).astype("f4")
        kind = rng.integers(0, 3, size=(2, keys))  # 0 is padding
        self.bidirectional, self.causal = kind == 1, kind == 2
        self.row_index = np.arange(keys - rows, keys)
        self.positions = np.sort(rng.integers(0, 99, (2, keys)))
        self.row_positions = self.positions[:, keys - rows :]
        self.row_weight = rng.random((2, hs, rows)).astype("float32")
        self.strength, self.exponent = 3.0, 1.5
        self.soft_cap = 2.0

    def tensors(self):
        return [ops.convert_to_tensor(a, self.dtype) for a in self.arrays]

    def run(self, implementation, sq, sk, tq, tk, mixture=None):
        if mixture is None:
            mixture = ops.convert_to_tensor(self.mixture)
        return attention_divergence(
            Attention(sq, sk, 0.7, self.soft_cap),
            Attention(tq, tk, 0.9, None),
            AttentionMask(
                ops.convert_to_tensor(self.bidirectional),
                ops.convert_to_tensor(self.causal),
                ops.convert_to_tensor(self.row_index),
            ),
            Distance(
                ops.convert_to_tensor(self.row_positions),
                ops.convert_to_tensor(self.positions),
                self.strength,
                self.exponent,
            ),
            mixture,
            implementation=implementation,
        )

    def scalar(self, implementation, *tensors):
        divergence = self.run(implementation, *tensors)
        return ops.sum(ops.multiply(divergence, self.row_weight))


def oracle(case, arrays=None):
    """The definition in NumPy float64, in loops, sharing no code."""
    sq, sk, tq, tk = (np.asarray(a, "float64") for a in (arrays or case.arrays))
    batch, rows, heads = sq.shape[:3]
    result = np.zeros((batch, heads, rows))
    for b in range(batch):
        span = max(case.positions[b].max() - case.positions[b].min(), 1)
        for i in range(rows):
            allowed = case.bidirectional[b] | (
                case.causal[b] & (np.arange(sk.shape[1]) <= case.row_index[i])
            )
            if not allowed.any():
                continue

            def attention(q, k, h, group, scale, cap, b=b, i=i, a=allowed):
                logits = scale * k[b, a, h // group] @ q[b, i, h]
                if cap:
                    logits = cap * np.tanh(logits / cap)
                e = np.exp(logits - logits.max())
                return e / e.sum()

            maps = [
                attention(tq, tk, h, tq.shape[2] // tk.shape[2], 0.9, None)
                for h in range(tq.shape[2])
            ]
            distance = np.abs(
                case.row_positions[b, i] - case.positions[b, allowed]
            )
            w = 1 + case.strength * (distance / span) ** case.exponent
            for h in range(heads):
                group = heads // sk.shape[2]
                q = attention(sq, sk, h, group, 0.7, case.soft_cap)
                p = sum(
                    m * one
                    for m, one in zip(case.mixture[h], maps, strict=True)
                )
                result[b, h, i] = (w * (p * np.log(p / q) - p + q)).sum()
    return result


@IMPLEMENTATION
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_is_the_oracles(implementation, shape, dtype):
    case = Case(shape, dtype=dtype)
    tensors = case.tensors()
    rounded = [to_numpy(t) for t in tensors]
    exact = oracle(case, rounded)
    found = to_numpy(case.run(implementation, *tensors))
    # Whatever the inputs' dtype, all is computed in float32.
    np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_gradients_are_the_definitions(shape, dtype):
    case = Case(shape, dtype=dtype)
    tensors = [*case.tensors(), ops.convert_to_tensor(case.mixture)]
    wide = [ops.cast(t, "float32") for t in tensors]
    results = {
        name: value_and_grads(lambda *a, n=name: case.scalar(n, *a), *tensors)
        for name in ("chunked", "definition")
    }
    _, exact = value_and_grads(lambda *a: case.scalar("definition", *a), *wide)
    for name, *gradients in zip(
        (*NAMES, "mixture"),
        results["chunked"][1],
        results["definition"][1],
        exact,
        strict=True,
    ):
        assert_as_good_as(*gradients, name=f"d{name}")


def test_definition_gradients_are_the_oracles():
    case = Case("odd")
    _, gradients = value_and_grads(
        lambda *a: case.scalar("definition", *a), *case.tensors()
    )
    rng = np.random.default_rng(1)
    for which, name in enumerate(NAMES):
        gradient = to_numpy(gradients[which])
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [a.astype("float64") for a in case.arrays]
            moved[which] = moved[which] + step * direction
            ends.append((oracle(case, moved) * case.row_weight).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        found = (gradient * direction).sum()
        np.testing.assert_allclose(found, slope, rtol=1e-3, err_msg=name)


@IMPLEMENTATION
def test_is_zero_for_equal_maps_and_never_negative(implementation):
    case = Case("odd")
    case.soft_cap = None
    heads = np.eye(2, dtype="float32")
    sq, sk, *_ = case.tensors()
    equal = to_numpy(
        case.run(implementation, sq / 0.7, sk, sq / 0.9, sk, heads)
    )
    np.testing.assert_allclose(equal, 0.0, atol=1e-5)
    assert (to_numpy(case.run(implementation, *case.tensors())) > -1e-6).all()


@IMPLEMENTATION
def test_is_plain_divergence_without_distance(implementation):
    case = Case("odd")
    case.strength = 0.0
    plain = oracle(case)  # The last two terms of each row cancel.
    found = to_numpy(case.run(implementation, *case.tensors()))
    np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-6)


@IMPLEMENTATION
def test_rows_without_keys_count_nothing(implementation):
    case = Case("blocks")
    case.bidirectional[0] = False
    case.causal[0] = False
    found, gradients = value_and_grads(
        lambda *a: case.scalar(implementation, *a), *case.tensors()
    )
    assert np.isfinite(to_numpy(found))
    divergence = to_numpy(case.run(implementation, *case.tensors()))
    assert (divergence[0] == 0).all()
    assert (divergence[1] > 0).any()
    for gradient in gradients:
        assert (to_numpy(gradient)[0] == 0).all()
        assert np.isfinite(to_numpy(gradient)).all()


def test_memory_of_chunked_is_linear_in_rows():
    if keras.backend.backend() != "jax":
        pytest.skip("Only JAX tells a compiled program's temporary memory.")
    import jax

    def temporary_bytes(implementation, length):
        def loss(query):
            attention = Attention(query, query, 1.0)
            every = ops.ones((1, length), "bool")
            index = ops.arange(length)
            return ops.sum(
                attention_divergence(
                    attention,
                    jax.lax.stop_gradient(attention),
                    AttentionMask(every, every, index),
                    Distance(index[None], index[None], 1.0),
                    implementation=implementation,
                )
            )

        query = jax.ShapeDtypeStruct((1, length, 1, 8), "float32")
        compiled = jax.jit(jax.grad(loss)).lower(query).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked.ROWS = 32
    growth = temporary_bytes("chunked", 2048) / temporary_bytes("chunked", 512)
    assert growth < 4.5
    whole = temporary_bytes("definition", 2048)
    assert temporary_bytes("chunked", 2048) < 0.25 * whole


def test_unknown_implementation_is_refused():
    case = Case("one")
    with pytest.raises(ValueError, match=r"Expected one of .*'chunked'"):
        case.run("fast", *case.tensors())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: [a[0], a[1], a[2][:, :-1], a[3]], "same rows"),
        (lambda a: [a[0], a[1], a[2][:1], a[3]], "same batch"),
        (lambda a: [a[0], a[1][..., :-1], a[2], a[3]], "head dims"),
        (lambda a: [a[0][:, :, :1], *a[1:]], r"`mixture` must have shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, words):
    case = Case("odd")
    with pytest.raises(ValueError, match=words):
        case.run(None, *change(case.tensors()))


def test_different_heads_need_a_mixture():
    case = Case("odd")
    sq, sk, tq, tk = case.tensors()
    every = AttentionMask(*[ops.ones((2, 19), "bool")] * 2, ops.arange(7))
    distance = Distance(ops.zeros((1, 7)), ops.zeros((1, 19)))
    with pytest.raises(ValueError, match="HeadMixer"):
        attention_divergence(
            Attention(sq, sk, 1.0), Attention(tq, tk, 1.0), every, distance
        )
