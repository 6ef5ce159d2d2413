import keras_hub
import numpy as np
import pytest

from keras_laid import Digits
from keras_laid import Haystacks
from keras_laid import PositionStretching
from keras_laid.haystacks.dataset import question
from tests.support import make_haystacks
from tests.support import make_preprocessor


@pytest.fixture(scope="module")
def preprocessor():
    return make_preprocessor()


class Labels:
    """A source whose images are their labels, so that tests can read them."""

    names = tuple("abcdefghijklmnopqrst")
    image_size = 16

    def render(self, pairs, rng):
        images = np.zeros((len(pairs), 16, 16, 3), "uint8")
        images[:, 0, :2, 0] = pairs
        return images


def test_one_needle_and_the_right_answer(preprocessor):
    haystacks = Haystacks(Labels(), preprocessor, 64, (1, 5), batch_size=8)
    tokenizer = preprocessor.tokenizer
    yes, no = (int(tokenizer(word)[0]) for word in ("yes", "no"))
    answers = []
    for index in range(len(haystacks)):
        x, y, sample_weight = haystacks[index]
        labels = np.round((x["images"][..., 0, :2, 0] + 1) * 127.5)
        for row in range(8):
            number = index * 8 + row
            anchor = haystacks.anchors[number]
            needles = (labels[row] == anchor).any(axis=-1)
            assert needles.sum() == 1
            assert len(np.unique(labels[row])) <= 10
            (needle,) = labels[row][needles]
            assert needle[0] != needle[1]
            answer = haystacks.targets[number] in needle
            first = sample_weight[row].argmax()
            assert y[row, first] == (yes if answer else no)
            assert y[row, first + 1] == tokenizer.end_token_id
            assert sample_weight[row].sum() == 2
            answers.append(answer)
    assert np.mean(answers) == 0.5


def test_question_is_a_sentence(preprocessor):
    assert (
        question("seven", "eight")
        == "For the image with a seven, is there an eight?"
    )
    x, _, _ = make_haystacks(preprocessor)[0]
    assert (x["token_ids"] != 3).all()  # No unknown token.


@pytest.mark.parametrize("length", [4, 11, 12, 20])
def test_no_question_is_cut(preprocessor, length):
    """Inputs have 12 tokens: a start, ten words and an answer."""
    whole = make_haystacks(with_length(preprocessor, 30))[0]
    x, y, sample_weight = make_haystacks(with_length(preprocessor, length))[0]
    expected = max(length, 12)
    assert whole[0]["padding_mask"].sum(axis=1).max() == 13  # With an end.
    assert y.shape == (4, expected)
    for name in ("token_ids", "padding_mask", "response_mask"):
        np.testing.assert_array_equal(x[name], whole[0][name][:, :expected])
    np.testing.assert_array_equal(y, whole[1][:, :expected])
    np.testing.assert_array_equal(sample_weight, whole[2][:, :expected])


def test_positions_are_as_long_as_the_text(preprocessor):
    data = make_haystacks(
        with_length(preprocessor, 4), stretching=PositionStretching(9, 4)
    )
    x, _, _ = data[0]
    tokens = 4 * x["images"].shape[1] + x["token_ids"].shape[1]
    assert x["positions"].shape == (4, tokens)


def with_length(preprocessor, length):
    return keras_hub.models.PaliGemmaCausalLMPreprocessor(
        preprocessor.tokenizer,
        preprocessor.image_converter,
        sequence_length=length,
    )


def test_batches_depend_on_seed_and_index_alone(preprocessor):
    stretching = PositionStretching(10, 4)
    one, two, other = (
        make_haystacks(preprocessor, seed=seed, stretching=stretching)
        for seed in (1, 1, 2)
    )
    _ = one[0]
    for name, values in one[1][0].items():
        np.testing.assert_array_equal(values, two[1][0][name])
    assert (one[1][0]["images"] != other[1][0]["images"]).any()


def test_positions_are_drawn_anew_each_epoch(preprocessor):
    haystacks = make_haystacks(
        preprocessor, stretching=PositionStretching(50, 4)
    )
    before = haystacks[0][0]
    haystacks.on_epoch_end()
    after = haystacks[0][0]
    np.testing.assert_array_equal(before["images"], after["images"])
    assert (before["positions"] != after["positions"]).any()


def test_sizes_are_shared_out_and_the_first_two_differ(preprocessor):
    for seed in range(5):
        haystacks = make_haystacks(preprocessor, 40, (2, 3, 4), seed=seed)
        sizes = [
            haystacks[i][0]["images"].shape[1] for i in range(len(haystacks))
        ]
        assert sizes[0] != sizes[1]
        assert {sizes.count(size) for size in (2, 3, 4)} <= {3, 4}


def test_last_batch_may_be_short(preprocessor):
    haystacks = make_haystacks(preprocessor, num_questions=10)
    assert [len(haystacks[i][1]) for i in range(len(haystacks))] == [4, 4, 2]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(num_questions=0), "`num_questions` must be at least 1"),
        (dict(sizes=()), "`sizes` must be one or more integers of at least 1"),
        (dict(sizes=(2, 0)), r"sizes=\(2, 0\)"),
        (dict(batch_size=0), "`batch_size` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(preprocessor, kwargs, words):
    arguments = dict(num_questions=4, sizes=(2,), batch_size=4)
    with pytest.raises(ValueError, match=words):
        Haystacks(Digits("train"), preprocessor, **{**arguments, **kwargs})


def test_images_of_another_size_are_refused(preprocessor):
    from keras_hub.layers import PaliGemmaImageConverter
    from keras_hub.models import PaliGemmaCausalLMPreprocessor

    other = PaliGemmaCausalLMPreprocessor(
        preprocessor.tokenizer, PaliGemmaImageConverter(image_size=(224, 224))
    )
    with pytest.raises(ValueError, match=r"image_size=16.*\(224, 224\)"):
        Haystacks(Digits("train"), other, 4, (2,))
    Haystacks(Digits("train", image_size=224), other, 4, (2,))


@pytest.mark.parametrize(
    "wrong", [dict(scale=float("nan")), dict(offset=[0.0, 0.0, float("inf")])]
)
def test_images_that_are_not_finite_are_refused(preprocessor, wrong):
    converter = keras_hub.layers.PaliGemmaImageConverter(**wrong)
    other = keras_hub.models.PaliGemmaCausalLMPreprocessor(
        preprocessor.tokenizer, converter
    )
    with pytest.raises(ValueError, match="must be finite. Received: scale="):
        make_haystacks(other)


def test_sources_that_could_render_nan_are_refused(preprocessor):
    class Broken(Labels):
        def render(self, pairs, rng):
            images = super().render(pairs, rng).astype("float32")
            images[0, 0, 0] = np.nan
            return images

    with pytest.raises(ValueError, match="none can be NaN.*float32"):
        _ = Haystacks(Broken(), preprocessor, 4, (2,))[0]
