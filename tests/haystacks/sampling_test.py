"""Haystacks of images that are their labels, checked only from the images."""

import collections
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_laid.haystacks import Haystack
from keras_laid.haystacks import PairSource
from keras_laid.haystacks import draw_haystacks

WORDING = (
    r"For the image with an? (?P<anchor>\w+), is there an? (?P<target>\w+)\?|"
    r"For all images with an? (?P<anchors>\w+), "
    r"do (?P<quantifier>any|all) of them contain an? (?P<targets>\w+)\?"
)


class Labels(PairSource):
    """A source of images with two pixels, the numbers of the things shown."""

    def __init__(self, kinds):
        self.names = tuple(f"n{i}" for i in range(kinds))

    def render(self, pairs, rng):
        digits = np.stack([pairs // 256, pairs % 256, 0 * pairs], axis=-1)
        return digits[:, None].astype("uint8")


def numbers(image):
    """The two numbers that an image of `Labels` shows."""
    return (256 * image[0, :, 0].astype(int) + image[0, :, 1]).tolist()


def read(haystack):
    """Parses a question; finds the images that show anchor and target."""
    match = re.fullmatch(WORDING, haystack.question)
    anchor = match["anchor"] or match["anchors"]
    target = match["target"] or match["targets"]
    shown = [{f"n{n}" for n in numbers(image)} for image in haystack.images]
    needles = tuple(i for i, names in enumerate(shown) if anchor in names)
    has_target = [target in shown[i] for i in needles]
    return anchor, target, match["quantifier"], needles, has_target


@given(
    kinds=st.integers(3, 30),
    sizes=st.lists(st.integers(3, 20), min_size=1, max_size=3),
    needles=st.sampled_from([(1,), (2, 3), (1, 2), (3,)]),
    seed=st.integers(0, 99),
)
def test_answers_are_true(kinds, sizes, needles, seed):
    source = Labels(kinds)
    haystacks = list(draw_haystacks(source, 48, sizes, needles, seed))
    assert len(haystacks) == 48
    for haystack in haystacks:
        anchor, target, quantifier, found, has_target = read(haystack)
        assert len(haystack.images) in sizes
        assert len(found) in needles
        assert (haystack.anchor, haystack.target) == (anchor, target)
        assert haystack.needles == found
        assert anchor != target
        assert all(one != other for one, other in map(numbers, haystack.images))
        truth = any(has_target) if quantifier == "any" else all(has_target)
        assert haystack.answer == ("yes" if truth else "no")


def test_cases_are_shared_out_evenly():
    haystacks = draw_haystacks(Labels(12), 240, (2, 5, 7), (1, 2))
    counts = collections.Counter(
        (len(h.images), len(h.needles), read(h)[2], h.answer) for h in haystacks
    )
    # Three sizes; one needle, or two with "all" or with "any"; yes or no.
    assert len(counts) == 18
    assert set(counts.values()) <= {13, 14}


def test_needles_are_anywhere():
    haystacks = draw_haystacks(Labels(12), 2000, (10,), (1, 2))
    counts = collections.Counter(p for h in haystacks for p in h.needles)
    # 2000 questions, 5/3 needles each, ten positions: 333, within 4 sigma.
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 333) < 73 for count in counts.values())


def test_some_or_all_but_one_needle_may_show_the_target():
    haystacks = list(draw_haystacks(Labels(12), 400, (3,), (3,)))
    showing = collections.defaultdict(set)
    for haystack in haystacks:
        *_, quantifier, _, has_target = read(haystack)
        showing[quantifier, haystack.answer].add(sum(has_target))
    assert showing == {
        ("all", "yes"): {3},
        ("all", "no"): {0, 1, 2},
        ("any", "yes"): {1, 2, 3},
        ("any", "no"): {0},
    }


def test_straws_show_the_target_whatever_the_answer():
    # Otherwise, any image with the target would give the answer away.
    share = collections.defaultdict(list)
    for haystack in draw_haystacks(Labels(500), 400, (10,)):
        (needle,) = haystack.needles
        for place, image in enumerate(haystack.images):
            if place != needle:
                target = int(haystack.target[1:])
                share[haystack.answer].append(target in numbers(image))
    for answer in ("yes", "no"):
        assert abs(np.mean(share[answer]) - 2 / 9) < 0.04


def test_one_image_is_its_own_haystack():
    for haystack in draw_haystacks(Labels(5), 10, (1,)):
        assert haystack.needles == (0,)
        assert len(haystack.images) == 1


def test_haystacks_may_be_long():
    (haystack,) = draw_haystacks(Labels(20), 1, (1000,), (7,))
    assert len(read(haystack)[3]) == 7


def test_same_seed_same_haystacks():
    one, two, other = (
        list(draw_haystacks(Labels(9), 8, (4,), seed=s)) for s in (1, 1, (1, 2))
    )
    assert one == two
    assert one != other


@pytest.mark.parametrize(
    "images", [["1.jpg", "2.jpg"], np.zeros((2, 4, 4, 3), "uint8")]
)
def test_haystacks_are_equal_where_all_is(images):
    one = Haystack("Q?", "yes", "a", "b", (0,), images)
    assert one == dataclasses.replace(one, images=list(images))
    for changes in (
        {"question": "R?"},
        {"answer": "no"},
        {"needles": (1,)},
        {"images": images[:1]},
        {"images": [images[0], np.ones((4, 4, 3), "uint8")]},
        {"images": [images[0], "3.jpg"]},
    ):
        assert one != dataclasses.replace(one, **changes)
    assert one != "Q?"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_questions=0), "`num_questions` must be at least 1"),
        (dict(sizes=()), "`sizes` must be one or more integers of at least 1"),
        (dict(needles=(0, 1)), r"of at least 1. Received: needles=\(0, 1\)"),
        (dict(needles=(3,)), r"room for its needles.*\(3,\), sizes=\(2, 4\)"),
    ],
)
def test_bad_arguments_are_refused(changes, words):
    arguments = dict(num_questions=4, sizes=(2, 4), needles=(1,))
    with pytest.raises(ValueError, match=words):
        list(draw_haystacks(Labels(5), **{**arguments, **changes}))
