"""Qwen 3.5 reads images in a compiled step as KerasHub reads them outside."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_laid
from keras_laid.backbones.forward import forward
from keras_laid.backbones.image_prompts import ImagePrompts
from keras_laid.backbones.prompt_forms import prompt_form
from keras_laid.backbones.qwen_vision import check_grids
from keras_laid.backbones.qwen_vision import compiled_images
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.haystacks.families import PREPROCESSORS
from tests.support import to_numpy

FAMILY = small_models.qwen_3_5_images


class Encoder(keras.Model):
    """A vision encoder that Keras compiles."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.built = True

    def call(self, data):
        with compiled_images(self.model):
            return self.model.backbone.vision_encoder(*data)


def patches(shape, grids, seed=0):
    """Patches and grids of prompts."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(*shape, 2, 4, 4, 3)).astype("float32")
    return pixels, np.array(grids, "int32")


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_tokens_of_images_are_those_of_kerashub():
    model = make_model(FAMILY)
    encoder = model.backbone.vision_encoder
    compiled = Encoder(model)
    # TensorFlow compiles the second call for any shape. Images of one batch may
    # have other sides.
    for pixels, grid in (
        patches((1, 24), [[[1, 4, 6]]]),
        patches((2, 64), [[[1, 4, 8], [1, 8, 4]], [[1, 2, 16], [1, 16, 2]]]),
        patches((3, 12), 3 * [[[1, 2, 2], [1, 2, 2], [1, 2, 2]]]),
    ):
        expected = to_numpy(encoder(pixels, grid))
        with compiled_images(model):
            found = to_numpy(encoder(pixels, grid))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        found = compiled.predict_on_batch((pixels, grid))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert "call" not in vars(encoder)


def test_a_wrong_grid_makes_no_tokens():
    model = make_model(FAMILY)
    pixels, grid = patches((1, 32), [[[1, 4, 4], [1, 4, 6]]])
    found = Encoder(model).predict_on_batch((pixels, grid))
    np.testing.assert_array_equal(
        np.isnan(found).all(axis=-1), [[False] * 4 + [True] * 4]
    )


def make_prompts(batch=2, images=2, size=(16, 24), responses=("yes", None)):
    """What the form makes, and KerasHub's preprocessor of the same prompts."""
    preprocessor = PREPROCESSORS[FAMILY]()
    form = prompt_form(preprocessor, size)
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 256, (batch, images, *size, 3)).astype("uint8")
    texts = ["Is there a red page?", "Is there a page?"]
    made = form.encode_whole(shown, texts, responses, form.length(20, images))
    own = preprocessor.generate_preprocess(
        {
            "images": [*shown.reshape(-1, *size, 3)],
            "prompts": [form.placeholder * images + text for text in texts],
        },
        sequence_length=made[0]["token_ids"].shape[1],
    )
    return made, arrays(own)


def arrays(inputs):
    return {
        name: np.array(ops.convert_to_numpy(value))
        for name, value in inputs.items()
    }


def test_prompts_are_those_that_kerashub_makes_itself():
    (x, y, sample_weight), own = make_prompts()
    assert x["token_ids"].shape == own["token_ids"].shape
    for row, present in enumerate(own["padding_mask"].astype("bool")):
        np.testing.assert_array_equal(
            x["token_ids"][row, present], own["token_ids"][row, present]
        )
    np.testing.assert_array_equal(x["positions"], own["position_ids"])
    # Height and width of an image of 2 x 3 tokens, after its mark.
    assert x["positions"][0, 2, 1:7].tolist() == [1, 1, 1, 2, 2, 2]
    assert x["positions"][0, 3, 1:7].tolist() == [1, 2, 3, 1, 2, 3]
    for name in ("vision_indices", "image_grid_thw", "pixel_values"):
        np.testing.assert_array_equal(
            x[name].reshape(own[name].shape), own[name], name
        )
        assert len(x[name]) == 2
    tokenizer = PREPROCESSORS[FAMILY]().tokenizer
    yes, end = tokenizer("yes"), tokenizer.end_token_id
    assert y[0][sample_weight[0] > 0].tolist() == [*to_numpy(yes), end]
    assert y[1][sample_weight[1] > 0].tolist() == [-1]
    # The first marked token is that after the prompt.
    first = sample_weight.argmax(axis=1) + 1
    np.testing.assert_array_equal(first, own["padding_mask"].sum(axis=1))


@pytest.mark.extra_large_but_on("tensorflow", "torch")
@pytest.mark.parametrize("name", ["positions", "position_ids"])
def test_logits_are_those_of_kerashub_at_its_positions(name):
    (x, _, _), own = make_prompts()
    preprocessor = PREPROCESSORS[FAMILY]()
    model = make_model(
        FAMILY, vocabulary_size=preprocessor.tokenizer.vocabulary_size()
    )
    expected = to_numpy(model.score(own))
    x[name] = x.pop("positions")
    found = to_numpy(forward(model, x).tokens.logits())
    for row, length in enumerate(own["padding_mask"].sum(axis=1)):
        np.testing.assert_allclose(
            found[row, :length], expected[row, :length], atol=1e-3
        )
    del x[name]
    others = to_numpy(forward(model, x).tokens.logits())
    assert np.abs(found - others)[0, 10].max() > 1e-2


@pytest.mark.extra_large_but_on("torch")
def test_answers_are_the_most_likely_tokens_one_by_one():
    preprocessor = PREPROCESSORS[FAMILY]()
    model = make_model(
        FAMILY, vocabulary_size=preprocessor.tokenizer.vocabulary_size()
    )
    model.preprocessor = preprocessor
    prompts = ImagePrompts(model)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, 16, 24, 3)).astype("uint8")
    texts = [
        prompts.fill("{images}{question}", 2, question=question)
        for question in ("Is there a red page?", "Is there a page?")
    ]
    answers = prompts.generate(images, texts, 3)
    # Without padding, each prompt by itself.
    for row, answer in enumerate(answers):
        tokens = []
        for _ in range(3):
            own = preprocessor.generate_preprocess(
                {"images": [*images[row]], "prompts": [texts[row]]},
                sequence_length=40,
            )
            own = arrays(own)
            start = own["padding_mask"].sum()
            end = start + len(tokens)
            own["token_ids"][0, start:end] = tokens
            own["padding_mask"][0, start:end] = 1
            logits = to_numpy(model.score(own))
            tokens.append(int(logits[0, end - 1].argmax()))
        assert preprocessor.tokenizer.detokenize(tokens).startswith(answer)
        assert answer


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_prompts_may_be_put_in_another_order():
    model = make_model(FAMILY)
    inputs = make_inputs(model, batch=3)
    logits = to_numpy(forward(model, inputs).tokens.logits())
    order = [2, 0]
    moved = {name: value[order] for name, value in inputs.items()}
    found = to_numpy(forward(model, moved).tokens.logits())
    np.testing.assert_allclose(found, logits[order], atol=1e-4)


def changed(**changes):
    """Inputs in which some entries are made by a function of the old ones."""
    inputs = make_inputs(make_model(FAMILY))
    return inputs | {
        name: change(inputs[name]) for name, change in changes.items()
    }


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {
                "pixel_values": lambda x: x.reshape(-1, *x.shape[2:]),
                "image_grid_thw": lambda x: x.reshape(-1, 3),
            },
            "must have an axis of prompts.*KerasHub's preprocessor puts",
        ),
        (
            {"pixel_values": lambda x: x[:, :-1]},
            "equally many patches.*31 patches a prompt for 2 images.*one size",
        ),
    ],
)
def test_images_of_other_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        forward(make_model(FAMILY), changed(**changes))


@pytest.mark.parametrize(
    "row", [[1, 4, 6], [2, 2, 4]], ids=["another size", "two frames"]
)
def test_grids_of_images_that_differ_are_refused(row):
    inputs = make_inputs(make_model(FAMILY))
    check_grids(inputs)
    inputs["image_grid_thw"][1, 0] = row
    words = "one frame.*32 patches a prompt for 2 images, and image_grid_thw"
    with pytest.raises(ValueError, match=words):
        check_grids(inputs)
    # As a distiller and `find_retrieval_heads` do.
    with pytest.raises(ValueError, match=words):
        keras_laid.find_retrieval_heads(make_model(FAMILY), [inputs])


def test_a_compiled_step_must_know_the_length():
    inputs = make_inputs(make_model(FAMILY))
    inputs["token_ids"] = keras.KerasTensor((None, None), "int32")
    with pytest.raises(ValueError, match="one length.*run_eagerly=True"):
        forward(make_model(FAMILY), inputs)


def test_a_model_without_a_vision_encoder_is_refused():
    model = make_model(small_models.qwen_3_5)
    model.preprocessor = PREPROCESSORS[FAMILY]()
    with pytest.raises(ValueError, match="must have a vision encoder"):
        ImagePrompts(model)


def test_placeholders_of_ones_own_are_refused():
    form = prompt_form(PREPROCESSORS[FAMILY]())
    image = np.zeros((1, 2, 16, 16, 3), "uint8")
    for mark in ("<|image_pad|>", "<|video_pad|>"):
        with pytest.raises(ValueError, match="for each image.*Leave them out"):
            form.encode(image, [f"Is there {mark}?"], ["yes"], 32)


def test_haystacks_have_the_size_that_is_wanted():
    model = make_model(FAMILY)
    model.preprocessor = PREPROCESSORS[FAMILY]()
    image = np.zeros((20, 30, 3), "uint8")
    examples = [(image, "Is it red?", "yes"), (image, "Is it blue?", "no")]
    for size, shape in ((None, (16, 16)), ((16, 40), (16, 40))):
        haystacks = keras_laid.haystacks.example_haystacks(
            examples, 2, sizes=(2,), model=model, image_size=size
        )
        assert next(haystacks).images.shape == (2, *shape, 3)
    prompts = ImagePrompts(model)
    images = np.zeros((2, 16, 40, 3), "uint8")
    # Two images of 2 x 5 tokens and two marks.
    assert prompts.length(images, "") - prompts.length(images[:1], "") == 12


def test_the_default_size_has_the_fewest_pixels():
    preprocessor = PREPROCESSORS[FAMILY]()
    form = prompt_form(preprocessor)
    assert form.image_size == (16, 16)
    assert (form.image_length, form.position_length) == (4 + 2, 2 + 2)
    form = prompt_form(preprocessor, (16, 40))
    assert (form.image_length, form.position_length) == (10 + 2, 5 + 2)
