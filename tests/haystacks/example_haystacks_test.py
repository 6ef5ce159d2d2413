"""Haystacks of a user's own examples."""

import collections

import numpy as np
import pytest
from PIL import Image

from keras_laid import evaluate_haystacks
from keras_laid.haystacks import Example
from keras_laid.haystacks import example_haystacks
from keras_laid.haystacks.example_haystacks import ImageLoader

SIZE = (6, 4)


def shade(number):
    return np.full((*SIZE, 3), 20 * number, "uint8")


EXAMPLES = [
    Example([shade(n)], f"What is written on page {n}?", f"The word {n}")
    for n in range(5)
] + [Example([shade(5), shade(6)], "What is on the pages?", "two")]


def draw(num_questions=24, sizes=(2, 5), examples=EXAMPLES, **kwargs):
    return list(example_haystacks(examples, num_questions, sizes, **kwargs))


def test_needles_are_the_examples_own_images():
    haystacks = draw()
    for haystack in haystacks:
        (example,) = (e for e in EXAMPLES if e.prompt == haystack.question)
        assert haystack.answer == example.response
        assert haystack.options is None
        shown = [int(image[0, 0, 0]) for image in haystack.images]
        own = [int(image[0, 0, 0]) for image in example.images]
        assert [shown[needle] for needle in haystack.needles] == own
        assert len(set(shown)) == len(shown)  # No image comes twice.
    sizes = collections.Counter(len(each.images) for each in haystacks)
    assert sizes == {2: 12, 5: 12}
    questions = collections.Counter(each.question for each in haystacks)
    assert set(questions.values()) == {4}


def test_they_depend_on_the_seed_and_are_solved_by_their_images():
    assert draw() == draw()
    assert draw() != draw(seed=1)

    def function(images, prompts):
        return [
            "two" if "pages" in prompt else f"the word {prompt.split()[-1][0]}"
            for prompt in prompts
        ]

    results = evaluate_haystacks(
        function, draw(), through="generate", rule="exact", verbose=False
    )
    assert set(results.accuracy.values()) == {1.0}
    assert results.chance == 0
    assert results.compliance is None


def test_options_of_all_questions():
    examples = [
        (shade(n), f"Is page {n} red?", ("yes", "no")[n % 2]) for n in range(4)
    ]
    haystacks = draw(8, (2,), examples, options=("yes", "no"))
    assert {each.options for each in haystacks} == {("yes", "no")}


def test_a_file_is_decoded_once(tmp_path):
    path = tmp_path / "page.png"
    Image.fromarray(shade(3)).save(path)
    twice = ImageLoader((3, 2)), ImageLoader((3, 2), kept_bytes=17)
    (first,), _ = (load([[str(path)]]) for load in twice)
    assert first.shape == (1, 3, 2, 3)
    path.unlink()
    np.testing.assert_array_equal(twice[0]([[str(path)]])[0], first)
    with pytest.raises(ValueError, match="must be a whole JPEG or PNG"):
        twice[1]([[str(path)]])  # 18 bytes would be needed.


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw(0), "`num_questions` must be"),
        (lambda: draw(sizes=(8,)), "at most the images of all examples"),
        (lambda: draw(sizes=(1,)), "example 5 with 2 images"),
        (
            lambda: draw(examples=[*EXAMPLES, (shade(7), "Is it?")]),
            "must have a response .*example 6 without",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
