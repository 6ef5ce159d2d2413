"""Which keys belong to which image or segment, in every family."""

import numpy as np
import pytest

from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid.backbones.segments import segments_of
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import to_numpy

# Two images of four tokens among sixteen.
AMONG_TEXT = [0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0]
IMAGES = {
    small_models.pali_gemma: [1] * 4 + [0] * 16,
    small_models.pali_gemma_2: [1] * 4 + [0] * 16,
    small_models.gemma_3: AMONG_TEXT,
    small_models.gemma_4: AMONG_TEXT,
    small_models.qwen_3_5_images: AMONG_TEXT,
}
TEXT = [f for f in small_models.FAMILIES if f not in IMAGES]


def assert_segments(found, numbers, count):
    np.testing.assert_array_equal(to_numpy(found.numbers), numbers)
    assert found.num_segments == count


@pytest.mark.parametrize("family", IMAGES, ids=lambda family: family.__name__)
def test_images(family):
    model = make_model(family)
    inputs = make_inputs(model)
    numbers = IMAGES[family]
    found = segments_of(model, inputs, len(numbers))
    assert_segments(found, [numbers, numbers], max(numbers))


@pytest.mark.parametrize("backbone", [False, True])
def test_several_images_of_pali_gemma(backbone):
    model = make_model(small_models.pali_gemma)
    inputs = make_inputs(model)
    inputs["images"] = np.zeros((2, 3, 16, 16, 3), "float32")
    model = MultiImagePaliGemmaCausalLM.from_causal_lm(model)
    model = model.backbone if backbone else model
    numbers = [1] * 4 + [2] * 4 + [3] * 4 + [0] * 16
    assert_segments(segments_of(model, inputs, 28), [numbers, numbers], 3)


@pytest.mark.parametrize("family", TEXT, ids=lambda family: family.__name__)
def test_text_has_none_unless_they_are_numbered(family):
    model = make_model(family)
    inputs = make_inputs(model)
    assert segments_of(model, inputs, small_models.LENGTH) is None
    numbers = np.arange(2 * small_models.LENGTH).reshape(2, -1) // 5
    inputs["segments"] = numbers
    assert_segments(segments_of(model, inputs, 16, 6), numbers, 6)


@pytest.mark.parametrize("family", IMAGES, ids=lambda family: family.__name__)
def test_numbered_segments_replace_images(family):
    model = make_model(family)
    inputs = make_inputs(model)
    length = len(IMAGES[family])
    inputs["segments"] = np.arange(2 * length).reshape(2, -1) // 9
    found = segments_of(model, inputs, length, 5)
    assert_segments(found, inputs["segments"], 5)


def qwen_inputs():
    """As KerasHub's preprocessor makes them: three images in two prompts."""
    return {
        "token_ids": np.ones((2, 8), "int32"),
        "padding_mask": np.ones((2, 8), "int32"),
        "pixel_values": np.zeros((24, 2, 4, 4, 3), "float32"),
        "image_grid_thw": np.array([[1, 2, 4], [1, 2, 4], [1, 2, 4]]),
        # Places in the tokens of the whole batch.
        "vision_indices": np.array([1, 2, 5, 6, 11, 12]),
    }


def test_images_of_qwen_are_numbered_in_each_prompt():
    model = make_model(small_models.qwen_3_5)
    numbers = [[0, 1, 1, 0, 0, 2, 2, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert_segments(segments_of(model, qwen_inputs(), 8, 2), numbers, 2)
    # The inputs do not say how many images each prompt has.
    with pytest.raises(ValueError, match="number of segments must be known"):
        segments_of(model, qwen_inputs(), 8)


def test_prompts_without_images_have_none():
    model = make_model(small_models.gemma_3)
    inputs = make_inputs(model)
    inputs["images"] = inputs["images"][:, :0]
    inputs["vision_mask"] = np.zeros_like(inputs["vision_mask"])
    assert segments_of(model, inputs, small_models.LENGTH) is None
