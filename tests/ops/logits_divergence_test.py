"""Both implementations, against an oracle in float64 that shares no code."""

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import ops

from keras_laid import arguments
from keras_laid.ops import TopLogits
from keras_laid.ops import Unembedding
from keras_laid.ops import logits_divergence
from keras_laid.ops.logits_divergence import chunked
from tests.support import assert_as_good_as
from tests.support import to_numpy
from tests.support import value_and_grads

IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", ["chunked", "definition"]
)
NAMES = ("loss", "hidden", "kernel")
LOSSES = ("divergence", "cross_entropy", "kl")
ELEMENTS, ROWS = chunked.ELEMENTS, chunked.ROWS


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Gives small tests several blocks, the last one not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "ROWS", 4)
        patch.setattr(chunked, "ELEMENTS", 4)
        yield


class Case:
    """Random arguments as NumPy arrays, turned into the op's on call."""

    def __init__(
        self,
        length=7,
        vocabularies=(11, 11),
        seed=0,
        dtype="float32",
        soft_caps=(2.0, None),
        temperature=2.0,
        counted=0.5,
        target="both",
        top=None,
        beta=0.0,
    ):
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.arrays = []
        for width, vocabulary in zip((5, 3), vocabularies, strict=True):
            for shape in ((2, length, width), (width, vocabulary)):
                tensor = ops.convert_to_tensor(
                    rng.standard_normal(shape).astype("f4"), dtype
                )
                self.arrays.append(to_numpy(tensor))  # Rounded to the dtype.
        # -1 is no label.
        self.labels = rng.integers(-1, vocabularies[0], (2, length))
        weights = rng.random((2, length)) * (rng.random((2, length)) < counted)
        self.weights = weights.astype("f4")
        self.soft_caps, self.temperature = soft_caps, temperature
        self.target = target
        self.beta = beta
        self.top = top  # The number of known logits of the teacher.

    def run(self, implementation, hidden, kernel):
        teacher = [
            ops.convert_to_tensor(array, hidden.dtype)
            for array in self.arrays[2:]
        ]
        teacher = Unembedding(*teacher, self.soft_caps[1])
        if self.top:
            shared = min(kernel.shape[1], teacher.vocabulary)
            teacher = TopLogits.from_logits(
                teacher.first(shared).logits(), self.top, self.temperature
            )
        return logits_divergence(
            Unembedding(hidden, kernel, self.soft_caps[0]),
            None if self.target == "labels" else teacher,
            None
            if self.target == "teacher"
            else ops.convert_to_tensor(self.labels),
            ops.convert_to_tensor(self.weights),
            divergence_weight=0.5,
            cross_entropy_weight=3.0,
            temperature=self.temperature,
            beta=self.beta,
            vocabulary="shared",
            implementation=implementation,
        )

    def tensors(self):
        return [
            ops.convert_to_tensor(array, self.dtype)
            for array in self.arrays[:2]
        ]

    def value_and_grads(self, implementation):
        loss, gradients = value_and_grads(
            lambda *tensors: self.run(implementation, *tensors).loss,
            *self.tensors(),
        )
        return loss, *gradients


def oracle(case, arrays=None):
    """The losses in NumPy float64, token by token, and their gradients.

    Returns:
        A tuple of the loss and the gradients of hidden states and kernel, and a
        dictionary of the separate losses.
    """
    hidden, kernel, targets, unembed = (
        np.asarray(a, "float64") for a in (arrays or case.arrays)
    )
    hidden_gradient, kernel_gradient = (
        np.zeros_like(hidden),
        np.zeros_like(kernel),
    )
    shared = min(kernel.shape[1], unembed.shape[1])
    tau = case.temperature
    labelled = case.weights * (case.labels >= 0)
    totals = [float(w.sum()) or 1.0 for w in (case.weights, labelled)]
    losses = dict.fromkeys(LOSSES, 0.0)

    def softmax(logits):
        e = np.exp(logits - logits.max())
        return e / e.sum()

    def known(p, q):
        """Keeps the largest of `p` and splits the rest as in `q`."""
        if not case.top:
            return p
        others = np.argsort(p)[: -case.top]
        p = p.copy()
        p[others] = p[others].sum() * q[others] / q[others].sum()
        return p

    def divergence(p, q):
        """A generalized Jensen-Shannon divergence, and its slope at `q`."""
        beta = case.beta
        if beta == 0:
            return (p * np.log(p / q)).sum(), -p / q
        if beta == 1:
            return (q * np.log(q / p)).sum(), np.log(q / p) + 1
        m = beta * p + (1 - beta) * q
        value = beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)
        return value.sum(), (1 - beta) * np.log(q / m)

    def capped(logits, cap):
        return logits if cap is None else cap * np.tanh(logits / cap)

    for at in np.ndindex(*case.weights.shape):
        raw = hidden[at] @ kernel
        z = capped(raw, case.soft_caps[0])
        t = capped(targets[at] @ unembed, case.soft_caps[1])[:shared]
        slope = np.zeros_like(z)
        if case.target != "labels":
            w = case.weights[at] / totals[0]
            p, q = softmax(t / tau), softmax(z[:shared] / tau)
            p = known(p, q)
            value, at_q = divergence(p, q)
            losses["divergence"] += w * tau**2 * value
            slope[:shared] += 0.5 * w * tau * q * (at_q - (q * at_q).sum())
            p, q = softmax(t), softmax(z[:shared])
            p = known(p, q)
            losses["kl"] += w * (p * np.log(p / q)).sum()
        if case.target != "teacher" and case.labels[at] >= 0:
            w = case.weights[at] / totals[1]
            q = softmax(z)
            losses["cross_entropy"] -= w * np.log(q[case.labels[at]])
            q[case.labels[at]] -= 1
            slope += 3.0 * w * q
        if case.soft_caps[0]:
            slope /= np.cosh(raw / case.soft_caps[0]) ** 2
        hidden_gradient[at] = kernel @ slope
        kernel_gradient += np.outer(hidden[at], slope)
    loss = 0.5 * losses["divergence"] + 3.0 * losses["cross_entropy"]
    return (loss, hidden_gradient, kernel_gradient), losses


BETA = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])


@BETA
@pytest.mark.parametrize("top", [None, 3])
def test_oracles_gradients_are_slopes_of_its_values(top, beta):
    # Tokens without a known logit count as one token.
    case = Case(top=top, beta=beta)
    (_, *gradients), _ = oracle(case)
    rng = np.random.default_rng(1)
    for which, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [a.astype("float64") for a in case.arrays]
            moved[which] += step * direction
            ends.append(oracle(case, moved)[0][0])
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(
            (gradient * direction).sum(), slope, rtol=1e-7
        )


def assert_is_as_good(case):
    """Allows twice the error of the plain form in the same dtype."""
    exact, _ = oracle(case)
    plain = case.value_and_grads("definition")
    found = case.value_and_grads("chunked")
    for name, *arrays in zip(NAMES, found, plain, exact, strict=True):
        # The loss may be 0, a sum of terms of size 1.
        assert_as_good_as(*arrays, name=name, terms=1.0)


TARGET = pytest.mark.parametrize("target", ["both", "teacher", "labels"])


TOP = pytest.mark.parametrize("top", [None, 3, 11])


@TOP
@TARGET
@IMPLEMENTATION
def test_is_the_oracles_in_float32(implementation, target, top):
    assert_is_the_oracles(Case(target=target, top=top), implementation)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("top", [None, 3])
@IMPLEMENTATION
def test_is_the_oracles_for_each_divergence(implementation, top, beta):
    assert_is_the_oracles(Case(top=top, beta=beta), implementation)


def assert_is_the_oracles(case, implementation):
    exact, losses = oracle(case)
    for found, expected in zip(
        case.value_and_grads(implementation), exact, strict=True
    ):
        np.testing.assert_allclose(to_numpy(found), expected, 1e-4, 1e-6)
    found = case.run(implementation, *case.tensors())
    for name in LOSSES:
        value = to_numpy(getattr(found, name))
        np.testing.assert_allclose(value, losses[name], 1e-5, err_msg=name)


@TOP
@TARGET
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_chunked_is_as_good_as_the_definition(dtype, target, top):
    assert_is_as_good(Case(dtype=dtype, target=target, top=top))


@strategies.composite
def cases(draw):
    return Case(
        length=draw(strategies.integers(1, 9)),
        vocabularies=(
            draw(strategies.integers(2, 12)),
            draw(strategies.integers(2, 12)),
        ),
        seed=draw(strategies.integers(0, 99)),
        dtype=draw(strategies.sampled_from(["float32", "float16", "bfloat16"])),
        soft_caps=draw(
            strategies.sampled_from([(None, None), (1.0, None), (None, 3.0)])
        ),
        temperature=draw(strategies.sampled_from([1.0, 0.5, 4.0])),
        counted=draw(strategies.sampled_from([0.0, 0.2, 1.0])),
        target=draw(strategies.sampled_from(["both", "teacher", "labels"])),
        top=draw(strategies.sampled_from([None, 1, 2])),
        beta=draw(strategies.sampled_from([0.0, 0.5, 0.9, 1.0])),
    )


@hypothesis.given(case=cases())
def test_chunked_is_as_good_on_any_case(case):
    assert_is_as_good(case)


@pytest.mark.parametrize("length", [4, 8])
def test_blocks_that_are_all_full(length):
    assert_is_as_good(Case(length=length, counted=1.0))


@IMPLEMENTATION
def test_a_scaled_loss_has_scaled_gradients(implementation):
    case = Case()
    _, expected = value_and_grads(
        lambda *tensors: case.run("definition", *tensors).loss,
        *case.tensors(),
    )
    _, found = value_and_grads(
        lambda *tensors: -2.5 * case.run(implementation, *tensors).loss,
        *case.tensors(),
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            to_numpy(one), -2.5 * to_numpy(other), rtol=1e-5, atol=1e-6
        )


@IMPLEMENTATION
def test_float16_keeps_the_gradients_of_small_shares(implementation):
    # Divided by the share, gradients of both shares are the same to the bit.
    case = Case(dtype="float16")
    unembed = ops.convert_to_tensor(case.arrays[3], "float16")
    targets = ops.convert_to_tensor(case.arrays[2], "float16")
    gradients = [
        value_and_grads(
            lambda hidden, kernel, share=share: (
                logits_divergence(
                    Unembedding(hidden, kernel),
                    Unembedding(targets, unembed),
                    divergence_weight=share,
                    vocabulary="shared",
                    implementation=implementation,
                ).loss
                / share
            ),
            *case.tensors(),
        )[1]
        for share in (1.0, 2.0**-30)
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
        assert np.any(to_numpy(one))


def test_a_block_takes_some_megabytes(monkeypatch):
    monkeypatch.setattr(chunked, "ELEMENTS", ELEMENTS)
    monkeypatch.setattr(chunked, "ROWS", ROWS)
    for vocabulary in (2**15, 49_152, 257_216):
        tokens = chunked.rows_of_block(1, 2**20, vocabulary)
        assert 2**22 <= 4 * vocabulary * tokens <= 2**26
        # The examples of a batch share a block.
        assert chunked.rows_of_block(4, 2**20, vocabulary) == tokens // 4


@pytest.mark.parametrize("known", [True, False])
def test_a_block_has_no_more_tokens_than_there_are(monkeypatch, known):
    monkeypatch.setattr(chunked, "ELEMENTS", 2**10)
    for batch, length, expected in (
        (1, 16, 16),
        (1, 200, 64),
        (8, 200, 8),
        (100, 200, 1),
        (0, 0, 1),
    ):
        sizes = batch, length
        if not known:
            sizes = map(ops.convert_to_tensor, sizes)
        found = chunked.rows_of_block(*sizes, 16)
        assert int(found) == expected
        assert isinstance(found, int) == known


@BETA
@IMPLEMENTATION
def test_equal_distributions_have_no_divergence(implementation, beta):
    case = Case(target="teacher", soft_caps=(None, None), beta=beta)
    case.arrays[2:] = case.arrays[:2]
    losses = case.run(implementation, *case.tensors())
    np.testing.assert_allclose(to_numpy(losses.divergence), 0.0, atol=1e-6)


@IMPLEMENTATION
def test_reverse_is_forward_with_the_models_exchanged(implementation):
    models = [
        Unembedding(ops.convert_to_tensor(hidden), None)
        for hidden in np.random.default_rng(0).standard_normal(
            (2, 1, 4, 6), "float32"
        )
    ]
    if implementation == "chunked":
        kernel = ops.eye(6)
        models = [each._replace(kernel=kernel) for each in models]
    values = [
        logits_divergence(
            *pair, beta=beta, temperature=2.0, implementation=implementation
        ).divergence
        for pair, beta in (
            (models, 1.0),
            (models[::-1], 0.0),
            (models, 0.5),
            (models[::-1], 0.5),
        )
    ]
    reverse, forward, one, other = map(to_numpy, values)
    np.testing.assert_allclose(reverse, forward, rtol=1e-5)
    np.testing.assert_allclose(one, other, rtol=1e-5)  # It is symmetric.
    assert one < reverse


@IMPLEMENTATION
def test_tokens_without_weight_are_not_looked_at(implementation):
    case = Case(counted=0.3)
    expected = case.value_and_grads(implementation)
    case.arrays[2][case.weights == 0] = 7.0  # The teacher's.
    found = case.value_and_grads(implementation)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


@IMPLEMENTATION
def test_teacher_gets_no_gradient(implementation):
    case = Case(target="teacher")

    def loss(hidden, kernel):
        student = Unembedding(
            ops.stop_gradient(hidden), ops.stop_gradient(kernel)
        )
        losses = logits_divergence(
            student,
            Unembedding(2.0 * hidden, kernel),
            implementation=implementation,
        )
        return losses.loss + 0.0 * ops.sum(hidden) + 0.0 * ops.sum(kernel)

    _, *gradients = value_and_grads(loss, *case.tensors())
    for gradient in gradients[0]:
        assert (to_numpy(gradient) == 0).all()


def test_logits_themselves_are_taken():
    case = Case()
    hidden, kernel = case.tensors()
    expected = case.run("definition", hidden, kernel)
    logits = Unembedding(hidden, kernel, case.soft_caps[0]).logits()
    case.soft_caps = None, case.soft_caps[1]
    found = case.run(None, logits, None)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-5)
    with pytest.raises(NotImplementedError, match="logits exist already"):
        case.run("chunked", logits, None)


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Only JAX reports a compiled program's memory.",
)
def test_no_tensor_of_all_logits(monkeypatch):
    import jax

    monkeypatch.setattr(chunked, "ROWS", 16)
    monkeypatch.setattr(chunked, "ELEMENTS", 2**15)
    hidden, kernel = (1, 1024, 8), (8, 1024)
    tensors = [
        jax.ShapeDtypeStruct(shape, "float32")
        for shape in (hidden, kernel, hidden, kernel)
    ]

    def temporary_bytes(implementation):
        def loss(hidden, kernel, *teacher):
            losses = logits_divergence(
                Unembedding(hidden, kernel),
                Unembedding(*teacher),
                implementation=implementation,
            )
            return losses.loss

        gradient = jax.jit(jax.grad(loss, (0, 1)))
        compiled = gradient.lower(*tensors).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("chunked") < 0.2 * temporary_bytes("definition")


@IMPLEMENTATION
def test_labels_of_weight_0_may_be_any(implementation):
    case = Case()
    expected = case.value_and_grads(implementation)
    case.labels[case.weights == 0] = 99
    found = case.value_and_grads(implementation)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


@IMPLEMENTATION
def test_labels_beyond_the_vocabulary_are_seen(implementation, monkeypatch):
    """Compiled code cannot raise: they give a NaN loss, and no gradient."""
    monkeypatch.setattr(arguments, "at_hand", lambda tensor: False)
    case = Case()
    row, column = np.argwhere(case.weights > 0)[0]
    case.labels[row, column] = -1
    _, *expected = case.value_and_grads(implementation)
    case.labels[row, column] = case.arrays[1].shape[1]
    loss, *found = case.value_and_grads(implementation)
    assert np.isnan(to_numpy(loss))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=1e-7)
