"""Compiled functions of any model follow the scopes and gains in use."""

import contextlib
import functools
import gc
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from keras_hub.models import PaliGemmaCausalLM

import keras_laid
from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid import attach_gain_modulation
from keras_laid import fold_gain_modulation
from keras_laid.backbones import compiled
from keras_laid.backbones import linear_memory
from keras_laid.backbones.without_heads import without_heads
from tests.backbones import extension_support as support
from tests.backbones import self_extend_test
from tests.backbones import yarn_test
from tests.support import NO_XLA
from tests.support import PALI_GEMMA
from tests.support import attention_of
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import to_numpy

BACKEND = keras.backend.backend()
LENGTH = 9
SMALL = dict(PALI_GEMMA, num_layers=1)
SCOPES = {
    "yarn": functools.partial(keras_laid.yarn, **yarn_test.SETTINGS),
    "self_extend": functools.partial(
        keras_laid.self_extend, **self_extend_test.SETTINGS
    ),
    "linear_memory": keras_laid.linear_memory_attention,
    "positions": functools.partial(
        keras_laid.rotary_positions, positions=3 * np.arange(4 + LENGTH)
    ),
    "heads": functools.partial(without_heads, heads=[(0, 1)]),
}


def make_task():
    """A plain PaliGemma whose attention is sharp, so that scopes show."""
    task = make_pali_gemma(SMALL)
    for layer in attention_of(task):
        for dense in (layer.query_dense, layer.key_dense):
            dense.kernel.assign(2.0 * dense.kernel)
    return task


class Subclassed(keras.Model):
    """A user's model, with the backbone in a dictionary."""

    def __init__(self, backbone):
        super().__init__()
        self.parts = {"body": backbone}

    def call(self, inputs):
        body = self.parts["body"]
        return body.token_embedding(body(inputs)[:, -LENGTH:], reverse=True)


def functional(task):
    """A user's model of a part of the backbone's graph."""
    block = task.backbone.transformer_layers[0]
    hidden = task.backbone.get_layer(block.name).output
    return keras.Model(task.backbone.input, hidden[:, -LENGTH:])


def distiller(task, teacher):
    return DistanceWeightedAttentionDistillation(
        MultiImagePaliGemmaCausalLM(teacher.backbone),
        MultiImagePaliGemmaCausalLM(task.backbone),
        retrieval_weight=0.0,
    )


@functools.cache
def other():
    return make_multi_image(SMALL, seed=5)


# Models that run the backbone of a plain PaliGemma.
WRAPPERS = {
    "task": lambda task: PaliGemmaCausalLM(None, task.backbone),
    "multi_image": lambda task: MultiImagePaliGemmaCausalLM(task.backbone),
    "functional": functional,
    "subclassed": lambda task: Subclassed(task.backbone),
    "student": lambda task: distiller(task, other()),
    "teacher": lambda task: distiller(other(), task),
}
# Whether a model is run inside of a scope.
OUTSIDE_FIRST = (False, True, False)
INSIDE_FIRST = (True, False, True)
TAKE_SEVERAL_IMAGES = ("multi_image", "student", "teacher")
GENERATE = ("task", "multi_image", "student")


def compile_model(model, learning_rate=0.0):
    """By default, training changes no weights, so losses can be compared."""
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **NO_XLA,
    )
    task = getattr(model, "student", model)
    task.sampler = keras_hub.samplers.GreedySampler()


def wrap(name, task):
    model = WRAPPERS[name](task)
    compile_model(model)
    return model


def batch_for(name):
    x = support.make_inputs(images=1, length=LENGTH)
    if name not in TAKE_SEVERAL_IMAGES:
        x["images"] = x["images"][:, 0]
    return x, x["token_ids"] % 16


def loss_of_batch(model, x, y):
    model.reset_metrics()
    return model.train_on_batch(x, y, return_dict=True)["loss"]


def generated(model, x, y):
    prompt = {n: x[n] for n in ("images", "token_ids")}
    prompt["padding_mask"] = np.tile(np.arange(LENGTH) < 6, (2, 1))
    return model.generate(prompt, stop_token_ids=None)["token_ids"]


ENTRIES = {
    "fit": lambda model, x, y: model.fit(
        x, y, verbose=0, shuffle=False
    ).history["loss"],
    "train_on_batch": loss_of_batch,
    "evaluate": lambda model, x, y: model.evaluate(
        x, y, verbose=0, return_dict=True
    )["loss"],
    "predict": lambda model, x, y: model.predict(x, verbose=0),
    "call": lambda model, x, y: to_numpy(model(x)),
    "generate": generated,
}


def check(scope, wrapper, entries, orders, monkeypatch):
    """Compares a model with new ones, inside and outside of a scope.

    Each order is a tuple of booleans: whether each run is inside of the scope.
    """
    task, batch = make_task(), batch_for(wrapper)
    linear = []
    compute = linear_memory.attention_output

    def attend(*args):
        linear.append(1)
        return compute(*args)

    monkeypatch.setattr(linear_memory, "attention_output", attend)

    def opened(inside):
        return SCOPES[scope](task) if inside else contextlib.nullcontext()

    def run(model):
        return [ENTRIES[entry](model, *batch) for entry in entries]

    expected = {}
    for inside in (False, True):
        with opened(inside):
            expected[inside] = run(wrap(wrapper, task))
    for order in orders:
        model = wrap(wrapper, task)
        for inside in order:
            del linear[:]
            with opened(inside):
                found = run(model)
            message = f"{scope}, {wrapper}, {entries}, {order}: {inside}"
            for one, right in zip(found, expected[inside], strict=True):
                np.testing.assert_allclose(
                    one, right, rtol=2e-4, atol=2e-4, err_msg=message
                )
            if scope == "linear_memory":  # Outputs are equal.
                assert bool(linear) == inside, message
    if scope != "linear_memory":
        for entry, one, other in zip(entries, *expected.values(), strict=True):
            calls_teacher = entry in ("fit", "train_on_batch", "evaluate")
            if entry != "generate" and (wrapper != "teacher" or calls_teacher):
                assert np.abs(np.subtract(one, other)).max() > 1e-3, entry


@pytest.mark.parametrize(
    "scope, wrapper, entries, order",
    [
        ("yarn", "student", ["fit"], OUTSIDE_FIRST),
        ("linear_memory", "functional", ["predict"], INSIDE_FIRST),
        ("heads", "task", ["evaluate"], INSIDE_FIRST),
        pytest.param(
            *("yarn", "teacher", ["train_on_batch"], INSIDE_FIRST),
            marks=pytest.mark.extra_large_but_on("torch"),
        ),
        pytest.param(
            *("self_extend", "multi_image", ["predict", "call"], OUTSIDE_FIRST),
            marks=pytest.mark.extra_large_but_on("torch"),
        ),
        pytest.param(
            *("positions", "subclassed", ["train_on_batch"], OUTSIDE_FIRST),
            marks=pytest.mark.extra_large_but_on("torch"),
        ),
    ],
)
def test_a_scope(scope, wrapper, entries, order, monkeypatch):
    check(scope, wrapper, entries, [order], monkeypatch)


@pytest.mark.extra_large
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope(scope, wrapper, monkeypatch):
    entries = list(ENTRIES)
    # Generation runs one token at a time and cannot take all positions.
    if wrapper not in GENERATE or scope == "positions":
        entries.remove("generate")
    orders = OUTSIDE_FIRST, INSIDE_FIRST
    check(scope, wrapper, entries, orders, monkeypatch)


def test_models_are_found_wherever_they_are():
    task = make_task()
    models = [task, task.backbone, WRAPPERS["subclassed"](task)]
    models.append(keras.Sequential([models[-1]]))
    functional(make_task())  # Has another backbone.

    def assert_found():
        found = compiled.models_around(task)
        assert set(map(id, found)) == set(map(id, models))

    assert_found()
    compiled.MODELS.clear()  # As if this library was imported only now.
    compiled.find_older_models.cache_clear()
    assert_found()
    gc.freeze()
    assert_found()


def test_models_are_let_go():
    gone = weakref.ref(functional(make_task()))
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs uncompiled.")
def test_nothing_is_traced_again_where_nothing_changed(monkeypatch):
    task, (x, y) = make_task(), batch_for("task")
    model = wrap("task", task)
    block, traces = type(task.backbone.transformer_layers[0]), []
    call = block.call

    def counted(*args, **kwargs):
        traces.append(1)
        return call(*args, **kwargs)

    monkeypatch.setattr(block, "call", counted)

    def traced():
        before = len(traces)
        for entry in ("fit", "predict", "generate"):
            ENTRIES[entry](model, x, y)
        return len(traces) - before

    assert traced() > 0
    with SCOPES["yarn"](task):
        assert traced() > 0
        assert traced() == 0
    assert traced() == 0


def test_what_is_compiled_inside_counts_outside():
    task, batch = make_task(), batch_for("functional")
    model = wrap("functional", task)
    before = loss_of_batch(model, *batch)
    with SCOPES["yarn"](task):
        compile_model(model, learning_rate=0.1)
        inside = loss_of_batch(model, *batch)
    first, second = [loss_of_batch(model, *batch) for _ in range(2)]
    assert abs(inside - before) > 1e-3
    assert second < first < before


def test_a_scope_between_the_epochs_of_fit():
    task, batch = make_task(), batch_for("task")
    model = wrap("task", task)

    class Predict(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with SCOPES["yarn"](task):
                self.model.predict(batch[0], verbose=0)

    losses = model.fit(
        *batch, epochs=3, verbose=0, shuffle=False, callbacks=[Predict()]
    ).history["loss"]
    np.testing.assert_allclose(losses, losses[:1] * 3, rtol=1e-6)


@pytest.mark.parametrize(
    "wrapper, entry",
    [
        ("multi_image", "generate"),
        ("student", "evaluate"),
        ("functional", "predict"),
    ],
)
def test_gains_come_and_go_behind_a_wrapper(wrapper, entry):
    task, batch = make_task(), batch_for(wrapper)
    model = wrap(wrapper, task)

    def run(model):
        return ENTRIES[entry](model, *batch)

    run(model)
    (gain,) = attach_gain_modulation(task)
    gain.log_gain.assign(np.linspace(-3, 3, gain.log_gain.shape[0]))
    for change in (lambda: None, lambda: fold_gain_modulation(task)):
        change()
        expected = run(wrap(wrapper, task))
        np.testing.assert_allclose(run(model), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("wrapper", ["student", "functional"])
def test_gains_attached_late_train_as_early_ones(wrapper):
    batch, trained = batch_for(wrapper), []
    for late in (False, True):
        task = make_task()
        gains = [] if late else attach_gain_modulation(task)
        model = wrap(wrapper, task)
        if late:
            loss_of_batch(model, *batch)
            gains = attach_gain_modulation(task)
            if wrapper == "student":  # Keras's own models lose weights on JAX.
                with pytest.raises(ValueError, match="optimizer"):
                    loss_of_batch(model, *batch)
        compile_model(model, learning_rate=0.1)
        for _ in range(3):
            loss_of_batch(model, *batch)
        trained.append(to_numpy(gains[0].log_gain))
    np.testing.assert_allclose(*trained, rtol=1e-4, atol=1e-6)
    assert np.abs(trained[0]).max() > 1e-4
