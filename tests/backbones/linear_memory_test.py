"""KerasHub's attention without tensors whose size is length squared."""

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid import linear_memory_attention
from keras_laid.backbones import families
from keras_laid.backbones import linear_memory
from keras_laid.ops import attention_output
from keras_laid.ops import row_blocks
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import FEW_STEPS
from tests.support import assert_as_good_as
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import make_terms
from tests.support import to_numpy

BACKEND = keras.backend.backend()
FAMILIES = [
    family
    for family in small_models.FAMILIES
    if families.FAMILIES[small_models.TASKS[family].backbone_cls].linear_memory
    != "never"
]
FAMILIES.append(small_models.mistral_sliding)
TRAINED = [family for family in FAMILIES if family in small_models.FAMILIES]
REMATERIALIZE = (False, True)
if BACKEND != "torch":  # Compiling takes long.
    FAMILIES = [
        small_models.pali_gemma_2,
        small_models.gemma_3,
        small_models.phi_3,
        small_models.mistral_sliding,
    ]
    TRAINED = [small_models.pali_gemma_2]
    REMATERIALIZE = (True,)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Gives small tests several blocks, the last one not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "ROWS", 7)
        yield


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_outputs_are_the_models_own(family):
    model = make_model(family)
    inputs = make_inputs(model)
    expected = to_numpy(model(inputs))
    with linear_memory_attention(model):
        found = to_numpy(model(inputs))
    assert np.abs(found - expected).max() > 0  # Another computation ran.
    # Padding may attend nothing, where windows are short.
    present = inputs["padding_mask"] > 0
    np.testing.assert_allclose(found[present], expected[present], atol=2e-5)
    np.testing.assert_array_equal(to_numpy(model(inputs)), expected)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_is_as_good_as_the_models_own_in_bfloat16():
    family = small_models.pali_gemma_2
    model = make_model(family, dtype="bfloat16")
    exact = make_model(family)
    exact.set_weights([to_numpy(v) for v in model.variables])
    inputs = make_inputs(model)
    plain = to_numpy(model(inputs))
    with linear_memory_attention(model):
        found = to_numpy(model(inputs))
    assert_as_good_as(found, plain, to_numpy(exact(inputs)), "logits")


@pytest.mark.parametrize("missing", ["response_mask", "both"])
def test_prefix_masks_that_are_not_given(missing):
    model = make_model(small_models.pali_gemma_2)
    block = model.backbone.transformer_layers[0]
    x = np.random.default_rng(0).normal(size=(2, 20, 16)).astype("float32")
    masks = {}
    if missing != "both":
        masks["padding_mask"] = make_inputs(model)["padding_mask"]
    expected = to_numpy(block(x, **masks))
    with linear_memory_attention(model):
        np.testing.assert_allclose(
            to_numpy(block(x, **masks)), expected, atol=1e-5
        )


def one_step(family, **kwargs):
    """Runs one step; returns the terms and the student's weights."""
    student = make_model(family)
    keras_laid.attach_gain_modulation(student)
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        make_model(family, seed=5),
        student,
        terms=make_terms(layer_map="uniform"),
    )
    distiller.compile(keras.optimizers.SGD(0.1), **FEW_STEPS, **kwargs)
    inputs = make_inputs(student)
    history = distiller.fit(inputs, inputs["token_ids"], verbose=0).history
    return history, [to_numpy(v) for v in distiller.trainable_variables]


@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.__name__)
def test_students_learn_the_same(family):
    terms, weights = one_step(family)
    for rematerialize in REMATERIALIZE:
        same_terms, same_weights = one_step(
            family, linear_memory=True, rematerialize=rematerialize
        )
        for name, values in terms.items():
            np.testing.assert_allclose(
                same_terms[name], values, rtol=1e-4, err_msg=name
            )
        for one, other in zip(weights, same_weights, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
@pytest.mark.parametrize("rematerialize", [False, True])
def test_a_named_implementation_computes_both_models(
    monkeypatch, rematerialize
):
    names = []

    def noted(*arguments):
        names.append(arguments[-1])
        return attention_output(*arguments)

    monkeypatch.setattr(linear_memory, "attention_output", noted)
    one_step(
        small_models.pali_gemma,
        linear_memory="definition",
        rematerialize=rematerialize,
    )
    assert len(names) >= 4  # Two layers of each model.
    assert set(names) == {"definition"}


def test_an_implementation_that_cannot_run_is_refused_on_a_call():
    model = make_model(small_models.pali_gemma)
    other = "triton" if BACKEND == "jax" else "pallas"
    with linear_memory_attention(model, other):
        with pytest.raises(NotImplementedError, match="it needs"):
            model(make_inputs(model))


def test_generation_is_the_same():
    preprocessor = make_preprocessor()
    model = make_multi_image(preprocessor=preprocessor)
    prompts = {
        "images": np.zeros((1, 2, 16, 16, 3), "float32"),
        "prompts": ["is there a seven"],
    }
    expected = model.generate(prompts, max_length=12)
    with linear_memory_attention(model):
        assert model.generate(prompts, max_length=12) == expected


@pytest.mark.skipif(
    BACKEND != "jax", reason="Only JAX reports a compiled program's memory."
)
def test_memory_is_linear_in_length(monkeypatch):
    import jax

    monkeypatch.setattr(row_blocks, "ROWS", 128)
    model = make_model(small_models.pali_gemma_2)
    text = dict.fromkeys(
        ("token_ids", "padding_mask", "response_mask"),
        keras.ops.ones((1, 16), "int32"),
    )
    model = keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm(model)

    def temporary_bytes(images):
        def loss(images):
            return keras.ops.sum(model(text | {"images": images}))

        shape = jax.ShapeDtypeStruct((1, images, 16, 16, 3), "float32")
        compiled = jax.jit(jax.grad(loss)).lower(shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporary_bytes(512)  # Images of four tokens.
    with linear_memory_attention(model):
        short, long = temporary_bytes(512), temporary_bytes(2048)
    assert short < 0.25 * whole
    assert long < 4.5 * short


def test_what_would_not_be_the_same_is_refused():
    for family in (small_models.gemma_4, small_models.qwen_sliding):
        with pytest.raises(ValueError, match="not Gemma 4, and Qwen only"):
            with linear_memory_attention(make_model(family)):
                pass
    model = make_model(small_models.gemma_2, dropout=0.5)
    with pytest.raises(ValueError, match="without dropout.*0.5"):
        with linear_memory_attention(model):
            pass
    model = make_model(small_models.pali_gemma)
    with keras_laid.self_extend(model, group_size=2, neighbor_window=4):
        with pytest.raises(ValueError, match="outermost scope"):
            with linear_memory_attention(model):
                pass
    with pytest.raises(ValueError, match="not Gemma 4, and Qwen only"):
        one_step(small_models.gemma_4, linear_memory=True)
