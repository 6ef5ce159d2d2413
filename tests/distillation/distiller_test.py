"""The distiller: its terms, its steps, and what it leaves alone."""

import functools
import json
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_laid
from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import DistanceWeighting
from keras_laid import PositionStretching
from keras_laid import attach_gain_modulation
from keras_laid.backbones.multi_image_pali_gemma import multi_image_preprocessor
from keras_laid.distillation import AttentionMatching
from keras_laid.distillation import NextTokens
from keras_laid.distillation.terms.term import weighted_mean
from keras_laid.ops.logits_divergence import chunked
from tests.support import FEW_STEPS
from tests.support import NO_XLA
from tests.support import PALI_GEMMA_2
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import make_preprocessor
from tests.support import make_terms
from tests.support import to_numpy

CURVE = pathlib.Path(__file__).parent / "loss_curve.json"
BACKEND = keras.backend.backend()


@pytest.fixture(scope="module")
def preprocessor():
    return make_preprocessor()


def make_pair(preprocessor, gains=True):
    """A teacher with more heads and width, and a student."""
    size = preprocessor.tokenizer.vocabulary_size()
    teacher = make_multi_image(
        seed=1, vocabulary_size=size, hidden_dim=24, num_query_heads=4
    )
    student = make_multi_image(seed=2, vocabulary_size=size)
    if gains:
        attach_gain_modulation(student)
    return teacher, student


def make_distiller(preprocessor, optimizer=None, gains=True, **kwargs):
    compile_kwargs = kwargs.pop("compile_kwargs", {})
    compile_kwargs = FEW_STEPS | NO_XLA | compile_kwargs
    kwargs.setdefault("attention_weight", 1.0)  # So that it matters.
    # Fixed, because heads that are found may differ by dtype and batch.
    kwargs.setdefault("teacher_heads", [(0, 1), (1, 2)])
    weighting = kwargs.pop("distance_weighting", None)
    teacher, student = make_pair(preprocessor, gains)
    distiller = DistanceWeightedAttentionDistillation(
        teacher, student, weighting, terms=make_terms(**kwargs)
    )
    distiller.compile(optimizer or keras.optimizers.SGD(0.1), **compile_kwargs)
    return distiller


def values(model):
    return [np.array(to_numpy(variable)) for variable in model.variables]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


class Calls(list):
    """A list that grows with each call of a model."""

    def __init__(self, model, monkeypatch):
        super().__init__()
        run = type(model).call

        def call(this, *args, **kwargs):
            if this is model:
                self.append(1)
            return run(this, *args, **kwargs)

        monkeypatch.setattr(type(model), "call", call)


@pytest.mark.extra_large_but_on("torch")
def test_one_pass_of_each_model_a_step(preprocessor, monkeypatch):
    distiller = make_distiller(
        preprocessor,
        query_key_weight=0.1,
        temperature=2.0,
        distance_weighting=DistanceWeighting(steps=1),
        compile_kwargs=dict(run_eagerly=False),
    )
    batch = make_haystacks(preprocessor, sizes=(2,))[0]
    student_calls = Calls(distiller.student, monkeypatch)
    teacher_calls = Calls(distiller.teacher, monkeypatch)
    # JAX and TensorFlow call the models only while they trace a step.
    distiller.optimizer.build(distiller.trainable_variables)
    distiller.train_on_batch(*batch)
    assert (len(student_calls), len(teacher_calls)) == (1, 1)
    distiller.test_on_batch(*batch)
    assert (len(student_calls), len(teacher_calls)) == (2, 2)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs uncompiled.")
def test_a_step_is_compiled_once(preprocessor, monkeypatch):
    distiller = make_distiller(
        preprocessor, compile_kwargs=dict(run_eagerly=False)
    )
    calls = Calls(distiller.student, monkeypatch)
    haystacks = make_haystacks(
        preprocessor,
        num_questions=120,
        sizes=(2,),
        stretching=PositionStretching(9, 4),
    )
    distiller.fit(haystacks, epochs=1, verbose=0)
    traced = len(calls)
    assert traced == 1
    distiller.fit(haystacks, epochs=2, initial_epoch=1, verbose=0)
    assert len(calls) == traced
    assert int(distiller.step) == 60


@pytest.mark.extra_large_but_on("torch")
def test_teacher_is_left_alone(preprocessor):
    distiller = make_distiller(preprocessor)
    teacher = distiller.teacher
    before, trainable = values(teacher), teacher.trainable
    student_before = values(distiller.student)
    distiller.fit(make_haystacks(preprocessor), verbose=0)
    assert_same(before, values(teacher))
    assert teacher.trainable is trainable
    assert all(v.trainable for v in teacher.backbone.trainable_variables)
    for one, other in zip(
        student_before, values(distiller.student), strict=True
    ):
        assert (one != other).any()
    trained = {id(v) for v in distiller.trainable_variables}
    assert not trained & {id(v) for v in teacher.variables}


def test_loss_curve_is_the_same_on_every_backend(preprocessor):
    # This test wrote the curve on JAX. Delete the file to write it again.
    distiller = make_distiller(
        preprocessor,
        keras.optimizers.SGD(0.05, momentum=0.9),
        query_key_weight=0.1,
        temperature=2.0,
        layer_map="uniform",
        rows="all",
        retrieval_weight=0.0,
        distance_weighting=DistanceWeighting(steps=20),
    )
    haystacks = make_haystacks(
        preprocessor,
        num_questions=80,
        sizes=(2, 3),
        stretching=PositionStretching(9, 4),
    )
    losses = []
    for index in range(20):
        logs = distiller.train_on_batch(*haystacks[index], return_dict=True)
        distiller.reset_metrics()
        losses.append({name: float(value) for name, value in logs.items()})
    if not CURVE.exists():
        CURVE.write_text(json.dumps(losses, indent=1))
    expected = json.loads(CURVE.read_text())
    assert losses[0]["loss"] > losses[-1]["loss"]
    for step, (found, right) in enumerate(zip(losses, expected, strict=True)):
        assert found.keys() == right.keys()
        for name, value in right.items():
            np.testing.assert_allclose(
                found[name],
                value,
                rtol=1e-3,
                atol=1e-6,
                err_msg=f"step {step}, {name}",
            )


def test_loss_is_the_weighted_sum_of_its_terms(preprocessor):
    weights = dict(
        retrieval_weight=1.5,
        attention_weight=0.5,
        query_key_weight=0.25,
        logits_weight=2.0,
        supervised_weight=3.0,
    )
    distiller = make_distiller(preprocessor, **weights)
    logs = distiller.evaluate(
        make_haystacks(preprocessor), verbose=0, return_dict=True
    )
    total = sum(
        weight * logs[name.removesuffix("_weight")]
        for name, weight in weights.items()
    )
    np.testing.assert_allclose(logs["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(logs["kl"], logs["logits"], rtol=1e-6)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_loss_without_logits_is_the_loss_with_them(preprocessor, monkeypatch):
    """Compares a step that computes logits in blocks with whole logits."""
    monkeypatch.setattr(chunked, "ELEMENTS", 2**8)
    haystacks = make_haystacks(preprocessor, 4)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    function = functools.partial(
        keras.losses.sparse_categorical_crossentropy, from_logits=True
    )
    logs, weights = [], []
    for loss in ("auto", cross_entropy, function):
        distiller = make_distiller(
            preprocessor, temperature=2.0, compile_kwargs={"loss": loss}
        )
        logs.append(distiller.fit(haystacks, verbose=0).history)
        weights.append(values(distiller.student))
    for others in logs[1:]:
        assert others.keys() == logs[0].keys()
        for name, (value,) in logs[0].items():
            np.testing.assert_allclose(value, others[name][0], rtol=1e-5)
    for one, *others in zip(*weights, strict=True):
        for other in others:
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.extra_large_but_on("torch")
def test_metrics_see_the_logits(preprocessor):
    haystacks = make_haystacks(preprocessor, 4)
    distiller = make_distiller(
        preprocessor,
        compile_kwargs={"weighted_metrics": ["sparse_categorical_accuracy"]},
    )
    logs = distiller.fit(haystacks, verbose=0).history
    (accuracy,) = logs["sparse_categorical_accuracy"]
    assert 0 <= accuracy <= 1


@pytest.mark.extra_large_but_on("torch")
def test_a_term_fades_out_by_a_schedule(preprocessor):
    fade = keras.optimizers.schedules.PolynomialDecay(2.0, 2)  # To 1e-4.
    distiller = make_distiller(
        preprocessor,
        attention_weight=fade,
        distance_weighting=DistanceWeighting(steps=4),
    )
    batch = make_haystacks(preprocessor, sizes=(2,))[0]
    weights = []
    for _ in range(4):
        distiller.reset_metrics()
        logs = distiller.train_on_batch(*batch, return_dict=True)
        rest = logs["loss"] - logs["logits"] - logs["supervised"]
        rest -= logs["retrieval"]
        weights.append(rest / logs["attention"])
    np.testing.assert_allclose(
        weights, [2.0, 1.00005, 1e-4, 1e-4], rtol=1e-3, atol=1e-4
    )


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize(
    ("term", "needs_teacher"),
    [
        ("retrieval", True),
        ("attention", True),
        ("query_key", True),
        ("logits", True),
        ("supervised", False),
    ],
)
def test_each_term_trains_alone(preprocessor, monkeypatch, term, needs_teacher):
    terms = ("retrieval", "attention", "query_key", "logits", "supervised")
    distiller = make_distiller(
        preprocessor,
        keras.optimizers.Adam(1e-2),
        distance_weighting=DistanceWeighting(schedule="constant"),
        **{f"{name}_weight": float(name == term) for name in terms},
    )
    calls = Calls(distiller.teacher, monkeypatch)
    haystacks = make_haystacks(preprocessor, sizes=(2,), batch_size=8)
    history = distiller.fit(haystacks, epochs=3, verbose=0).history
    assert set(history) & set(terms) == {term}
    assert history[term][-1] < history[term][0]
    assert bool(calls) is needs_teacher


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_student_equal_to_teacher_has_nothing_to_learn(preprocessor):
    models = [make_multi_image(None, preprocessor, seed=1) for _ in range(2)]
    distiller = DistanceWeightedAttentionDistillation(
        *models,
        terms=make_terms(
            attention_weight=1.0,
            query_key_weight=1.0,
            mixer_sharpness=30.0,
            rows="all",
        ),
    )
    distiller.compile("sgd", **FEW_STEPS)
    logs = distiller.evaluate(
        make_haystacks(preprocessor), verbose=0, return_dict=True
    )
    for name in ("attention", "query_key", "logits"):
        assert abs(logs[name]) < 1e-5, name


def test_sample_weight_takes_examples_out(preprocessor):
    distiller = make_distiller(preprocessor, query_key_weight=0.1)
    x, y, sample_weight = make_haystacks(preprocessor, sizes=(2,))[0]
    sample_weight[2:] = 0
    some = distiller.test_on_batch(x, y, sample_weight, return_dict=True)
    distiller.reset_metrics()
    first = [{k: v[:2] for k, v in x.items()}, y[:2], sample_weight[:2]]
    alone = distiller.test_on_batch(*first, return_dict=True)
    for name in alone:
        np.testing.assert_allclose(
            some[name], alone[name], rtol=1e-4, err_msg=name
        )


@pytest.mark.extra_large_but_on("torch")
def test_accumulated_gradients_are_those_of_the_whole_batch(preprocessor):
    x, y, sample_weight = make_haystacks(
        preprocessor, sizes=(2,), batch_size=4
    )[0]
    constant = DistanceWeighting(schedule="constant")
    whole = make_distiller(preprocessor, distance_weighting=constant)
    whole.train_on_batch(x, y, sample_weight)
    parts = make_distiller(
        preprocessor,
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=4),
        distance_weighting=constant,
    )
    for row in range(4):
        one = slice(row, row + 1)
        parts.train_on_batch(
            {k: v[one] for k, v in x.items()}, y[one], sample_weight[one]
        )
    for one, other in zip(
        values(whole.student), values(parts.student), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


def losses_in(policy, preprocessor):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        distiller = make_distiller(
            preprocessor,
            keras.optimizers.Adam(3e-3),
            query_key_weight=0.1,
            distance_weighting=DistanceWeighting(schedule="constant"),
        )
        history = distiller.fit(
            make_haystacks(preprocessor, sizes=(2,)),
            epochs=2,
            shuffle=False,
            verbose=0,
        ).history
    finally:
        keras.config.set_dtype_policy(before)
    return history["loss"]


@pytest.fixture(scope="module")
def losses_in_float32(preprocessor):
    return losses_in("float32", preprocessor)


@pytest.mark.parametrize(
    ("policy", "roundoff"),
    [
        pytest.param(
            "mixed_bfloat16",
            2.0**-9,
            marks=pytest.mark.extra_large_but_on("torch"),
        ),
        ("mixed_float16", 2.0**-12),
    ],
)
def test_mixed_precision(preprocessor, policy, roundoff, losses_in_float32):
    losses = losses_in(policy, preprocessor)
    assert losses[-1] < losses[0]
    # About 30 roundings follow each other from a pixel to a logit. The bound is
    # two standard deviations of their sum. Later losses diverge: Adam's first
    # steps are the signs of gradients, even of those near 0.
    share = 2 * 30**0.5 * roundoff
    np.testing.assert_allclose(losses[:2], losses_in_float32[:2], share)
    assert (np.array(losses) != losses_in_float32).all()


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it with PyTorch.")
def test_steps_per_execution(preprocessor):
    distiller = make_distiller(
        preprocessor,
        retrieval_weight=0.0,
        compile_kwargs=dict(steps_per_execution=2, run_eagerly=False),
    )
    distiller.fit(
        make_haystacks(preprocessor, 16, sizes=(2,)), epochs=2, verbose=0
    )
    assert int(distiller.step) == 8


def test_every_variable_has_a_gradient(preprocessor):
    distiller = make_distiller(preprocessor, keras.optimizers.SGD(1.0))
    before = values(distiller.student), values(distiller.mixers[0])
    distiller.fit(make_haystacks(preprocessor), verbose=0)
    after = values(distiller.student), values(distiller.mixers[0])
    for one, other in zip(before, after, strict=True):
        for a, b in zip(one, other, strict=True):
            assert np.isfinite(b).all()
            assert (a != b).any()


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_learning_rates_of_groups(preprocessor):
    optimizer = keras_laid.group_optimizer(
        student=keras.optimizers.SGD(0.0),
        mixer=keras.optimizers.SGD(1.0),
        gains=keras.optimizers.SGD(1.0),
    )
    distiller = make_distiller(preprocessor, optimizer)
    before = {
        v.path: np.array(to_numpy(v)) for v in distiller.trainable_variables
    }
    distiller.fit(make_haystacks(preprocessor), verbose=0)
    for variable in distiller.trainable_variables:
        moved = (to_numpy(variable) != before[variable.path]).any()
        fast = variable.path.endswith(("mixing_logits", "log_gain"))
        assert moved == fast, variable.path


@pytest.mark.extra_large_but_on("torch")
def test_progress_reaches_one_at_the_end(preprocessor):
    distiller = make_distiller(preprocessor)
    haystacks = make_haystacks(preprocessor, sizes=(2,))
    distiller.fit(haystacks, epochs=2, verbose=0)
    assert (int(distiller.step), int(distiller.total_steps)) == (4, 4)
    distiller.fit(haystacks, epochs=3, verbose=0)  # Continues from there.
    assert (int(distiller.step), int(distiller.total_steps)) == (10, 10)


@pytest.mark.extra_large_but_on("torch")
def test_schedule_needs_a_length(preprocessor):
    class Endless(keras.utils.PyDataset):
        haystacks = make_haystacks(preprocessor, sizes=(2,))

        def __len__(self):
            raise TypeError  # As a `PyDataset` without a length does.

        @property
        def num_batches(self):
            return None

        def __getitem__(self, index):
            return self.haystacks[index % 2]

    distiller = make_distiller(
        preprocessor,
        retrieval_weight=0.0,
        compile_kwargs=dict(run_eagerly=False),
    )
    x, y, sample_weight = batch = Endless.haystacks[0]
    targets = distiller.run_teacher(x)
    steps = [
        lambda: distiller.fit(Endless(), verbose=0),
        lambda: distiller.train_on_batch(*batch),
        lambda: distiller.compute_terms(*batch, targets, training=True),
    ]
    for step in steps:
        with pytest.raises(ValueError, match="number of training steps must"):
            step()
    distiller.fit(Endless(), steps_per_epoch=2, verbose=0)
    # Neither a compiled step nor earlier training makes the number known.
    for step in steps:
        with pytest.raises(ValueError, match="number of training steps must"):
            step()
    distiller.test_on_batch(*batch)
    assert int(distiller.step) == 2


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize("entry", ["fit", "train_on_batch", "own_loop"])
def test_progress_follows_the_steps_that_are_given(preprocessor, entry):
    distiller = make_distiller(
        preprocessor, distance_weighting=DistanceWeighting(steps=4)
    )
    haystacks = make_haystacks(preprocessor, num_questions=12, sizes=(2,))
    found = []
    for batch in [haystacks[index] for index in range(3)]:
        distiller.reset_metrics()
        if entry == "fit":
            x, y, sample_weight = batch
            history = distiller.fit(
                x, y, sample_weight=sample_weight, batch_size=4, verbose=0
            ).history
            found += history["progress"]
        elif entry == "train_on_batch":
            logs = distiller.train_on_batch(*batch, return_dict=True)
            found.append(logs["progress"])
        else:
            targets = distiller.run_teacher(batch[0])
            _, terms = distiller.compute_terms(*batch, targets, training=True)
            found.append(to_numpy(terms["progress"]))
    np.testing.assert_allclose(found, [0.0, 0.25, 0.5])


def test_a_model_is_run_between_two_steps(preprocessor):
    """On JAX, `fit` holds its variables' values; `self.model` sees them."""
    haystacks = make_haystacks(preprocessor, num_questions=12, sizes=(2,))
    x = haystacks[0][0]

    distiller = make_distiller(preprocessor)
    student = distiller.student

    class Run(keras.callbacks.Callback):
        by_model = False

        def on_train_batch_end(self, batch, logs=None):
            run = self.model.student if self.by_model else student
            self.outputs = to_numpy(run(x))

    def fit(**kwargs):
        distiller.fit(haystacks, verbose=0, shuffle=False, **kwargs)

    run = Run()
    if BACKEND == "jax":
        with pytest.raises(RuntimeError, match=r"reach it by `self\.model`"):
            fit(callbacks=[run])
    run.by_model = True
    fit(callbacks=[run])
    np.testing.assert_allclose(run.outputs, to_numpy(student(x)), atol=1e-5)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_weight_files_hold_no_teacher(preprocessor, tmp_path):
    import h5py

    distiller = make_distiller(preprocessor, keras.optimizers.Adam(1e-3))
    distiller.fit(make_haystacks(preprocessor), verbose=0)
    distiller.save_weights(str(tmp_path / "state.weights.h5"))
    with h5py.File(tmp_path / "state.weights.h5") as file:
        names = []
        file.visit(names.append)
    layers = {name.split("/")[1] for name in names if "layers/" in name[:7]}
    assert layers == {"multi_image_pali_gemma_causal_lm", "head_mixer"}
    other = make_distiller(preprocessor, keras.optimizers.Adam(1e-3))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(str(tmp_path / "state.weights.h5"))
    assert_same(values(distiller.student), values(other.student))
    assert int(other.step) == 2


def test_the_whole_is_not_saved(preprocessor, tmp_path):
    with pytest.raises(NotImplementedError, match="save_to_preset"):
        make_distiller(preprocessor).save(str(tmp_path / "all.keras"))


def test_predict_and_generate_are_the_students(preprocessor):
    distiller = make_distiller(preprocessor)
    x, _, _ = make_haystacks(preprocessor, sizes=(2,))[0]
    np.testing.assert_allclose(
        distiller.predict_on_batch(x),
        distiller.student.predict_on_batch(x),
        atol=1e-5,
    )
    distiller.student.preprocessor = multi_image_preprocessor(preprocessor)
    inputs = {
        "images": np.zeros((1, 2, 16, 16, 3), "uint8"),
        "prompts": ["For the image with a seven, is there a one?"],
    }
    assert distiller.generate(dict(inputs)) == distiller.student.generate(
        dict(inputs)
    )


@pytest.mark.extra_large_but_on("torch")
def test_plain_kerashub_models_with_one_image(preprocessor):
    teacher = make_pali_gemma(PALI_GEMMA_2, preprocessor, seed=1)
    student = make_pali_gemma(None, preprocessor, seed=2)
    attach_gain_modulation(student)
    distiller = DistanceWeightedAttentionDistillation(
        teacher,
        student,
        terms=make_terms(attention_weight=1.0, layer_map=[(-1, 1)]),
    )
    distiller.compile(keras.optimizers.Adam(1e-2), **FEW_STEPS)
    x, y, sample_weight = make_haystacks(
        preprocessor, sizes=(1,), stretching=PositionStretching(9, 4)
    )[0]
    x["images"] = x["images"][:, 0]
    history = distiller.fit(
        x, y, sample_weight=sample_weight, epochs=3, verbose=0
    )
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_shared_vocabulary(preprocessor):
    teacher = make_multi_image(None, seed=1, vocabulary_size=60)
    student = make_multi_image(None, seed=2, vocabulary_size=50)
    with pytest.raises(ValueError, match='vocabulary="shared".*first 50'):
        DistanceWeightedAttentionDistillation(teacher, student)
    distiller = DistanceWeightedAttentionDistillation(
        teacher, student, terms=[NextTokens(vocabulary="shared")]
    )
    distiller.compile("sgd", **FEW_STEPS)
    logs = distiller.evaluate(
        make_haystacks(preprocessor), verbose=0, return_dict=True
    )
    assert np.isfinite(logs["logits"])


def test_sliding_layers_are_no_targets(preprocessor):
    teacher = make_multi_image(PALI_GEMMA_2, preprocessor, seed=1)
    student = make_multi_image(PALI_GEMMA_2, preprocessor, seed=2)

    def pairs(**kwargs):
        return DistanceWeightedAttentionDistillation(
            teacher, student, terms=[AttentionMatching(**kwargs)]
        ).layer_pairs

    assert pairs() == ((3, 3),)
    assert pairs(layer_map="uniform") == ((1, 1), (3, 3))
    with pytest.raises(ValueError, match=r"full attention, of \[1, 3\]"):
        pairs(layer_map=[(0, 1)])


def test_weighted_mean():
    found = weighted_mean(ops.ones((2, 3)) * 4.0, ops.ones((2, 1)))
    assert float(found) == 4.0
    assert float(weighted_mean(ops.ones((2, 3)), ops.zeros((2, 3)))) == 0.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.25, 0.5, 1.0, 1.0]),
        ("cosine", [0.0, 0.14645, 0.5, 1.0, 1.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(schedule, expected):
    weighting = DistanceWeighting(schedule=schedule)
    found = [
        float(weighting.progress(ops.array(step), ops.array(8)))
        for step in (0, 2, 4, 8, 9)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)
