"""Terms of the loss: hidden states, and a user's own term."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid.backbones.forward import forward
from keras_laid.distillation.terms import HiddenStates
from keras_laid.distillation.terms import NextTokens
from keras_laid.distillation.terms import Term
from tests.backbones import small_models
from tests.support import FEW_STEPS
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import make_terms
from tests.support import to_numpy


@pytest.fixture(scope="module")
def preprocessor():
    return make_preprocessor()


@pytest.fixture(scope="module")
def haystacks(preprocessor):
    return make_haystacks(preprocessor, num_questions=12, sizes=(2,))


def make_distiller(preprocessor, terms, **kwargs):
    size = preprocessor.tokenizer.vocabulary_size()
    teacher = make_multi_image(
        seed=1, vocabulary_size=size, hidden_dim=24, num_query_heads=4
    )
    student = make_multi_image(seed=2, vocabulary_size=size)
    distiller = DistanceWeightedAttentionDistillation(
        teacher,
        student,
        terms=terms,
    )
    distiller.compile(keras.optimizers.Adam(1e-2), **FEW_STEPS, **kwargs)
    return distiller


@small_models.EACH_CALLED
def test_the_last_block_puts_out_what_is_unembedded(family):
    model = small_models.make_model(family)
    inputs = small_models.make_inputs(model)
    last = len(model.backbone.transformer_layers) - 1
    plain = to_numpy(model(inputs))
    run = forward(model, inputs, hidden_layers=[0, last])
    assert {*run.hidden_states} == {0, last}
    norm = getattr(model.backbone, "layer_norm", None) or (
        model.backbone.final_norm
        if hasattr(model.backbone, "final_norm")
        else model.backbone.final_normalization
    )
    hidden = norm(run.hidden_states[last])
    length = run.tokens.hidden.shape[1]
    np.testing.assert_allclose(
        to_numpy(hidden)[:, -length:],
        to_numpy(run.tokens.hidden),
        rtol=1e-4,
        atol=1e-4,
    )
    np.testing.assert_allclose(
        to_numpy(run.tokens.logits()), plain, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param("text", marks=pytest.mark.extra_large_but_on("torch")),
        "all",
    ],
)
def test_hidden_states_are_the_plain_computation(preprocessor, haystacks, rows):
    distiller = make_distiller(
        preprocessor,
        [
            *make_terms(teacher_heads=[(0, 1)]),
            HiddenStates(0.5, [(0, 1), (1, 0)], rows),
        ],
    )
    x, y, sample_weight = haystacks[0]
    logs = distiller.test_on_batch(x, y, sample_weight, return_dict=True)
    # An example's weight is the largest of its tokens. Padding does not count.
    weight = np.max(sample_weight, axis=1, keepdims=True)
    length = x["padding_mask"].shape[1]
    losses = []
    for projection, (s, t) in zip(
        distiller.term_layers, ((0, 1), (1, 0)), strict=True
    ):
        states = [
            to_numpy(forward(model, x, hidden_layers=[i]).hidden_states[i])
            for model, i in ((distiller.student, s), (distiller.teacher, t))
        ]
        is_image = np.ones((len(y), states[0].shape[1] - length))
        counted = np.concatenate(
            [is_image * (rows == "all"), x["padding_mask"]], axis=1
        )
        kept = (counted * weight)[..., None]
        student, teacher = (each.astype("float64") for each in states)
        kernel, bias = map(to_numpy, projection.weights)
        mean = (kept * teacher).sum((0, 1)) / kept.sum()
        error = (kept * (student @ kernel + bias - teacher) ** 2).sum()
        losses.append(error / (kept * (teacher - mean) ** 2).sum())
    np.testing.assert_allclose(logs["hidden_states"], np.mean(losses), 1e-4)
    others = sum(logs[name] for name in ("retrieval", "logits", "supervised"))
    np.testing.assert_allclose(
        logs["loss"], others + 0.5 * logs["hidden_states"], 1e-4
    )


@pytest.mark.extra_large_but_on("torch")
def test_projections_learn_and_are_saved(preprocessor, haystacks, tmp_path):
    def make():
        return make_distiller(
            preprocessor,
            [HiddenStates(1.0, "uniform")],
            rematerialize=True,
        )

    distiller = make()
    history = distiller.fit(haystacks, epochs=4, verbose=0).history
    assert history["hidden_states"][-1] < 0.9 * history["hidden_states"][0]
    distiller.save_weights(tmp_path / "state.weights.h5")
    other = make()
    other.load_weights(tmp_path / "state.weights.h5")
    for one, same in zip(distiller.term_layers, other.term_layers, strict=True):
        for a, b in zip(one.weights, same.weights, strict=True):
            np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


class MeanLogit(Term):
    """The square of the student's mean logit, which needs no teacher."""

    needs_teacher = False

    def compute(self, step, targets):
        value = ops.square(ops.mean(step.run.tokens.logits()))
        return step.weights["mean_logit"] * value, {"mean_logit": value}


def test_a_term_of_the_users(preprocessor, haystacks):
    weight = keras.optimizers.schedules.PolynomialDecay(2.0, 3, 1.0)
    distiller = make_distiller(
        preprocessor,
        [NextTokens(logits_weight=0.0), MeanLogit(mean_logit=weight)],
    )
    x, y, sample_weight = haystacks[0]
    history = distiller.fit(haystacks, verbose=0).history
    assert distiller.run_teacher(x) is None
    logs = distiller.test_on_batch(x, y, sample_weight, return_dict=True)
    expected = to_numpy(ops.mean(distiller.student(x))) ** 2
    np.testing.assert_allclose(logs["mean_logit"], expected, 1e-4, 1e-6)
    # The weight at the end of training.
    np.testing.assert_allclose(
        logs["loss"], logs["supervised"] + logs["mean_logit"], 1e-4
    )
    assert {*history} == {"loss", "supervised", "mean_logit"}


def test_a_term_of_weight_0_learns_nothing(preprocessor):
    distiller = make_distiller(preprocessor, [NextTokens(), HiddenStates(0.0)])
    assert distiller.term_layers == []
    assert "hidden_states" not in distiller.trackers


def test_a_term_belongs_to_one_distiller(preprocessor):
    term = HiddenStates(1.0)
    make_distiller(preprocessor, [term])
    with pytest.raises(ValueError, match="a term belongs to one distiller"):
        make_distiller(preprocessor, [term])
