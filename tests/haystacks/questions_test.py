import pytest

from keras_laid.haystacks.questions import article
from keras_laid.haystacks.questions import multi_needle_question


@pytest.mark.parametrize(
    "phrase",
    [
        "a seven",
        "an eight",
        "an American football",
        "a unicorn",
        "an hourglass",
        "a T-shirt",
        "an one",
    ],
)
def test_article(phrase):
    assert article(phrase.split(" ", 1)[1]) == phrase


def test_wording_with_several_needles():
    assert multi_needle_question("knife", "orange", "any") == (
        "For all images with a knife, do any of them contain an orange?"
    )
