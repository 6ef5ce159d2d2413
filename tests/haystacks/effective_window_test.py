import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_laid import effective_window
from keras_laid import effective_window_interval

SIZES = (1, 2, 5, 10, 20, 50)
FALLING = {1: 0.95, 5: 0.92, 20: 0.75, 50: 0.6}
RULES = (
    {"rule": "relative"},
    {"rule": "absolute", "threshold": 0.8},
    {"rule": "nolima"},
    {"rule": "ruler"},
)


def accuracies(low=0.0):
    value = st.floats(low, 1)
    return st.tuples(*[value] * len(SIZES)).map(
        lambda values: dict(zip(SIZES, values, strict=True))
    )


# The two rules of the library.


def test_relative_window_is_interpolated_in_the_logarithm():
    # Above chance: 0.4, 0.4, 0.28; 85% of 0.4 is 0.34, half-way down.
    window, censored = effective_window({1: 0.9, 10: 0.9, 40: 0.78})
    np.testing.assert_allclose(window, 20.0)
    assert censored is None


def test_relative_window_with_another_share_and_chance():
    # Above chance: 0.8, 0.8, 0.2; half of 0.8 is two thirds of the way down.
    window, _ = effective_window({1: 1, 2: 1, 16: 0.4}, share=0.5, chance=0.2)
    np.testing.assert_allclose(window, 8.0)


def test_base_is_the_best_of_its_sizes():
    # Of 0.5, 85% is 0.425: size 4 passes by 0.9 - 0.5, not by 1.0 - 0.5.
    accuracy = {1: 0.9, 2: 1.0, 4: 0.9, 8: 0.9}
    assert effective_window(accuracy) == (8.0, "above")
    window, censored = effective_window(accuracy, base_sizes=(1, 2))
    assert (window, censored) == (1.0, "below")
    window, censored = effective_window(accuracy | {1: 1}, base_sizes=[2, 1])
    assert 2 < window < 4
    assert censored is None


def test_absolute_window_is_interpolated_in_the_logarithm():
    window, censored = effective_window(
        {1: 0.9, 10: 0.9, 1000: 0.7}, "absolute", threshold=0.8
    )
    np.testing.assert_allclose(window, 100.0)
    assert censored is None


@pytest.mark.parametrize("arguments", RULES[:2])
def test_window_ends_at_the_first_fall(arguments):
    window, censored = effective_window({1: 1.0, 2: 0.6, 4: 1.0}, **arguments)
    assert 1 < window < 2
    assert censored is None


def test_threshold_itself_passes():
    accuracy = {1: 0.9, 2: 0.8}
    window = effective_window(accuracy, "absolute", threshold=0.8)
    assert window == (2.0, "above")


def test_base_passes_however_its_threshold_is_rounded():
    for base, chance in itertools.combinations(np.arange(100, -1, -1) / 100, 2):
        window = effective_window({3: base}, share=1, chance=chance)
        assert window == (3.0, "above")


# The rules of two benchmarks, by rows of their tables.


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        # GPT-4o, Llama 3.1 8B, Command R+: the base score stands at 250.
        ((0.993, 0.981, 0.980, 0.957, 0.892, 0.816, 0.697), (8000, None)),
        ((0.767, 0.657, 0.544, 0.441, 0.319, 0.226, 0.142), (1000, None)),
        ((0.909, 0.770, 0.735, 0.663, 0.395, 0.213, 0.074), (250, None)),
    ],
)
def test_nolima_finds_the_lengths_of_its_table(accuracy, expected):
    lengths = (250, 1000, 2000, 4000, 8000, 16000, 32000)
    accuracy = dict(zip(lengths, accuracy, strict=True))
    assert effective_window(accuracy, "nolima") == expected


def test_nolima_takes_the_best_of_the_short_lengths():
    accuracy = {250: 0.8, 500: 0.6, 1000: 1.0, 2000: 0.84, 4000: 0.5}
    short = (250, 500, 1000)
    assert effective_window(accuracy, "nolima") == (2000, None)
    window = effective_window(accuracy, "nolima", base_sizes=short)
    assert window == (1000, None)


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        # Gemini 1.5 Pro, GPT-4, LWM: ">128K", "64K" and "<4K".
        ((0.967, 0.958, 0.960, 0.959, 0.959, 0.944), (128, "above")),
        ((0.966, 0.963, 0.952, 0.932, 0.870, 0.812), (64, None)),
        ((0.823, 0.784, 0.737, 0.691, 0.681, 0.650), (4, "below")),
        # The threshold must be exceeded: Llama-2-7B itself does not pass.
        ((0.856, 0.0, 0.0, 0.0, 0.0, 0.0), (4, "below")),
    ],
)
def test_ruler_finds_the_lengths_of_its_table(accuracy, expected):
    lengths = (4, 8, 16, 32, 64, 128)
    accuracy = dict(zip(lengths, accuracy, strict=True))
    assert effective_window(accuracy, "ruler") == expected


@pytest.mark.parametrize("arguments", RULES[2:])
def test_benchmarks_take_the_longest_whatever_comes_before(arguments):
    accuracy = {1: 0.9, 2: 0.3, 4: 0.9, 8: 0.3}
    assert effective_window(accuracy, **arguments) == (4.0, None)


# Any rule.


@pytest.mark.parametrize("arguments", RULES)
def test_window_that_never_ends_is_censored_above(arguments):
    assert effective_window({1: 0.9, 50: 0.95}, **arguments) == (50.0, "above")
    assert effective_window({3: 0.9}, **arguments) == (3.0, "above")


@pytest.mark.parametrize("arguments", [RULES[1], RULES[3]])
def test_window_that_never_begins_is_censored_below(arguments):
    assert effective_window({2: 0.7, 4: 0.6}, **arguments) == (2.0, "below")
    assert effective_window({3: 0.7}, **arguments) == (3.0, "below")


@pytest.mark.parametrize("arguments", RULES)
def test_tokens_are_images_times_tokens_per_image(arguments):
    window, censored = effective_window(FALLING, **arguments)
    assert effective_window(FALLING, tokens_per_image=256, **arguments) == (
        256 * window,
        censored,
    )
    images = effective_window_interval(FALLING, 100, **arguments)
    tokens = effective_window_interval(
        FALLING, 100, tokens_per_image=256, **arguments
    )
    assert [end.censored for end in tokens] == [end.censored for end in images]
    np.testing.assert_allclose(
        [end.window for end in tokens], [256 * end.window for end in images]
    )


@pytest.mark.parametrize("arguments", RULES)
@given(accuracy=accuracies(0.51), order=st.permutations(SIZES))
def test_order_of_sizes_does_not_matter(arguments, accuracy, order):
    shuffled = {size: accuracy[size] for size in order}
    assert effective_window(accuracy, **arguments) == effective_window(
        shuffled, **arguments
    )


@pytest.mark.parametrize("arguments", RULES)
@given(low=accuracies(0.51), more=accuracies())
def test_window_grows_with_accuracy(arguments, low, more):
    # A relative rule's threshold would grow with the base's accuracy.
    is_relative = arguments["rule"] in ("relative", "nolima")
    high = {
        size: value
        if is_relative and size == 1
        else value + (1 - value) * more[size]
        for size, value in low.items()
    }
    low, high = (effective_window(a, **arguments) for a in (low, high))
    assert high.window >= low.window * (1 - 1e-9)
    if low.censored == "above":
        assert high == low
    if high.censored == "below":
        assert low == high


# The interval.


@pytest.mark.parametrize("arguments", RULES)
@given(accuracy=accuracies(0.51), questions=st.sampled_from((1, 30, 1000)))
def test_interval_holds_the_window(arguments, accuracy, questions):
    window, _ = effective_window(accuracy, **arguments)
    low, high = effective_window_interval(accuracy, questions, **arguments)
    assert SIZES[0] <= low.window <= window <= high.window <= SIZES[-1]


def test_interval_is_that_of_the_binomial_distribution():
    # The window is 100 ** (0.1 / (1 - p)) for an accuracy of p at 100 images.
    # At p = 0.5, 40 to 60 of 100 questions are right in 95% of cases.
    low, high = effective_window_interval(
        {1: 1.0, 100: 0.5}, 100, rule="absolute", threshold=0.9
    )
    p = [1 - 0.1 / np.log(end.window) * np.log(100) for end in (low, high)]
    np.testing.assert_allclose(p, (0.4, 0.6), atol=0.011)


def test_interval_shrinks_with_questions_and_grows_with_confidence():
    def width(questions, confidence=0.95):
        low, high = effective_window_interval(FALLING, questions, confidence)
        return high.window - low.window

    assert 0 < width(10_000) < width(1000) < width(100)
    assert width(1000, 0.5) < width(1000) < width(1000, 0.99)
    # At a confidence of 0.9999, the interval spans all draws.
    assert width(1000, 0.99) < width(1000, 0.9999)


def test_interval_ends_beyond_the_sizes_are_censored():
    low, high = effective_window_interval(
        {1: 0.8, 10: 0.79}, 20, rule="absolute", threshold=0.795
    )
    assert low == (1.0, "below")
    assert high == (10.0, "above")
    low, high = effective_window_interval({1: 1.0, 10: 1.0}, 20)
    assert low == high == (10.0, "above")


def test_draws_of_guesses_count_as_below():
    low, _ = effective_window_interval({1: 0.6, 10: 0.55}, 20)
    assert low == (1.0, "below")


def test_interval_depends_on_its_seed_alone():
    backwards = dict(reversed(FALLING.items()))
    interval = effective_window_interval(FALLING, 100)
    assert interval == effective_window_interval(backwards, 100)
    assert interval != effective_window_interval(FALLING, 100, seed=1)


def test_questions_may_differ_by_size():
    by_size = dict.fromkeys(FALLING, 100)
    interval = effective_window_interval(FALLING, 100)
    assert interval == effective_window_interval(FALLING, by_size)
    by_size[20] = 10_000
    assert interval != effective_window_interval(FALLING, by_size)


# Meaningless arguments are refused.


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        ({}, "at least one size"),
        ({1: 0.5, 2: 0.9}, r"accuracy of 0.5 at \(1,\), chance=0.5"),
        ({"1": 0.9}, "Received: '1'"),
        ({0: 0.9}, "above 0. Received: 0"),
        ({1: 90.0}, r"accuracy\[1\]=90.0"),
        ({1: float("nan")}, r"accuracy\[1\]=nan"),
    ],
)
def test_accuracies_that_mean_nothing_are_refused(accuracy, words):
    with pytest.raises(ValueError, match=words):
        effective_window(accuracy)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "best"}, "one of .*Received: rule='best'"),
        ({"threshold": 0.8}, "left out with rule='relative'"),
        ({"rule": "absolute"}, "must be given with rule='absolute'"),
        ({"rule": "absolute", "threshold": 0}, "Received: threshold=0"),
        ({"rule": "absolute", "threshold": 1, "share": 1}, "Received: share=1"),
        ({"rule": "nolima", "chance": 0.5}, "Received: chance=0.5"),
        ({"rule": "ruler", "base_sizes": (1,)}, "which takes no arguments"),
        ({"share": 1.1}, "Received: share=1.1"),
        ({"chance": 1.0}, "Received: chance=1.0"),
        ({"base_sizes": (3,)}, r"Received: base_sizes=\(3,\)"),
        ({"base_sizes": ()}, r"Received: base_sizes=\(\)"),
        ({"tokens_per_image": 0}, "Received: tokens_per_image=0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        effective_window(FALLING, **arguments)
    with pytest.raises(ValueError, match=words):
        effective_window_interval(FALLING, 100, **arguments)


@pytest.mark.parametrize(
    ("questions", "confidence", "words"),
    [
        (0, 0.95, "Received: 0 at size 1"),
        (2.5, 0.95, "Received: 2.5 at size 1"),
        ({1: 100}, 0.95, r"Received: \[1\]"),
        (100, 95, "Received: confidence=95"),
    ],
)
def test_intervals_that_mean_nothing_are_refused(questions, confidence, words):
    with pytest.raises(ValueError, match=words):
        effective_window_interval(FALLING, questions, confidence)
