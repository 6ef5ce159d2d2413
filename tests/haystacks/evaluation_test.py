import numpy as np
import pytest

from keras_laid import Digits
from keras_laid import haystack_accuracy
from keras_laid.haystacks.evaluation import first_answer_is_right
from tests.support import make_pali_gemma
from tests.support import make_preprocessor


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
