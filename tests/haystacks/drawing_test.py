"""The tasks of haystacks: solvable by their images, and only by these."""

import collections
import re

import numpy as np
import pytest

from keras_laid import draw_haystacks
from keras_laid import evaluate_haystacks
from keras_laid.haystacks import PairSource
from keras_laid.haystacks.questions import LETTERS

SHAPES = {
    "contains": dict(sizes=(1, 4, 9)),
    "present": dict(sizes=(1, 4, 9)),
    "count": dict(sizes=(4, 9), needles=(1, 2, 4)),
    "which_image": dict(sizes=(4, 9)),
}
EACH_TASK = pytest.mark.parametrize("task", SHAPES)


class Numbers(PairSource):
    """Images of two pixels, each of which holds the number of a name."""

    names = ("zero", "one", "two", "three", "four", "five")
    image_size = 1

    def render(self, pairs, rng):
        pixels = np.asarray(pairs, "uint8")[:, None, :, None]
        return np.repeat(pixels, 3, axis=-1)


def draw(task, num_questions=48, seed=0, **kwargs):
    kwargs = SHAPES[task] | kwargs
    return list(
        draw_haystacks(Numbers(), num_questions, seed=seed, task=task, **kwargs)
    )


def solve(images, prompt):
    """The answer of someone who sees what all images show."""
    shown = [{Numbers.names[n] for n in image[0, :, 0]} for image in images]
    names = re.findall("|".join(Numbers.names), prompt.split("Answer")[0])
    having = [place for place, some in enumerate(shown) if names[0] in some]
    if prompt.startswith("Is there"):
        return "yes" if having else "no"
    if prompt.startswith("How many"):
        return str(len(having))
    if prompt.startswith("Which"):
        offered = [int(n) - 1 for n in re.findall(r"image (\d+)", prompt)]
        (letter,) = (
            letter
            for letter, place in zip(LETTERS, offered, strict=True)
            if place in having
        )
        return letter
    return "yes" if all(names[1] in shown[place] for place in having) else "no"


def solver(images, prompts):
    return [solve(*each) for each in zip(images, prompts, strict=True)]


def evaluate(model, haystacks, **kwargs):
    return evaluate_haystacks(
        model, haystacks, through="generate", verbose=False, **kwargs
    )


@EACH_TASK
def test_a_task_is_solved_by_its_images(task):
    results = evaluate(solver, draw(task))
    assert set(results.accuracy) == set(SHAPES[task]["sizes"])
    assert set(results.accuracy.values()) == {1.0}
    assert set(results.compliance.values()) == {1.0}


@EACH_TASK
def test_answers_are_shared_out_evenly(task):
    haystacks = draw(task)
    options = haystacks[0].options
    for size in SHAPES[task]["sizes"]:
        counted = collections.Counter(
            h.answer for h in haystacks if len(h.images) == size
        )
        assert set(counted) == set(options)
        assert len(set(counted.values())) == 1
    # So that any answer that is always the same is right by chance.
    for answer in options:
        results = evaluate(lambda i, p, a=answer: [a] * len(p), haystacks)
        for accuracy in results.accuracy.values():
            assert accuracy == pytest.approx(results.chance)
    assert results.chance == pytest.approx(1 / len(options))


@EACH_TASK
def test_needles_show_the_anchor_and_no_other_image_does(task):
    for haystack in draw(task):
        anchor = Numbers.names.index(haystack.anchor)
        having = [
            place
            for place, image in enumerate(haystack.images)
            if anchor in image
        ]
        assert tuple(having) == haystack.needles
        if task == "count":
            assert haystack.answer == str(len(having))


def test_the_letter_of_an_image_says_nothing_on_its_place():
    places = [h.needles[0] for h in draw("which_image", 4000, sizes=(8,))]
    counted = np.bincount(places, minlength=8)
    # Six standard deviations of a binomial of 1 in 8.
    assert np.abs(counted - 500).max() < 6 * np.sqrt(4000 * 7 / 64)


@EACH_TASK
def test_a_question_depends_on_seed_and_number(task):
    assert draw(task, 12) == draw(task, 12)
    assert draw(task, 12) != draw(task, 12, seed=1)


def test_only_needles_are_shown():
    sizes = []

    def count(images, prompts):
        sizes.extend(len(each) for each in images)
        return solver(images, prompts)

    haystacks = draw("contains", 12)
    results = evaluate(count, haystacks, shown="needles")
    assert set(sizes) == {1}
    assert set(results.accuracy) == {1, 4, 9}  # Of the whole haystack.
    assert set(results.accuracy.values()) == {1.0}
    assert results.settings["shown"] == "needles"


def test_no_images_are_shown():
    def function(images, prompts):
        assert not any(map(len, images))
        return ["yes"] * len(prompts)

    results = evaluate(function, draw("contains"), shown="none")
    assert set(results.accuracy.values()) == {0.5}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: list(draw_haystacks(Numbers(), 8, (4,), task="guess")),
            "`task` must be one of.*guess",
        ),
        (
            lambda: draw("present", sizes=(4,), needles=(2,)),
            r"'present' has one needle at most. Received: needles=\(2,\)",
        ),
        (
            lambda: draw("count", needles=(1,)),
            "must have two or more numbers of needles",
        ),
        (
            lambda: draw("count", sizes=(3,), needles=(1, 4)),
            "all of which fit into each size",
        ),
        (
            lambda: draw("which_image", sizes=(3,)),
            r"four images to choose from. Received: sizes=\(3,\)",
        ),
        (
            lambda: evaluate(solver, draw("present"), shown="needles"),
            "Only haystacks with needles .*haystack [0-9]+ without any",
        ),
        (
            lambda: evaluate(solver, draw("present"), shown="some"),
            "`shown` must be one of",
        ),
    ],
)
def test_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
