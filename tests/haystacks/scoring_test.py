import pytest

from keras_laid.haystacks import NumberWithin
from keras_laid.haystacks import score
from keras_laid.haystacks.scoring import complies
from keras_laid.haystacks.scoring import rule_name

LETTERS = ("A", "B", "C", "D")


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


@pytest.mark.parametrize(
    ("answer", "options", "said"),
    [
        ("B", LETTERS, "B"),
        ("The answer is (C).", LETTERS, "C"),
        ("Image a, so D", LETTERS, "D"),  # "a" is a word, "A" an option.
        ("a", LETTERS, None),
        ("New York", ("York", "New York"), None),  # Two options.
        ("in Paris", ("York", "Paris"), "Paris"),
        ("11", ("1", "11"), "11"),
    ],
)
def test_options_of_a_question(answer, options, said):
    for expected in options:
        assert score(answer, expected, options=options) == (said == expected)
    assert complies(answer, options=options) == (said is not None)


@pytest.mark.parametrize(
    ("answer", "exact", "contains"),
    [
        ("The Red House.", True, True),
        ("It is the red house", False, True),
        ("red, the house", False, False),
        ("the red houses", False, False),
        ("", False, False),
    ],
)
def test_answers_in_free_words(answer, exact, contains):
    arguments = (answer, "the red house")
    assert score(*arguments, rule="exact", options=None) == exact
    assert score(*arguments, rule="contains", options=None) == contains
    assert complies(answer, rule="exact", options=None) is None


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("1,050", True),
        ("about 951 of them", True),
        ("1,060", False),
        ("-1000", False),
        ("1000 or 1001", False),  # Several numbers.
        ("1000, that is 1000", True),
        ("a thousand", False),
    ],
)
def test_numbers_within_a_tolerance(answer, right):
    rule = NumberWithin(relative=0.05)
    assert score(answer, "1000", rule, options=None) == right
    absolute = NumberWithin(absolute=50.0)
    assert score(answer, "1000", absolute, options=None) == right
    assert not score("1000.5", "1000", NumberWithin(), options=None)


def test_a_function_of_ones_own():
    def ends_alike(answer, expected):
        return answer.endswith(expected)

    assert score("so: 7", "7", ends_alike, options=None)
    assert not score("7?", "7", ends_alike, options=None)
    assert rule_name(ends_alike).endswith("ends_alike")
    assert rule_name(NumberWithin(0.1)) != rule_name(NumberWithin(0.2))


@pytest.mark.parametrize(
    ("call", "words", "error"),
    [
        (
            lambda: score("a", "a", options=None),
            "compare the options of a question.*rule='strict'",
            ValueError,
        ),
        (
            lambda: complies("a", options=None),
            "compare the options of a question",
            ValueError,
        ),
        (
            lambda: score("a", "seven", NumberWithin(), options=None),
            "expected answer must be a number. .*'seven'",
            ValueError,
        ),
        (
            lambda: NumberWithin(relative=1.0),
            r"`relative` must be in \[0, 1\)",
            ValueError,
        ),
        (
            lambda: NumberWithin(absolute=-1.0),
            "`absolute` must be in",
            ValueError,
        ),
        (
            lambda: score("a", "a", lambda *_: 1, options=None),
            "`rule` must return a boolean. .*returned 1 for 'a'",
            TypeError,
        ),
    ],
)
def test_wrong_rules_are_refused(call, words, error):
    with pytest.raises(error, match=words):
        call()
