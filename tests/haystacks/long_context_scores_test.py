import numpy as np
import pytest

from keras_laid.haystacks import LongContextQuestion
from keras_laid.haystacks import score_mm_long_bench
from keras_laid.haystacks import score_mm_niah


def ask(answer, task=None):
    """A question with this right answer, of a task that has such answers."""
    tasks = {str: "vh_single", int: "retrieval-image"}
    if isinstance(answer, tuple):
        words = isinstance(answer[0], str)
        task = task or ("retrieval-text" if words else "counting-image")
    return LongContextQuestion(
        id=0,
        task=task or tasks[type(answer)],
        context="<image>",
        question="Q?",
        choices=("1", "2", "3", "4") if isinstance(answer, int) else None,
        answer=answer,
        images=("1.jpg",),
        depths=(),
        length=8192,
    )


# What is said and is right; the strict score, and the two official ones.
WORDS = ("oak",)
SCORES = [
    ("oak", WORDS, 1, 1, 1),
    ("An Oak.", WORDS, 1, 1, 1),
    ("Answer: oak", WORDS, 1, 1, 1),
    ("elm", WORDS, 0, 0, 0),
    ("", WORDS, 0, 0, 0),
    # Containment.
    ("not an oak", WORDS, 0, 1, 1),
    ("oak or elm", WORDS, 0, 1, 1),
    # A part of a word.
    ("soaked", WORDS, 0, 0, 1),
    # Marks within words: MM-NIAH parts words there, MMLongBench joins them.
    ("oak-tree", WORDS, 0, 1, 1),
    ("blackoak", ("black-oak",), 1, 0, 1),
    ("black oak", ("black-oak",), 0, 1, 0),
    # Numbers in words, which MM-NIAH's scorer takes for digits.
    ("2 cats", ("two",), 0, 1, 0),
    ("Twenty", ("20",), 0, 1, 0),
    ("1000", ("1,000",), 1, 1, 1),
    # Several right answers.
    ("elm", ("oak", "elm"), 1, 1, 1),
    # MM-NIAH compares place by place, MMLongBench sums.
    ("[1, 2]", (1, 2), 1, 1, 1),
    ("[1, 2].", (1, 2), 0, 1, 1),
    ("[2, 1]", (1, 2), 0, 0, 1),
    ("[3, 0]", (1, 2), 0, 0, 1),
    ("[1, 3]", (1, 2), 0.5, 0.5, 0),
    ("[5, 2, 3, 1]", (1, 2, 3, 4), 0.5, 0.5, 0),
    ("[1]", (1, 2), 0, 0.5, 0),
    ("[1, 2, 9]", (1, 2), 0, 1, 0),
    ("[1, 2, 0]", (1, 2), 0, 1, 1),
    ("```json\n[1, 2]\n```", (1, 2), 1, 1, 1),
    ('{"a": [1], "b": [2]}', (1, 2), 0, 1, 0),
    ('{"a": 1, "b": 2}', (1, 2), 0, 0, 1),
    ("[true, 2.0]", (1, 2), 0, 1, 1),
    ('["1", "2", "x"]', (1, 2), 0, 0, 1),
    ("I count [1, 2]", (1, 2), 0, 0, 1),
    ("[9] or rather [1, 2]", (1, 2), 0, 0, 1),
    ("[1 2]", (1, 2), 0, 0, 1),
    ("two cats in image 3", (1, 2), 0, 0, 1),
    ("12", (1, 2), 0, 0, 0),
    ("null", (1, 2), 0, 0, 0),
    # Nothing adds up to 0.
    ("I cannot tell.", (0, 0), 0, 0, 1),
    ("[" * 9999 + "]", (0, 1), 0, 0, 0),
    ("9" * 9999, (0, 1), 0, 0, 0),
    # Choices.
    ("B", 1, 1, 1, 1),
    ("b", 1, 1, 1, 0),
    ("(B)", 1, 1, 0, 1),
    ("**B**.", 1, 1, 1, 1),
    ("C", 1, 0, 0, 0),
    ("", 1, 0, 0, 0),
    ("The answer is B", 1, 0, 1, 1),
    ("B. A cat", 1, 0, 1, 1),
    ("B) A cat", 1, 0, 0, 1),
    ("1", 1, 0, 1, 0),
    ("1.", 1, 0, 1, 0),
    ("9" * 9999, 1, 0, 0, 0),
    ("None", 1, 0, 0, 0),
    ("so the camera is moving right", 1, 0, 1, 0),
    ("so the camera is moving left", 0, 0, 1, 0),
    # MMLongBench reads it with "Answer:" before it, too.
    ("Both show D.", 1, 0, 0, 1),
    ("Both show D.", 3, 0, 0, 1),
    ("Both show D.", 0, 0, 0, 0),
    ("Answer: D", 3, 1, 0, 1),
    ("Answer: D", 0, 0, 0, 1),
    ("Answer: D", 2, 0, 0, 0),
    ("A or B, so the answer is C", 2, 0, 0, 1),
    ("not A; rather C", 2, 0, 0, 1),
]


@pytest.mark.parametrize("said, right, strict, niah, long_bench", SCORES)
def test_scores(said, right, strict, niah, long_bench):
    answers, questions = [said], [ask(right)]
    for score in (score_mm_niah, score_mm_long_bench):
        assert score(answers, questions) == [strict]
    assert score_mm_niah(answers, questions, rule="official") == [niah]
    scored = score_mm_long_bench(answers, questions, rule="official")
    assert scored == [long_bench]


def test_tasks_of_a_kind_are_scored_alike():
    for right, task in (
        (("oak",), "reasoning-text"),
        ((1, 2), "counting-text"),
        (1, "reasoning-image"),
    ):
        questions = [ask(right), ask(right, task)]
        for rule in ("strict", "official"):
            for score in (score_mm_niah, score_mm_long_bench):
                for said in ("oak", "[1, 3]", "B"):
                    one, other = score([said] * 2, questions, rule)
                    assert one == other


@pytest.mark.parametrize(
    "said, strict, official",
    [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("No, I mean yes.", None, "yes"),
        ("no-one", None, "no"),
        ("There is nobody.", None, None),
        ("1", None, None),
    ],
)
def test_yes_and_no(said, strict, official):
    for right in ("yes", "no"):
        questions = [ask(right), ask(right, "vh_multi")]
        scores = score_mm_long_bench([said] * 2, questions)
        assert scores.tolist() == [strict == right] * 2
        # The first that is not read counts as no, the second as yes.
        scores = score_mm_long_bench([said] * 2, questions, rule="official")
        read = [official or "no", official or "yes"]
        assert scores.tolist() == [word == right for word in read]


def test_what_is_not_read_counts_by_its_place():
    answers = ["yes", *["?"] * 8]  # One that is read takes its turn, too.
    questions = [ask("yes")] * 9
    scores = score_mm_long_bench(answers, questions, rule="official")
    assert scores.tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 0]
    assert score_mm_long_bench(answers, questions).tolist() == [1] + [0] * 8


def test_an_array():
    scores = score_mm_niah(["oak", "elm"], [ask(("oak",))] * 2)
    assert isinstance(scores, np.ndarray)
    assert (scores.dtype, scores.shape) == ("float64", (2,))


@pytest.mark.parametrize("score", [score_mm_niah, score_mm_long_bench])
def test_wrong_arguments_are_refused(score):
    one = ask(("oak",))
    with pytest.raises(ValueError, match="1 answers and 2 questions"):
        score(["oak"], [one, one])
    with pytest.raises(TypeError, match=r"`answers\[1\]` must be one of the"):
        score(["oak", None], [one, one])
    with pytest.raises(TypeError, match=r"`questions\[0\]` must be one of"):
        score(["oak"], ["oak"])
    with pytest.raises(TypeError, match="`answers` must be a list or tuple"):
        score("oak", [one] * 3)
    with pytest.raises(ValueError, match="`rule` must be one of"):
        score(["oak"], [one], rule="lenient")


def test_visual_haystacks_are_not_in_mm_niah():
    with pytest.raises(ValueError, match="vh_single.*score_mm_long_bench"):
        score_mm_niah(["yes"], [ask("yes")])
