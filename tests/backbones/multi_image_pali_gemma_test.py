"""Several images, one image, positions, and captured attention."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid import attach_gain_modulation
from keras_laid import rotary_positions
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import attention_mask
from keras_laid.backbones.attention_capture import captured_attention
from tests.support import NO_XLA
from tests.support import PALI_GEMMA
from tests.support import PALI_GEMMA_2
from tests.support import attention_of
from tests.support import make_pali_gemma
from tests.support import make_preprocessor
from tests.support import to_numpy

CONFIGS = pytest.mark.parametrize(
    "config", [PALI_GEMMA, PALI_GEMMA_2], ids=["pali_gemma", "pali_gemma_2"]
)


def make_inputs(images=1, batch=2, length=7):
    rng = np.random.default_rng(0)
    index = np.arange(length)
    inputs = {
        "images": rng.normal(size=(batch, images, 16, 16, 3)).astype("float32"),
        "token_ids": rng.integers(4, 40, (batch, length)),
        "padding_mask": np.tile(index < length - 1, (batch, 1)),
        "response_mask": np.tile(
            (index > 3) & (index < length - 1), (batch, 1)
        ),
    }
    return {
        name: value if name == "images" else value.astype("int32")
        for name, value in inputs.items()
    }


@CONFIGS
def test_one_image_is_kerashubs_own_model(config):
    pali_gemma = make_pali_gemma(config)
    several = MultiImagePaliGemmaCausalLM.from_causal_lm(pali_gemma)
    inputs = make_inputs(images=1)
    one = dict(inputs, images=inputs["images"][:, 0])
    np.testing.assert_allclose(
        to_numpy(several(inputs)), to_numpy(pali_gemma(one)), atol=2e-6
    )


def test_image_count_may_change_and_order_matters_by_position_alone():
    model = MultiImagePaliGemmaCausalLM(make_pali_gemma().backbone)
    for images in (1, 3, 2):
        inputs = make_inputs(images)
        logits = model.predict_on_batch(inputs)
        assert logits.shape == (2, 7, 40)
    inputs["positions"] = np.tile(np.arange(15), (2, 1))
    swapped = dict(
        inputs,
        images=inputs["images"][:, ::-1],
        positions=np.tile(np.r_[4:8, 0:4, 8:15], (2, 1)),
    )
    np.testing.assert_allclose(logits, to_numpy(model(inputs)), atol=1e-5)
    np.testing.assert_allclose(logits, to_numpy(model(swapped)), atol=1e-5)
    other = to_numpy(model(dict(swapped, positions=inputs["positions"])))
    assert np.abs(other - logits).max() > 1e-3


def test_weights_are_shared():
    pali_gemma = make_pali_gemma()
    model = MultiImagePaliGemmaCausalLM(pali_gemma.backbone)
    mine = {id(v) for v in model.trainable_variables}
    assert mine == {id(v) for v in pali_gemma.trainable_variables}


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_generate_equals_calling_again_and_again():
    preprocessor = make_preprocessor()
    model = MultiImagePaliGemmaCausalLM.from_causal_lm(
        make_pali_gemma(None, preprocessor)
    )
    attach_gain_modulation(model)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 16, 16, 3)).astype("uint8")
    prompts = ["For the image with a seven, is there"] * 2
    inputs = model.preprocessor.generate_preprocess(
        {"images": images, "prompts": prompts}, sequence_length=12
    )
    inputs = {
        name: ops.convert_to_numpy(value) for name, value in inputs.items()
    }
    assert inputs["images"].shape == (2, 3, 16, 16, 3)
    generated = model.generate_step(
        {name: ops.convert_to_tensor(v) for name, v in inputs.items()}
    )["token_ids"]
    token_ids = inputs["token_ids"].copy()
    prompt = inputs["padding_mask"].astype("int32")
    for index in range(int(prompt[0].sum()), 12):
        seen = np.arange(12) < index
        logits = model(
            {
                "images": inputs["images"],
                "token_ids": token_ids,
                "padding_mask": np.tile(seen, (2, 1)).astype("int32"),
                "response_mask": ((1 - prompt) * seen).astype("int32"),
            }
        )
        token_ids[:, index] = to_numpy(logits)[:, index - 1].argmax(axis=-1)
    np.testing.assert_array_equal(to_numpy(generated), token_ids)
    texts = model.generate(
        {"images": images, "prompts": prompts}, max_length=12
    )
    assert len(texts) == 2
    one = model.generate({"images": images[0], "prompts": prompts[0]}, 12)
    assert one == texts[0]


LONG = "For the image with a seven, is there an eight?"  # 10 tokens.


@pytest.fixture(scope="module")
def with_preprocessor():
    preprocessor = make_preprocessor()
    preprocessor.sequence_length = 11
    return MultiImagePaliGemmaCausalLM.from_causal_lm(
        make_pali_gemma(None, preprocessor)
    )


def asked(prompts, images=2, **kwargs):
    images = np.zeros((len(prompts), images, 16, 16, 3), "uint8")
    return {"images": images, "prompts": prompts, **kwargs}


@pytest.mark.parametrize("max_length", [None, 11, 4])
def test_prompts_that_would_be_cut_are_refused(with_preprocessor, max_length):
    received = f"max_length={max_length or 11}, and prompts that need 12"
    for inputs in (
        asked([LONG, "seven"]),
        tf.data.Dataset.from_tensors(asked([LONG])),
    ):
        with pytest.raises(ValueError, match=received):
            with_preprocessor.generate(inputs, max_length)


def test_prompts_that_fit_are_answered(with_preprocessor):
    data = tf.data.Dataset.from_tensors(asked([LONG, "seven"]))
    for inputs in (data, asked([LONG, "seven"])):
        one, other = with_preprocessor.generate(inputs, 12)
        assert one.startswith(LONG) and other


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_examples_that_would_be_cut_are_refused(with_preprocessor, method):
    call = getattr(with_preprocessor, method)
    with pytest.raises(ValueError, match="sequence_length=11.*need 12"):
        call(asked([LONG], responses=["yes"]))


@pytest.mark.parametrize(
    "images, words",
    [
        ([np.zeros((2, 16, 16, 3)), np.zeros((3, 16, 16, 3))], r"\[2, 3\]"),
        ([[np.zeros((16, 16, 3))], 2 * [np.zeros((16, 16, 3))]], r"\[1, 2\]"),
        (
            [[np.zeros((16, 16, 3))], [np.zeros((8, 8, 3))]],
            r"shapes \[\(8, 8, 3\), \(16, 16, 3\)\]",
        ),
    ],
)
def test_ragged_images_are_refused(with_preprocessor, images, words):
    inputs = {"images": images, "prompts": ["seven", "eight"]}
    with pytest.raises(ValueError, match=f"same number of images.*{words}"):
        with_preprocessor.generate(inputs)


def test_images_may_be_lists(with_preprocessor):
    inputs = asked(["seven", "eight"])
    expected = with_preprocessor.generate(dict(inputs))
    lists = [list(images) for images in inputs["images"]]
    assert with_preprocessor.generate({**inputs, "images": lists}) == expected


def test_stops_at_the_stop_token():
    model = MultiImagePaliGemmaCausalLM(make_pali_gemma().backbone)
    inputs = make_inputs(images=2)
    inputs["padding_mask"] = np.tile(np.arange(7) < 3, (2, 1))
    inputs = {n: ops.convert_to_tensor(v) for n, v in inputs.items()}
    free = to_numpy(model.generate_step(inputs)["token_ids"]).astype(int)
    stop = int(free[0, 4])
    stopped = model.generate_step(inputs, stop_token_ids=(stop,))
    mask = to_numpy(stopped["padding_mask"])[0].astype(bool)
    first = 3 + int((free[0, 3:] == stop).argmax())
    np.testing.assert_array_equal(mask, np.arange(7) <= first)


def test_saved_and_loaded(tmp_path):
    preprocessor = make_preprocessor()
    model = MultiImagePaliGemmaCausalLM.from_causal_lm(
        make_pali_gemma(None, preprocessor)
    )
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    inputs = make_inputs(images=2)
    inputs["token_ids"] %= preprocessor.tokenizer.vocabulary_size()
    np.testing.assert_allclose(
        to_numpy(model(inputs)), to_numpy(loaded(inputs)), atol=1e-6
    )


@CONFIGS
def test_captured_attention_is_the_layers_own(config):
    """Attention from captured queries and keys equals the layer's own."""
    model = MultiImagePaliGemmaCausalLM(make_pali_gemma(config).backbone)
    inputs = make_inputs(images=2)
    layer = attention_of(model)[-1]
    seen = {}
    compute = layer._compute_attention

    def spy(query, key, value, *args, **kwargs):
        seen["value"] = value
        seen["output"] = compute(query, key, value, *args, **kwargs)
        return seen["output"]

    last = len(attention_of(model)) - 1
    with decoder.replaced_method(layer, "_compute_attention", spy):
        with captured_attention(model, [last]) as captured:
            logits = model(inputs)
        assert layer._compute_attention is spy
    attention = captured[last]
    length = attention.key.shape[1]
    allowed = attention_mask(model, inputs, length, np.arange(length)).allowed()
    maps = ops.softmax(ops.where(allowed, attention.logits(), -1e30))
    heads, key_heads = attention.query.shape[2], attention.key.shape[2]
    value = ops.repeat(seen["value"], heads // key_heads, axis=2)
    output = ops.einsum("bhij,bjhd->bihd", maps, value)
    np.testing.assert_allclose(
        to_numpy(output), to_numpy(seen["output"]), atol=1e-5
    )
    np.testing.assert_array_equal(to_numpy(logits), to_numpy(model(inputs)))


def test_scopes_leave_no_trace_also_after_an_error():
    model = make_pali_gemma()
    layers = attention_of(model)
    layers += [layer.rope_layer for layer in layers]
    before = [set(vars(layer)) for layer in layers]
    with pytest.raises(RuntimeError, match="on purpose"):
        with (
            captured_attention(model, [0, 1]),
            rotary_positions(model, np.arange(11)),
        ):
            assert "_compute_attention" in vars(layers[0])
            assert "call" in vars(layers[0].rope_layer)
            raise RuntimeError("on purpose")
    assert before == [set(vars(layer)) for layer in layers]


def test_positions_depend_on_differences_alone():
    model = MultiImagePaliGemmaCausalLM(make_pali_gemma().backbone)
    inputs = make_inputs(images=2)
    inputs["positions"] = np.sort(
        np.random.default_rng(0).integers(0, 99, (2, 15)), axis=1
    )
    moved = dict(inputs, positions=inputs["positions"] + 50)
    logits = to_numpy(model(inputs))
    np.testing.assert_allclose(logits, to_numpy(model(moved)), atol=1e-4)
    del inputs["positions"]
    assert np.abs(logits - to_numpy(model(inputs))).max() > 1e-3


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"PaliGemmaCausalLM.*Received: Dense"):
        MultiImagePaliGemmaCausalLM(keras.layers.Dense(1))


@pytest.mark.extra_large_but_on("torch")
def test_fit_reads_arrays_and_pydatasets():
    preprocessor = make_preprocessor()
    model = MultiImagePaliGemmaCausalLM(
        make_pali_gemma(None, preprocessor).backbone
    )
    model.compile(keras.optimizers.SGD(0.1), "auto", **NO_XLA)
    x = make_inputs(images=2)
    x["token_ids"] %= 20
    arrays = model.evaluate(x, x["token_ids"], verbose=0)

    class Once(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return x, x["token_ids"]

    np.testing.assert_allclose(
        arrays, model.evaluate(Once(), verbose=0), rtol=1e-5
    )
    history = model.fit(Once(), epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    logits = model.predict(Once(), verbose=0)
    assert logits.shape == (2, 7, model.backbone.vocabulary_size)


def test_plain_preset_of_a_folder(tmp_path):
    preprocessor = make_preprocessor()
    make_pali_gemma(None, preprocessor).save_to_preset(str(tmp_path / "tiny"))
    loaded = keras_hub.models.PaliGemmaCausalLM.from_preset(
        str(tmp_path / "tiny")
    )
    model = MultiImagePaliGemmaCausalLM.from_causal_lm(loaded)
    images = np.zeros((1, 2, 16, 16, 3), "uint8")
    assert model.generate({"images": images, "prompts": ["For the image"]}, 8)
