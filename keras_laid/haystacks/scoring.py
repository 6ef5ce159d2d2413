"""Rules that say whether an answer in words is right."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_number
from keras_laid.haystacks.questions import ANSWERS

RULES = ("strict", "official", "exact", "contains", "contains_all")
OF_OPTIONS = RULES[:2]  # Rules that compare the options of a question.

# The name of a rule, or a function of an answer and the expected one.
Rule = str | Callable[[str, str], bool]


def score(
    answer: str,
    expected: str,
    rule: Rule = "strict",
    options: tuple[str, ...] | None = ANSWERS,
) -> bool:
    """Whether an answer in words is right.

    | rule | an answer is right if |
    | --- | --- |
    | `"strict"` | it holds the expected option and no other one |
    | `"official"` | it holds the expected option, whatever else it holds |
    | `"exact"` | it consists of the expected words |
    | `"contains"` | it holds the expected words, next to each other |
    | `"contains_all"` | it holds each expected part; commas divide them |
    | a function | the function of the answer and the expected one says so |

    Rules by name compare whole words, so that `"not"` does not count as
    `"no"`, and ignore case and punctuation. An option of one letter, such as
    `"A"`, must have the right case, since "a" is also an English word.

    By the official rule of the Visual Haystacks benchmark `"yes or no"` is
    right whatever was asked.

    Args:
        answer: String, the model's answer.
        expected: String, the right answer: one of `options`, if there are any.
        rule: `"strict"`, `"official"`, `"exact"`, `"contains"`,
            `"contains_all"`, or a function of two strings that returns a
            boolean, such as
            `keras_laid.haystacks.NumberWithin(relative=0.05)`. Defaults to
            `"strict"`.
        options: Tuple of strings, the possible answers, or `None` for answers
            in free words, for which `"strict"` and `"official"` are not
            defined. Defaults to `("yes", "no")`.

    Returns:
        A boolean.

    Raises:
        ValueError: If `rule` is not one of those above, if `expected` is not an
            option, or if the rule needs options and there are none.
        TypeError: If `answer` is not a string, or if a function does not return
            a boolean.

    Reference:
     - `"official"`: the benchmark's `utils.py`, which splits words with NLTK;
       here they are split at spaces and punctuation, not at hyphens and
       slashes.
    """
    check_rule(rule)
    _check_string(answer)
    if options is not None:
        check_choice("expected", expected, options)
    if callable(rule):
        right = rule(answer, expected)
        if not isinstance(right, bool):
            raise TypeError(
                "`rule` must return a boolean. Received: "
                f"{rule_name(rule)} returned {right!r:.80} for {answer!r:.80}"
            )
        return right
    if rule == "exact":
        return _words(answer) == _words(expected)
    if rule == "contains":
        return _holds(answer, expected)
    if rule == "contains_all":
        return all(_holds(answer, part) for part in expected.split(","))
    said = _said(answer, rule, options)
    return said == {expected} if rule == "strict" else expected in said


def complies(
    answer: str,
    rule: Rule = "strict",
    options: tuple[str, ...] | None = ANSWERS,
) -> bool | None:
    """Whether an answer in words is an option at all, right or wrong.

    By the official rule an answer may hold several options, by the strict one
    only one of them.

    Args:
        answer: String, the model's answer.
        rule: As in `score`. Defaults to `"strict"`.
        options: Tuple of strings, the possible answers, or `None` for answers
            in free words. Defaults to `("yes", "no")`.

    Returns:
        A boolean, or `None` by the other rules, which know no options.

    Raises:
        ValueError: If `rule` is not one of those of `score`, or if it needs
            options and there are none.
        TypeError: If `answer` is not a string.
    """
    check_rule(rule)
    _check_string(answer)
    if rule not in OF_OPTIONS:
        return None
    said = _said(answer, rule, options)
    return len(said) == 1 if rule == "strict" else bool(said)


@dataclasses.dataclass(frozen=True)
class NumberWithin:
    """A rule: the answer holds one number, and it is close to the expected one.

    The bound is that of `math.isclose`: the numbers differ at most by
    `absolute`, or by `relative` times the larger of the two. Commas between
    digits are dropped. An answer with several different numbers is wrong.

    Args:
        relative: Float in `[0, 1)`, the largest relative difference. Defaults
            to `0.0`.
        absolute: Float, at least 0, the largest difference. Defaults to `0.0`.

    Raises:
        ValueError: If an argument is out of its range, or when called, if the
            expected answer is not a number.
        TypeError: If an argument is not a number.
    """

    relative: float = 0.0
    absolute: float = 0.0

    def __post_init__(self) -> None:
        check_number("relative", self.relative, "[0, 1)")
        check_number("absolute", self.absolute, "[0, inf)")

    def __call__(self, answer: str, expected: str) -> bool:
        wanted = _numbers(expected)
        if len(wanted) != 1:
            raise ValueError(
                "The expected answer must be a number. "
                f"Received: {expected!r:.80}"
            )
        found = _numbers(answer)
        return len(found) == 1 and math.isclose(
            *found, *wanted, rel_tol=self.relative, abs_tol=self.absolute
        )


def check_rule(rule: Any) -> None:
    """Refuses a rule that is neither a function nor known by name."""
    if not callable(rule):
        check_choice("rule", rule, RULES)


def check_rule_for(rule: Rule, options: tuple[str, ...] | None) -> None:
    """Refuses a rule of options where a question has none."""
    if rule in OF_OPTIONS and options is None:
        raise ValueError(
            f"The rules {OF_OPTIONS} compare the options of a question. "
            f"Received: rule={rule!r} for a question without options. Pass "
            "`rule='exact'`, `'contains'` or a function."
        )


def rule_name(rule: Rule) -> str:
    """A string that names a rule: the name of a function with its module."""
    if isinstance(rule, str):
        return rule
    if hasattr(rule, "__qualname__"):
        return f"{rule.__module__}.{rule.__qualname__}"
    return repr(rule)


def _said(answer: str, rule: Rule, options: tuple[str, ...] | None) -> set[str]:
    """The options that an answer holds."""
    check_rule_for(rule, options)
    return {option for option in options or () if _holds(answer, option)}


def _holds(answer: str, phrase: str) -> bool:
    keep_case = len(phrase) == 1 and phrase.isalpha()
    words, wanted = _words(answer, keep_case), _words(phrase, keep_case)
    return any(
        words[start : start + len(wanted)] == wanted
        for start in range(len(words) - len(wanted) + 1)
    )


def _words(text: str, keep_case: bool = False) -> list[str]:
    parts = re.split(
        r"[\s,;:!?()\[\]{}\"*]+|--", text if keep_case else text.lower()
    )
    return [word for part in parts if (word := part.strip(".'`"))]


def _numbers(text: str) -> set[float]:
    plain = re.sub(r"(?<=\d),(?=\d)", "", text)
    return {float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", plain)}


def _check_string(answer: object) -> None:
    if not isinstance(answer, str):
        raise TypeError(
            f"`answer` must be a string. Received: answer={answer!r:.80}"
        )
