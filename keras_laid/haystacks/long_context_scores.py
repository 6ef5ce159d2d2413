"""Scores answers to MM-NIAH and MMLongBench, as asked for or as published."""

import json
import re
import string
from collections.abc import Sequence
from typing import Any
from typing import Literal

import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_kind
from keras_laid.haystacks.long_context import CHOICES
from keras_laid.haystacks.long_context import COUNTS
from keras_laid.haystacks.long_context import VISUAL_HAYSTACKS
from keras_laid.haystacks.long_context import LongContextQuestion
from keras_laid.haystacks.scoring import OF_OPTIONS
from keras_laid.haystacks.scoring import score

ARTICLES = ("a", "an", "the")
# Punctuation in MM-NIAH's scorer, and the words that it reads as numbers.
MARKS = ';/[]"{}()=+\\_-><@`,?!'
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: str(number) for number, word in enumerate(UNITS.split())}
NUMBERS |= {word: f"{ten}0" for ten, word in enumerate(TENS.split(), start=2)}
# The answers that MMLongBench assumes, in turn, for replies without yes or no.
IN_TURN = ("no", "yes", "yes", "no")


def score_mm_niah(
    answers: Sequence[str],
    questions: Sequence[LongContextQuestion],
    rule: Literal["strict", "official"] = "strict",
) -> np.ndarray:
    """Scores answers to questions of MM-NIAH.

    Counting questions get the benchmark's soft accuracy, the share of numbers
    that are right at their position of the list; all others get 0 or 1.

    By the strict rule, an answer may begin with `"Answer:"` and must then hold
    only what the question asks for: the expected words, except for case,
    punctuation and articles; the letter of a choice; or a list in JSON of the
    right length.

    By the official rule,

    - an answer in words is right if it contains the expected words, so that
      `"not an oak"` is right where `"oak"` is;
    - numbers after the expected ones are ignored: `[1, 2, 9, 9]` is fully right
      where `[1, 2]` is, and lists in a dictionary are joined;
    - an answer to a multiple-choice question must be a letter before its first
      full stop, or a number, the index from 0: `"B. A cat"` and `"1"` are B;
      `"(B)"` and `"B) A cat"` are wrong;
    - `"the camera is moving left"` is A and `"... right"` is B, whatever the
      choices are.

    The benchmark's `val_mmniah.py` counts every soft accuracy above 0 as 1,
    and `calculate_scores.py` takes the mean over a table of lengths and depths
    whose empty cells are 0; both differ from the mean of what is returned.

    Args:
        answers: Sequence of strings, the model's answers.
        questions: Sequence of as many `LongContextQuestion`s, of MM-NIAH's
            tasks.
        rule: `"strict"` or `"official"`. Defaults to `"strict"`.

    Returns:
        A `float64` array of shape `(questions,)` with values in `[0, 1]`.

    Raises:
        ValueError: If there are not as many answers as questions, if a
            question is one of Visual Haystacks, or if `rule` is unknown.
        TypeError: If an answer is not a string, or a question of another kind.

    Reference:
     - `is_correct` of `calculate_scores.py` and `VQAEval` of `utils/tools.py`
       of `OpenGVLab/MM-NIAH` at commit 2fd03dd. Its table of contractions,
       which turns `"dont"` into `"don't"`, is left out.
    """
    pairs = _pairs(answers, questions, rule)
    for question in questions:
        if question.task in VISUAL_HAYSTACKS:
            raise ValueError(
                "`score_mm_niah` scores questions of MM-NIAH. Received: "
                f"{question.id!r:.80} of the task {question.task}. Use "
                "`score_mm_long_bench`."
            )
    how = _strict if rule == "strict" else _mm_niah
    return np.array([how(*pair) for pair in pairs], float)


def score_mm_long_bench(
    answers: Sequence[str],
    questions: Sequence[LongContextQuestion],
    rule: Literal["strict", "official"] = "strict",
) -> np.ndarray:
    """Scores answers to questions of MMLongBench's haystacks.

    The strict rule is that of `score_mm_niah`; for Visual Haystacks, that of
    `score`: one of yes and no must be in the answer, and the other must not.

    By the official rule,

    - the metric of counting questions that its code calls `soft_acc` is not
      MM-NIAH's: it compares the sums of two lists, so that `[3, 0]` is right
      where `[1, 2]` is. Without a list, all numbers in the answer are added;
      an answer without numbers has the sum 0;
    - in Visual Haystacks the last yes or no counts. Answers without either
      count as no, yes, yes, no in turn, by their places in `answers`, so that
      about half of them are right;
    - an answer in words is right if it contains the expected letters, even
      inside a word: `"soaked"` is right where `"oak"` is;
    - each answer is read twice, with `"Answer:"` before it and without, and the
      better reading counts. With `"Answer:"`, the first letter is read as the
      choice if it is one of A to J: `"Both show D."` is right where B is right,
      and where D is. Since `"Answer:"` itself begins with A, `"Answer: D"` is
      also right where A is.

    Its `eval_api_batch.py` assigns these turns in the order in which threads
    handle the replies, and leaves out empty replies; its
    `figure_scripts/utils.py`, which makes the tables of the paper, subtracts
    accuracies of Visual Haystacks below 50% from 100%. Neither is done here.

    Args:
        answers: Sequence of strings, the model's answers, without the
            `"Answer:"` at the end of the benchmark's prompts.
        questions: Sequence of as many `LongContextQuestion`s, in the order of
            the file.
        rule: `"strict"` or `"official"`. Defaults to `"strict"`.

    Returns:
        A `float64` array of shape `(questions,)` with values in `[0, 1]`.

    Raises:
        ValueError: If there are not as many answers as questions, or if `rule`
            is unknown.
        TypeError: If an answer is not a string, or a question of another kind.

    Reference:
     - `calculate_metrics` of `utils.py`, `DefaultAnswerGenerator` and
       `default_post_process` of `data.py`, and `run_test` of `eval.py`, which
       puts `"Answer:"` before replies, of `EdinburghNLP/MMLongBench` at commit
       22b9f27.
    """
    pairs = _pairs(answers, questions, rule)
    if rule == "strict":
        return np.array([_strict(*pair) for pair in pairs], float)
    scores = [
        _last_of_yes_and_no(answer, IN_TURN[place % 4]) == question.answer
        if question.task in VISUAL_HAYSTACKS
        else _mm_long_bench(answer, question)
        for place, (answer, question) in enumerate(pairs)
    ]
    return np.array(scores, float)


def _pairs(
    answers: Any, questions: Any, rule: str
) -> list[tuple[str, LongContextQuestion]]:
    check_choice("rule", rule, OF_OPTIONS)
    for name, values, kind, words in (
        ("answers", answers, str, "strings"),
        ("questions", questions, LongContextQuestion, "`LongContextQuestion`s"),
    ):
        check_kind(name, values, (list, tuple), f"a list or tuple of {words}")
        for place, value in enumerate(values):
            check_kind(f"{name}[{place}]", value, kind, f"one of the {words}")
    if len(answers) != len(questions):
        raise ValueError(
            "There must be as many answers as questions. Received: "
            f"{len(answers)} answers and {len(questions)} questions"
        )
    return list(zip(answers, questions, strict=True))


def _strict(answer: str, question: LongContextQuestion) -> float:
    if question.task in VISUAL_HAYSTACKS:
        return score(answer, question.answer)
    said = _without_prefix(answer)
    if question.task in COUNTS:
        numbers = _json(said.strip("`").removeprefix("json"))
        fits = isinstance(numbers, list) and len(numbers) == len(
            question.answer
        )
        # `True` and `1.0` are equal to 1 as well.
        if not fits or any(type(number) is not int for number in numbers):
            return 0.0
        return _matches(numbers, question.answer)
    if question.task in CHOICES:
        letter = re.fullmatch(r"[(*]*([A-Za-z])[)*.:]*", said)
        return letter is not None and _index(letter[1]) == question.answer
    return _plain(said) in [_plain(words) for words in question.answer]


def _mm_niah(answer: str, question: LongContextQuestion) -> float:
    said = answer.strip(".")
    if question.task in COUNTS:
        numbers = _json(said.replace("json", "").replace("```", "").strip())
        if isinstance(numbers, dict):
            lists = list(numbers.values())
            if not all(isinstance(value, list) for value in lists):
                return 0.0
            numbers = sum(lists, [])
        if not isinstance(numbers, list):
            return 0.0
        return _matches(numbers, question.answer)
    if question.task in CHOICES:
        if said.isdecimal():
            return float(said) == question.answer
        said = said.lower().replace("the answer is", "").replace("*", "")
        if "." in said:
            said = said.split(".")[0].replace(",", "")
        for way, letter in (("left", "a"), ("right", "b")):
            if f"the camera is moving {way}" in said:
                said = letter
                break
        said = said.strip()
        return len(said) == 1 and _index(said) == question.answer
    said = _normalised(said)
    return any(
        re.search(rf"\b{re.escape(_normalised(words))}\b", said)
        for words in question.answer
    )


def _mm_long_bench(answer: str, question: LongContextQuestion) -> float:
    readings = ("Answer:" + answer, _without_prefix(answer))
    if question.task in COUNTS:
        expected = sum(question.answer)
        return any(sum(_numbers(said)) == expected for said in readings)
    if question.task in CHOICES:
        return any(_choice(said) == question.answer for said in readings)
    return any(
        _plain(words) in _plain(said)
        for words in question.answer
        for said in readings
    )


def _without_prefix(answer: str) -> str:
    return re.sub("^answer:", "", answer.strip(), flags=re.IGNORECASE).strip()


def _without_articles(text: str) -> str:
    return " ".join(re.sub(rf"\b({'|'.join(ARTICLES)})\b", " ", text).split())


def _plain(text: str) -> str:
    """Lower case, without punctuation and articles."""
    marks = str.maketrans("", "", string.punctuation)
    return _without_articles(text.lower().translate(marks))


def _normalised(text: str) -> str:
    """MM-NIAH's words: no articles, no marks, numbers in digits."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    has_thousands = re.search(r"\d,\d", text)
    words = text
    for mark in MARKS:
        vanishes = has_thousands or f"{mark} " in text or f" {mark}" in text
        words = words.replace(mark, "" if vanishes else " ")
    words = re.sub(r"\.(?!\d)", "", words)
    numbered = [NUMBERS.get(word, word) for word in words.lower().split()]
    return " ".join(word for word in numbered if word not in ARTICLES)


def _index(letter: str) -> int:
    return ord(letter.lower()) - ord("a")


def _json(text: str) -> Any:
    """The value of a text in JSON, or `None`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _matches(numbers: Sequence[Any], expected: Sequence[Any]) -> float:
    pairs = zip(numbers, expected, strict=False)
    return sum(one == other for one, other in pairs) / len(expected)


def _numbers(text: str) -> list[Any]:
    """The last list in brackets, or all numbers in the text."""
    text = _without_articles(text.lower())
    for pattern in (r"\[[\d\s,]+\]", r"\[.*?\]"):
        *_, last = ["", *re.findall(pattern, text)]
        values = _json(last)
        if values is not None:
            return [int(v) for v in values if _is_whole(v)]
    return [float(digits) for digits in re.findall(r"\d+", text)]


def _is_whole(value: Any) -> bool:
    try:
        int(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _choice(text: str) -> int | None:
    text = " ".join(text.split())
    for pattern in (r"answer is \(?([A-J])", r"[aA]nswer:\s*([A-J])"):
        if match := re.search(pattern, text):
            return _index(match[1])
    letters = re.findall(r"\b[A-J]\b", text)
    return _index(letters[-1]) if letters else None


def _last_of_yes_and_no(answer: str, default: str) -> str:
    """The last of them; digits never count, as `"Answer:"` is before them."""
    return [default, *re.findall(r"\b(?:yes|no)\b", answer.lower())][-1]
