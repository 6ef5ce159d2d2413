"""Wrong calls of haystacks, of their evaluation and of effective windows."""

import pathlib

import numpy as np
import pytest

from keras_laid import Digits
from keras_laid import HaystackEvaluation
from keras_laid import Haystacks
from keras_laid import draw_haystacks
from keras_laid import effective_window
from keras_laid import effective_window_interval
from keras_laid import evaluate_haystacks
from keras_laid.haystacks import Coco
from keras_laid.haystacks import Haystack
from keras_laid.haystacks import HaystackResults
from keras_laid.haystacks import OpenMoji
from keras_laid.haystacks import PairSource
from keras_laid.haystacks import score
from tests.bad_input.files_support import INF
from tests.bad_input.files_support import NAN
from tests.bad_input.files_support import wrong
from tests.support import make_pali_gemma
from tests.support import make_preprocessor

FALLING = {1: 0.9, 10: 0.8, 100: 0.6}
IMAGES = np.zeros((2, 16, 16, 3), "uint8")


class Blank(PairSource):
    """A source of blank images, or of the values that `make` returns."""

    image_size = 16

    def __init__(self, names="abcd", make=None):
        self.names = names if isinstance(names, str) else tuple(names)
        self.make = make or (lambda n: np.zeros((n, 16, 16, 3), "uint8"))

    def render(self, pairs, rng):
        return self.make(len(pairs))


class NoNames(PairSource):
    render = Blank.render


def draw(source=None, num_questions=4, sizes=(3,), **kwargs):
    if source is None:
        source = Blank(["a", "b", "c", "d"])
    return draw_haystacks(source, num_questions, sizes, **kwargs)


def names(*names):
    return lambda: draw(Blank(names))


def render(make):
    return lambda: next(draw(Blank(["a", "b", "c"], make)))


def haystack(question="Q?", answer="yes", needles=(0,), images=IMAGES):
    return Haystack(question, answer, "a", "b", needles, images)


THREE = "`source.names` must be three or more different strings"
ONE_EACH = "`source.render` must return a `uint8` array"

DRAWING = [
    wrong(
        "num_questions of 1.5",
        lambda: draw(num_questions=1.5),
        "`num_questions` must be an integer. Received: num_questions=1.5",
        TypeError,
    ),
    wrong(
        "num_questions of true",
        lambda: draw(num_questions=True),
        "Received: num_questions=True of type bool",
        TypeError,
    ),
    wrong(
        "num_questions in words",
        lambda: draw(num_questions="4"),
        "`num_questions` must be an integer",
        TypeError,
    ),
    wrong(
        "infinitely many questions",
        lambda: draw(num_questions=INF),
        "Received: num_questions=inf",
        TypeError,
    ),
    wrong(
        "refused before the first is drawn",
        lambda: draw(num_questions=-1),
        "`num_questions` must be at least 1. Received: num_questions=-1",
    ),
    wrong(
        "sizes of one number",
        lambda: draw(sizes=3),
        "one or more integers of at least 1. Received: sizes=3. Pass a tuple",
        TypeError,
    ),
    wrong(
        "sizes of NaN",
        lambda: draw(sizes=(NAN,)),
        r"Received: sizes=\(nan,\)",
        TypeError,
    ),
    wrong(
        "sizes of strings",
        lambda: draw(sizes="12"),
        "Received: sizes='12'",
        TypeError,
    ),
    wrong(
        "needles of true",
        lambda: draw(needles=(True,)),
        r"`needles` must be .* integers of at least 1. .*\(True,\)",
        TypeError,
    ),
    wrong(
        "a negative seed",
        lambda: draw(seed=-1),
        "`seed` must be an integer of at least 0, .*Received: seed=-1",
    ),
    wrong(
        "no seed",
        lambda: draw(seed=None),
        "Received: seed=None",
    ),
    wrong(
        "a source's class",
        lambda: draw(Digits),
        "`source` must be a `keras_laid.haystacks.PairSource` or",
        TypeError,
    ),
    wrong(
        "a source's name",
        lambda: draw("digits"),
        "Received: 'digits'",
        TypeError,
    ),
    wrong(
        "a source that draws nothing",
        lambda: draw(PairSource()),
        r"`source` must have `names` and `render\(pairs, rng\)`",
        TypeError,
    ),
    wrong("a source without names", lambda: draw(NoNames()), THREE),
    wrong("no name", names(), rf"{THREE}.*Received: \(\)"),
    wrong("one name", names("a"), rf"{THREE}.*Received: \('a',\)"),
    wrong("two names", names("a", "b"), THREE),
    wrong("names twice", names("a", "b", "c", "a"), THREE),
    wrong("an empty name", names("", "b", "c"), THREE),
    wrong("numbers as names", names(1, 2, 3), THREE),
    wrong(
        "fewer images than pairs",
        render(lambda n: np.zeros((n - 1, 16, 16, 3), "uint8")),
        rf"{ONE_EACH}.*\(2, 16, 16, 3\) .* for 3 pairs",
    ),
    wrong(
        "images scaled to floats",
        render(lambda n: np.full((n, 16, 16, 3), 0.5)),
        f"{ONE_EACH}.*float64",
    ),
    wrong(
        "images without colours",
        render(lambda n: np.zeros((n, 16, 16), "uint8")),
        ONE_EACH,
    ),
    wrong(
        "images of varying size",
        render(lambda n: [np.zeros((8 + i, 8, 3), "uint8") for i in range(n)]),
        f"{ONE_EACH}.*Received: list",
    ),
    wrong("no images", render(lambda n: None), f"{ONE_EACH}.*NoneType"),
    wrong(
        "digits of a list of splits",
        lambda: Digits(["test"]),
        r"`split` must be one of .*split=\['test'\]",
    ),
    wrong(
        "digits of 16.0 pixels",
        lambda: Digits("test", image_size=16.0),
        "`image_size` must be an integer. Received: image_size=16.0",
        TypeError,
    ),
    wrong(
        "digits augmented in words",
        lambda: Digits("train", augment="yes"),
        "`augment` must be `True` or `False`. Received: augment='yes'",
        TypeError,
    ),
    wrong(
        "icons of 32.0 pixels",
        lambda: OpenMoji("test", image_size=32.0),
        "`image_size` must be an integer",
        TypeError,
    ),
    wrong(
        "photographs that exclude a string",
        lambda: Coco("coco", "test", exclude="val2017/1.jpg"),
        r"`exclude` must be a collection.*Pass `\('val2017/1.jpg',\)`",
        TypeError,
    ),
]

ASKED = [
    wrong(
        "a question that is none",
        lambda: haystack(question=None),
        "must have a string as its question.*question=None",
        TypeError,
    ),
    wrong(
        "images of paths that are not strings",
        lambda: haystack(images=[pathlib.Path("1.jpg")]),
        "Paths of images must be strings. .*1.jpg.*`str",
        TypeError,
    ),
    wrong(
        "a blank question",
        lambda: haystack(question=" "),
        "options that are not empty",
    ),
    wrong(
        "an answer in capitals",
        lambda: haystack(answer="Yes"),
        "answer must be one of `options`.*answer='Yes'",
    ),
    wrong(
        "a haystack of nothing",
        lambda: haystack(images=[]),
        "must have images.*Received: 0 images",
    ),
    wrong(
        "images that are none",
        lambda: haystack(images=None),
        "a sequence of images. .*NoneType",
        TypeError,
    ),
    wrong(
        "a needle behind the last image",
        lambda: haystack(needles=(2,)),
        r"positions among them. Received: 2 images, needles=\(2,\)",
    ),
    wrong(
        "a needle counted from the end",
        lambda: haystack(needles=(-1,)),
        r"needles=\(-1,\)",
    ),
    wrong(
        "an answer in bytes",
        lambda: score(b"yes", "yes"),
        "`answer` must be a string. Received: answer=b'yes'",
        TypeError,
    ),
    wrong(
        "no answer",
        lambda: score(None, "yes"),
        "Received: answer=None",
        TypeError,
    ),
]


def yes(images, prompts):
    return ["yes"] * len(prompts)


def evaluate(model=yes, haystacks=None, **kwargs):
    haystacks = [haystack()] if haystacks is None else haystacks
    kwargs = {"through": "generate", "verbose": False, **kwargs}
    return evaluate_haystacks(model, haystacks, **kwargs)


def answering(answers):
    return lambda: evaluate(lambda images, prompts: answers)


EVALUATION = [
    wrong(
        "a prompt with another name",
        lambda: evaluate(prompt="{question} {answer}"),
        r"no other braces. Received: prompt='{question} {answer}'",
    ),
    wrong(
        "a prompt with half a brace",
        lambda: evaluate(prompt="{question} {"),
        r"Write '{{' for a brace",
    ),
    wrong(
        "a prompt with a number",
        lambda: evaluate(prompt="{question} {0}"),
        "hold '{question}' once",
    ),
    wrong(
        "a prompt that asks twice",
        lambda: evaluate(prompt="{question}{question}"),
        "hold '{question}' once",
    ),
    wrong(
        "a prompt with an attribute",
        lambda: evaluate(prompt="{question} {question.__class__}"),
        "no other braces",
    ),
    wrong(
        "no prompt",
        lambda: evaluate(prompt=None),
        "`prompt` must be a string. Received: prompt of type NoneType",
        TypeError,
    ),
    wrong(
        "an answer of 1.5 tokens",
        lambda: evaluate(max_answer_tokens=1.5),
        "`max_answer_tokens` must be an integer",
        TypeError,
    ),
    wrong(
        "an answer of NaN tokens",
        lambda: evaluate(max_answer_tokens=NAN),
        "Received: max_answer_tokens=nan",
        TypeError,
    ),
    wrong(
        "a batch of no tokens",
        lambda: evaluate(tokens_per_batch=0),
        "`tokens_per_batch` must be at least 1",
    ),
    wrong(
        "a batch of NaN tokens",
        lambda: evaluate(tokens_per_batch=NAN),
        "`tokens_per_batch` must be an integer",
        TypeError,
    ),
    wrong(
        "a number as root",
        lambda: evaluate(root=3),
        "`root` must be a path. Received: root of type int",
        TypeError,
    ),
    wrong(
        "arrays as haystacks",
        lambda: evaluate(haystacks=[IMAGES]),
        "must hold `keras_laid.haystacks.Haystack`s.*from_example",
        TypeError,
    ),
    wrong(
        "a model's class",
        lambda: evaluate(dict),
        "The model must be of a family",
    ),
    wrong(
        "a function without answers",
        answering(None),
        "must return a list of strings. Received: None",
        TypeError,
    ),
    wrong("a string of answers", answering("y"), "Received: 'y'", TypeError),
    wrong("answers in numbers", answering([1]), r"Received: \[1\]", TypeError),
    wrong(
        "answers in bytes",
        answering([b"yes"]),
        r"Received: \[b'yes'\]",
        TypeError,
    ),
    wrong(
        "a callback every NaN epochs",
        lambda: HaystackEvaluation([haystack()], every=NAN),
        "`every` must be an integer. Received: every=nan",
        TypeError,
    ),
    wrong(
        "a number of haystacks",
        lambda: evaluate_haystacks(
            lambda images, prompts: [], 5, through="generate"
        ),
        "`haystacks` must be an iterable of .*Received: haystacks of type int",
        TypeError,
    ),
    wrong(
        "a callback of a number",
        lambda: HaystackEvaluation(5),
        "`haystacks` must be an iterable of .*Received: haystacks of type int",
        TypeError,
    ),
    wrong(
        "a callback of no haystacks",
        lambda: HaystackEvaluation([]),
        "`haystacks` must hold at least one. Received: haystacks=\\[\\]",
    ),
    wrong(
        "a callback with an unknown way",
        lambda: HaystackEvaluation([haystack()], through="telepathy"),
        "`through` must be one of",
    ),
    wrong(
        "a callback with an unknown argument",
        lambda: HaystackEvaluation([haystack()], output="runs"),
        "unexpected keyword argument 'output'",
        TypeError,
    ),
    wrong(
        "a callback with empty batches",
        lambda: HaystackEvaluation([haystack()], tokens_per_batch=0),
        "`tokens_per_batch` must be at least 1",
    ),
    wrong(
        "results in 1.5 bins",
        lambda: HaystackResults((), {}).by_position(1.5),
        "`bins` must be an integer. Received: bins=1.5",
        TypeError,
    ),
    wrong(
        "results resampled 1.5 times",
        lambda: HaystackResults((), {}).intervals(resamples=1.5),
        "`resamples` must be an integer",
        TypeError,
    ),
    wrong(
        "results with a negative seed",
        lambda: HaystackResults((), {}).intervals(seed=-1),
        "`seed` must be",
    ),
]


def window(accuracy=None, **kwargs):
    return lambda: effective_window(accuracy or FALLING, **kwargs)


def interval(questions=10, **kwargs):
    return lambda: effective_window_interval(FALLING, questions, **kwargs)


WINDOWS = [
    wrong(
        "a list of accuracies",
        window([0.9]),
        r"must be a dictionary .*accuracy=\[0.9\]. Pass `results.accuracy`",
        TypeError,
    ),
    wrong("an accuracy in words", window({1: "0.9"}), r"\[1\]='0.9'"),
    wrong("an accuracy of none", window({1: None}), r"\[1\]=None"),
    wrong("an accuracy of true", window({1: True}), r"\[1\]=True"),
    wrong("an infinite accuracy", window({1: INF}), "between 0 and 1"),
    wrong("an accuracy below 0", window({1: -0.1}), r"\[1\]=-0.1. Divide"),
    wrong("accuracies of seeds", window({1: [0.9, 0.8]}), "between 0 and 1"),
    wrong("a size of true", window({True: 0.9}), "above 0. Received: True"),
    wrong("an infinite size", window({INF: 0.9}), "Received: inf"),
    wrong("a rule of lists", window(rule=["nolima"]), "`rule` must be one of"),
    wrong(
        "a share in words",
        window(share="0.8"),
        "`share` must be a number. Received: share='0.8' of type str",
        TypeError,
    ),
    wrong("a share of true", window(share=True), "share=True", TypeError),
    wrong("a chance of NaN", window(chance=NAN), r"in \[0, 1\). .*chance=nan"),
    wrong("one base size", window(base_sizes=1), "Received: base_sizes=1"),
    wrong("base sizes of lists", window(base_sizes=([1],)), r"\(\[1\],\)"),
    wrong(
        "a threshold in percent",
        window(rule="absolute", threshold=80),
        r"`threshold` must be in \(0, 1\]. Received: threshold=80",
    ),
    wrong(
        "infinitely many tokens an image",
        window(tokens_per_image=INF),
        r"`tokens_per_image` must be in \(0, inf\)",
    ),
    wrong("questions of true", interval(True), "Received: True at size 1"),
    wrong("questions beyond counting", interval(10**30), "above 0. Received"),
    wrong(
        "questions by sizes in words",
        interval({1: 1, 10: 1, "100": 1}),
        r"must have the sizes of `accuracy`.*\[1, 10, '100'\]",
    ),
    wrong("intervals of no seed", interval(seed=None), "`seed` must be"),
    wrong(
        "a confidence in words",
        interval(confidence="0.95"),
        "`confidence` must be a number",
        TypeError,
    ),
]


@pytest.mark.parametrize(
    "call, words, error", DRAWING + ASKED + EVALUATION + WINDOWS
)
def test_is_refused(call, words, error):
    with pytest.raises(error, match=words):
        call()


@pytest.fixture(scope="module")
def preprocessor():
    return make_preprocessor()


BATCHES = [
    wrong(
        "batches of 1.5",
        dict(batch_size=1.5),
        "`batch_size` must be an integer",
        TypeError,
    ),
    wrong("sizes of floats", dict(sizes=(2.0,)), r"sizes=\(2.0,\)", TypeError),
    wrong(
        "a negative seed",
        dict(seed=-1),
        "`seed` must be at least 0. Received: seed=-1",
    ),
    wrong(
        "a preprocessor of words",
        dict(preprocessor="pali_gemma"),
        "`preprocessor` must be one of KerasHub with an image converter",
        TypeError,
    ),
    wrong(
        "stretching by a number",
        dict(stretching=3),
        "must be a `keras_laid.PositionStretching` or `None`. Received: 3",
        TypeError,
    ),
    wrong(
        "a source's name",
        dict(source="digits"),
        "`source` must have `names` and",
        TypeError,
    ),
    wrong("a source of two names", dict(source=Blank(["a", "b"])), THREE),
]


@pytest.mark.parametrize("kwargs, words, error", BATCHES)
def test_batches_are_refused(preprocessor, kwargs, words, error):
    kwargs = {
        "source": Blank(["zero", "one", "two"]),
        "preprocessor": preprocessor,
        "num_questions": 4,
        "sizes": (2,),
        **kwargs,
    }
    with pytest.raises(error, match=words):
        Haystacks(**kwargs)


def test_what_a_source_renders_is_checked_in_batches(preprocessor):
    source = Blank(["zero", "one", "two"], lambda n: np.zeros((n, 16, 16, 3)))
    with pytest.raises(ValueError, match=ONE_EACH):
        Haystacks(source, preprocessor, 4, (2,))[0]


def ragged():
    return [np.zeros((16, 8 + i, 3), "uint8") for i in range(2)]


UNREADABLE = [
    wrong("images of varying size", [haystack(images=ragged())], "of one size"),
    wrong(
        "haystacks of varying size",
        [haystack(), haystack(images=np.zeros((2, 8, 8, 3), "uint8"))],
        r"images of shapes \[\(8, 8, 3\), \(16, 16, 3\)\]",
    ),
    wrong(
        "images of NaN",
        [haystack(images=np.full((2, 16, 16, 3), NAN))],
        "must be `uint8` arrays.*float64.*not scaled",
    ),
    wrong(
        "images without colours",
        [haystack(images=np.zeros((2, 16, 16), "uint8"))],
        r"Received: dtype=uint8, shape=\(16, 16\)",
    ),
    wrong(
        "images with alpha",
        [haystack(images=np.zeros((2, 16, 16, 4), "uint8"))],
        r"shape=\(16, 16, 4\)",
    ),
]


@pytest.fixture(scope="module")
def model(preprocessor):
    return make_pali_gemma(None, preprocessor)


@pytest.mark.parametrize("haystacks, words, error", UNREADABLE)
def test_images_are_refused(model, haystacks, words, error):
    with pytest.raises(error, match=words):
        evaluate(model, haystacks, through="logits")


def test_functions_take_images_of_varying_size(tmp_path):
    results = evaluate(
        haystacks=[haystack(images=ragged())], output=tmp_path / "out"
    )
    assert results.accuracy == {2: 1.0}
