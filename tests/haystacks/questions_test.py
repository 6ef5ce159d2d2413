import pytest

from keras_laid.haystacks import score
from keras_laid.haystacks.questions import article
from keras_laid.haystacks.questions import complies
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


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("Yes, there is a dog.", "yes"),
        ("The answer is **no**", "no"),
        ("'Yes'", "yes"),
        ("yes\n", "yes"),
        ("There is not.", None),
        ("yesterday, nobody", None),
        ("yes/no", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("rule", ["strict", "official"])
def test_rules_agree_on_plain_answers(answer, said, rule):
    for expected in ("yes", "no"):
        assert score(answer, expected, rule) == (said == expected)
    assert complies(answer, rule) == (said is not None)


@pytest.mark.parametrize("answer", ["yes or no", "No, yes.", "Yes! (No?)"])
@pytest.mark.parametrize("expected", ["yes", "no"])
def test_to_say_both_is_right_by_the_official_rule_alone(answer, expected):
    assert score(answer, expected, rule="official")
    assert not score(answer, expected, rule="strict")
    assert not score(answer, expected)  # The default.
    assert complies(answer, rule="official")
    assert not complies(answer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("yes", "Yes"), r"`expected` must be one of \['yes', 'no'\].*'Yes'"),
        (("yes", "yes", "lax"), "`rule` must be one of.*rule='lax'"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        score(*arguments)
