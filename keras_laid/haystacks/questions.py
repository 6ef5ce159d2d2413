"""The wording of the Visual Haystacks benchmark, and the rules of scoring."""

import re
from typing import Literal

from keras_laid.arguments import check_choice

ANSWERS = ("yes", "no")
RULES = ("strict", "official")
# By name, what is asked of a model, with the question in it.
PROMPTS = {
    "question": "{question}",
    "official": "You are given a set of images. Please answer the following "
    "question in Yes or No: {question}",
}


def article(name: str) -> str:
    """`"a seven"`, `"an eight"`, `"a unicorn"`, `"an hourglass"`.

    By spelling, with one exception for each sound: `"an one"` is what the
    embedded presets were trained on.
    """
    vowel = name[0].lower() in "aeiou" and not name.startswith("uni")
    return f"{'an' if vowel or name.startswith('hour') else 'a'} {name}"


def question(anchor: str, target: str) -> str:
    """The question of the Visual Haystacks benchmark, with one needle."""
    return f"For the image with {article(anchor)}, is there {article(target)}?"


def multi_needle_question(anchor: str, target: str, quantifier: str) -> str:
    """The benchmark's question with several needles.

    Args:
        anchor: String, a name; every needle shows it.
        target: String, the name asked for.
        quantifier: `"all"` or `"any"` of the needles.

    Returns:
        A string.
    """
    return (
        f"For all images with {article(anchor)}, "
        f"do {quantifier} of them contain {article(target)}?"
    )


def score(
    answer: str,
    expected: str,
    rule: Literal["strict", "official"] = "strict",
) -> bool:
    """Whether an answer in words is right.

    Both rules ignore case and punctuation, and look at whole words: `"not"` is
    no `"no"`. The official one looks for the expected word and for nothing
    else, so that `"yes or no"` is right whatever was asked. The strict one
    wants it to be the only one of `"yes"` and `"no"` in the answer.

    Args:
        answer: String, what a model said.
        expected: `"yes"` or `"no"`.
        rule: `"strict"` or `"official"`. Defaults to `"strict"`.

    Returns:
        A boolean.

    Raises:
        ValueError: If `expected` or `rule` is none of those.
        TypeError: If `answer` is not a string.

    Reference:
     - The benchmark's `utils.py`, which splits words with NLTK; here they are
       split at spaces and punctuation, not at hyphens and slashes.
    """
    check_choice("expected", expected, ANSWERS)
    said = _said(answer)
    if _is_strict(rule):
        return said == {expected}
    return expected in said


def complies(
    answer: str, rule: Literal["strict", "official"] = "strict"
) -> bool:
    """Whether an answer in words is yes or no at all, be it right or wrong.

    By the official rule it holds `"yes"`, `"no"` or both, by the strict one
    only one of them.

    Args:
        answer: String, what a model said.
        rule: `"strict"` or `"official"`. Defaults to `"strict"`.

    Returns:
        A boolean.

    Raises:
        ValueError: If `rule` is none of those.
    """
    said = _said(answer)
    return len(said) == 1 if _is_strict(rule) else bool(said)


def _said(answer: str) -> set[str]:
    if not isinstance(answer, str):
        raise TypeError(
            f"`answer` must be a string. Received: answer={answer!r:.80}"
        )
    words = re.split(r"[\s,;:!?()\[\]{}\"*]+|--", answer.lower())
    return {word.strip(".'`") for word in words} & set(ANSWERS)


def _is_strict(rule: str) -> bool:
    check_choice("rule", rule, RULES)
    return rule == "strict"
