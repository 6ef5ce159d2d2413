"""Facts that are hidden in a text, and the questions about them."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import NamedTuple
from typing import TypeVar

import numpy as np

from keras_laid.haystacks.filler import noise
from keras_laid.haystacks.filler import story

CHOICES = 4  # Options of a question.
HOPS = 2  # Times that a variable is set to another one.
# Of every 20 words or numbers: which go where.
SPLITS = {
    "train": range(8),
    "validation": range(8, 12),
    "test": range(12, 20),
}
# Most words are one token to most tokenizers.
CITIES = (
    "Paris Rome London Madrid Berlin Vienna Athens Moscow Dublin Boston Havana "
    "Sydney Tokyo Warsaw Prague Lisbon Geneva Oslo Cairo Lima "
    "Chicago Delhi Dubai Houston Jakarta Kyoto Lagos Manila Miami Milan Munich "
    "Naples Seattle Seoul Shanghai Toronto Venice Zurich Denver Dallas "
    "Beijing Bangkok Barcelona Cleveland Detroit Florence Hamburg Hanoi "
    "Istanbul Liverpool Manchester Melbourne Montreal Phoenix Portland "
    "Salem Philadelphia Atlanta Austin Brussels"
).split()
WORDS = (
    "dog cat bird mouse cow frog duck goat fox whale monkey turtle spider "
    "dolphin shark lizard fish tiger horse wolf "
    "apple peach grape melon carrot potato tomato garlic coffee sugar honey "
    "cheese cream pasta soup salad salt lemon orange pepper "
    "iron steel wood stone glass paper leather rubber plastic cotton silk wool "
    "marble bronze gold clay sand silver copper diamond "
    "guitar drum flute trumpet hammer needle arrow sword shield crown castle "
    "tower rocket planet dragon magnet mirror piano violin candle"
).split()
PEOPLE = (
    "Anna Bob Clara David Emma Frank George Helen Ivan Julia Kevin Laura Mark "
    "Nina Oscar Paul Rosa Steve Tom Vera "
    "Adam Brian Chris Diana Eric Fiona Grace Henry Irene Jack Karen Linda "
    "Michael Nancy Olivia Peter Rachel Sarah Thomas Victor"
).split()
# A fact, and the end of a question that shares no word with it: who it is about
# can only be found by what the words mean.
MEANINGS = (
    ("{name} has a flat beside the Eiffel Tower.", "lives in France"),
    ("{name} takes two poodles for a walk.", "owns dogs"),
    ("{name} can see the Statue of Liberty at work.", "lives in New York"),
    ("{name} drills teeth six hours a day.", "is a dentist"),
    ("{name} flies an Airbus across the ocean.", "is a pilot"),
    ("{name} has won three matches at Wimbledon.", "plays tennis"),
    ("{name} never eats meat.", "is a vegetarian"),
    ("{name} studies stars through a telescope.", "is an astronomer"),
    ("{name} climbs down into a shaft to dig coal.", "is a miner"),
    ("{name} shears a flock in spring.", "keeps sheep"),
    ("{name} sells roses and tulips.", "has flowers"),
    ("{name} prays in a mosque.", "is a Muslim"),
    ("{name} turned ninety last year.", "is very old"),
    ("{name} scored a goal with a header.", "plays football"),
    ("{name} grew up in a house near the Kremlin.", "comes from Russia"),
    ("{name} defends people before a judge.", "is a lawyer"),
    ("{name} wears a ring since the wedding.", "is married"),
    ("{name} takes pictures of the Colosseum each day.", "lives in Rome"),
    ("{name} treats patients in a hospital.", "works as a doctor"),
    ("{name} serves meals to guests at their tables.", "is a waiter"),
    ("{name} puts out fires with a hose.", "is a firefighter"),
    ("{name} trots over the fields on a pony.", "can ride a horse"),
    ("{name} mends engines and changes tyres.", "repairs cars"),
    ("{name} prepares sushi in Tokyo.", "lives in Japan"),
)


class Asked(NamedTuple):
    """A question about some of the facts.

    Attributes:
        question: String that ends where the answer begins.
        answer: String.
        options: Tuple of strings, or `None` for an answer in free words.
        subject: String, what is asked about.
        facts: Tuple of integers, the facts that the answer is in.
    """

    question: str
    answer: str
    options: tuple[str, ...] | None
    subject: str
    facts: tuple[int, ...]


class Facts(NamedTuple):
    """Sentences to hide in a text, first to last, and questions about them."""

    sentences: list[str]
    asked: list[Asked]


# A task is called with a generator, the name of a split, how many questions are
# asked, and for a single one the place of its fact, from 0 to 1.
Task = Callable[[np.random.Generator, str, int, float], Facts]


Item = TypeVar("Item")


def shared_out(items: Sequence[Item], split: str) -> list[Item]:
    """The part of a list that belongs to a split."""
    return [item for i, item in enumerate(items) if i % 20 in SPLITS[split]]


def drawn(
    items: Sequence[Item], split: str, rng: np.random.Generator, count: int
) -> list[Item]:
    """Different items of a split, drawn at random."""
    items = shared_out(items, split)
    if count > len(items):
        raise ValueError(
            "A text has room for as many questions as the split has words. "
            f"Received: questions_per_text={count}, split={split!r} with "
            f"{len(items)} words"
        )
    return [items[i] for i in rng.permutation(len(items))[:count]]


def numbers(split: str, rng: np.random.Generator, digits: int) -> Iterator[int]:
    """Different numbers of so many digits; splits share none."""
    low, high = 10 ** (digits - 1), 10**digits
    seen = set()
    while True:
        number = int(rng.integers(low, high))
        if number % 20 in SPLITS[split] and number not in seen:
            seen.add(number)
            yield number


def chosen(
    count: int, questions: int, place: float, rng: np.random.Generator
) -> list[int]:
    """Which facts are asked about: one by its place, or several at random."""
    if questions == 1:
        return [int(place * count)]
    return sorted(rng.permutation(count)[:questions].tolist())


def options_with(
    answer: str, others: Sequence[str], rng: np.random.Generator
) -> tuple[str, ...]:
    """The answer among others, in random order."""
    rest = [other for other in others if other != answer]
    picked = [rest[i] for i in rng.permutation(len(rest))[: CHOICES - 1]]
    options = [answer, *picked]
    return tuple(options[i] for i in rng.permutation(len(options)))


def single_word(
    rng: np.random.Generator, split: str, questions: int, place: float
) -> Facts:
    """One password of one city, and words that are nowhere in the text."""
    check_one("single_word", questions)
    (city,) = drawn(CITIES, split, rng, 1)
    words = drawn(WORDS, split, rng, CHOICES)
    return Facts(
        [password_is(city, words[0])],
        [password_of(city, words[0], options_with(words[0], words, rng), 0)],
    )


def single_number(
    rng: np.random.Generator, split: str, questions: int, place: float
) -> Facts:
    """One code of one city."""
    check_one("single_number", questions)
    (city,) = drawn(CITIES, split, rng, 1)
    code = str(next(numbers(split, rng, 5)))
    asked = Asked(
        f"What is the code of {city}? The code of {city} is",
        *(code, None, city, (0,)),
    )
    return Facts([f"The code of {city} is {code}."], [asked])


def multi_key(
    rng: np.random.Generator, split: str, questions: int, place: float
) -> Facts:
    """Passwords of several cities, which are each other's options."""
    count = max(CHOICES, questions)
    cities = drawn(CITIES, split, rng, count)
    words = drawn(WORDS, split, rng, count)
    return Facts(
        list(map(password_is, cities, words)),
        [
            password_of(
                cities[i], words[i], options_with(words[i], words, rng), i
            )
            for i in chosen(count, questions, place, rng)
        ],
    )


def multi_value(
    rng: np.random.Generator, split: str, questions: int, place: float
) -> Facts:
    """Three passwords of one city, all of which are asked for."""
    check_one("multi_value", questions)
    (city,) = drawn(CITIES, split, rng, 1)
    words = drawn(WORDS, split, rng, 3)
    asked = Asked(
        f"What are all the passwords of {city}? The passwords of {city} are",
        *(", ".join(words), None, city, (0, 1, 2)),
    )
    return Facts(
        [f"A password of {city} is {word}." for word in words], [asked]
    )


def variable_tracking(
    rng: np.random.Generator, split: str, questions: int, place: float
) -> Facts:
    """Variables that are set to a word, or to another variable."""
    count = max(CHOICES, questions)
    words = drawn(WORDS, split, rng, count)
    names = numbers(split, rng, 3)
    chains = [
        [f"x{next(names)}" for _ in range(HOPS + 1)] for _ in range(count)
    ]
    # Chains are mixed, each in its own order.
    order = rng.permutation(np.repeat(np.arange(count), HOPS + 1)).tolist()
    sentences: list[str] = []
    places: list[list[int]] = [[] for _ in range(count)]
    for index, chain in enumerate(order):
        step = len(places[chain])
        name = chains[chain][step]
        value = f"variable {chains[chain][step - 1]}" if step else words[chain]
        sentences.append(f"Variable {name} is set to {value}.")
        places[chain].append(index)
    asked = []
    for chain in chosen(count, questions, place, rng):
        last = chains[chain][-1]
        holds = f"variable {last} holds the word"
        text = f"Which word does variable {last} hold? {holds.capitalize()}"
        options = options_with(words[chain], words, rng)
        asked.append(
            Asked(text, words[chain], options, last, tuple(places[chain]))
        )
    return Facts(sentences, asked)


def meaning(
    rng: np.random.Generator, split: str, questions: int, place: float
) -> Facts:
    """People, and a question that shares no word with the fact it is about."""
    count = max(CHOICES, questions)
    names = drawn(PEOPLE, split, rng, count)
    pairs = drawn(MEANINGS, split, rng, count)
    asked = []
    for i in chosen(count, questions, place, rng):
        who = f"ho {pairs[i][1]}"
        text = f"W{who}? The name of the person w{who} is"
        options = options_with(names[i], names, rng)
        asked.append(Asked(text, names[i], options, pairs[i][1], (i,)))
    sentences = [
        fact.format(name=name)
        for name, (fact, _) in zip(names, pairs, strict=True)
    ]
    return Facts(sentences, asked)


def pass_key(
    rng: np.random.Generator, split: str, questions: int, place: float
) -> Facts:
    """A number in sentences that repeat."""
    check_one("pass_key", questions)
    key = str(next(numbers(split, rng, 5)))
    asked = Asked(
        "What is the pass key? The pass key is", key, None, "pass key", (0,)
    )
    return Facts(
        [f"The pass key is {key}. Remember it: {key} is the pass key."], [asked]
    )


def password_is(city: str, word: str) -> str:
    return f"The password of {city} is {word}."


def password_of(
    city: str, word: str, options: tuple[str, ...], fact: int
) -> Asked:
    text = f"What is the password of {city}? The password of {city} is"
    return Asked(text, word, options, city, (fact,))


def check_one(task: str, questions: int) -> None:
    if questions != 1:
        raise ValueError(
            f"A text of the task {task!r} has one question. Received: "
            f"questions_per_text={questions}. Leave it out."
        )


# From the name of a task to the task and its filler.
TASKS: dict[str, tuple[Task, Callable[[np.random.Generator], str]]] = {
    "single_word": (single_word, story),
    "single_number": (single_number, story),
    "multi_key": (multi_key, story),
    "multi_value": (multi_value, story),
    "variable_tracking": (variable_tracking, story),
    "meaning": (meaning, story),
    "pass_key": (pass_key, noise),
}
