import numpy as np
import pytest

from keras_laid import Digits
from keras_laid import effective_window
from keras_laid import haystack_accuracy
from keras_laid.haystacks.evaluation import first_answer_is_right
from tests.support import make_pali_gemma
from tests.support import make_preprocessor


def test_window_is_interpolated_in_the_logarithm():
    # Above chance: 0.4, 0.4, 0.28; 85% of 0.4 is 0.34, half-way down.
    window, censored = effective_window({1: 0.9, 10: 0.9, 40: 0.78})
    assert not censored
    np.testing.assert_allclose(window, 20.0)


def test_window_ends_at_the_first_fall():
    window, _ = effective_window({1: 1.0, 2: 0.6, 4: 1.0})
    assert 1 < window < 2


def test_window_that_never_ends_is_censored():
    assert effective_window({1: 0.9, 50: 0.95}) == (50.0, True)
    assert effective_window({3: 0.9}) == (3.0, True)


def test_window_ignores_the_order_of_sizes():
    accuracy = {1: 0.95, 5: 0.9, 20: 0.7}
    backwards = dict(reversed(accuracy.items()))
    assert effective_window(accuracy) == effective_window(backwards)


def test_window_grows_with_accuracy():
    rng = np.random.default_rng(0)
    sizes = (1, 2, 5, 10, 20)
    for _ in range(200):
        low = dict(zip(sizes, rng.uniform(0.5, 1.0, 5), strict=True))
        high = {
            size: value if size == 1 else min(1, value + rng.uniform(0, 0.2))
            for size, value in low.items()
        }
        assert effective_window(high)[0] >= effective_window(low)[0]


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [({}, "at least one size"), ({1: 0.5, 2: 0.9}, r"accuracy\[1\]=0.5")],
)
def test_windows_that_mean_nothing_are_refused(accuracy, words):
    with pytest.raises(ValueError, match=words):
        effective_window(accuracy)


def test_only_the_first_token_of_the_answer_counts():
    y = np.array([[5, 7, 1], [5, 8, 1], [5, 8, 1]])
    weight = np.array([[0, 1, 1]] * 3)
    logits = np.zeros((3, 3, 10), "float32")
    logits[0, 1, 7] = logits[1, 1, 7] = logits[2, 1, 9] = 1.0
    np.testing.assert_array_equal(
        first_answer_is_right(logits, y, weight), [True, False, False]
    )


@pytest.mark.parametrize("tokens_per_batch", [64, 10_000])
def test_an_untrained_model_answers_nothing(tokens_per_batch):
    # Strict scoring: any other token than the right answer is wrong.
    preprocessor = make_preprocessor()
    accuracy = haystack_accuracy(
        make_pali_gemma(None, preprocessor),
        Digits("test"),
        preprocessor,
        sizes=(1, 2),
        num_questions=20,
        tokens_per_batch=tokens_per_batch,
        verbose=False,
    )
    assert accuracy.keys() == {1, 2}
    assert max(accuracy.values()) <= 0.65
