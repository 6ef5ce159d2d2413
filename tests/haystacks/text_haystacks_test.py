"""Haystacks of text: exact lengths, solvable with the needle, not without."""

import dataclasses
import re
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

import keras_laid.haystacks
from keras_laid import evaluate_haystacks
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks import Haystack
from keras_laid.haystacks import TextHaystackConfig
from keras_laid.haystacks import TextHaystacks
from keras_laid.haystacks import draw_text_haystacks
from keras_laid.haystacks import filler
from keras_laid.haystacks import text_tasks
from keras_laid.haystacks.text_tasks import MEANINGS
from keras_laid.haystacks.text_tasks import TASKS
from tests.backbones import small_models
from tests.haystacks.families import PREPROCESSORS
from tests.haystacks.families import make_pair

# Texts are the same on every backend.
pytestmark = pytest.mark.extra_large_but_on("torch")
SHARED = ("multi_key", "variable_tracking", "meaning")
EACH = pytest.mark.parametrize("task", TASKS)


def words(text):
    return re.findall(r"\w+", text.lower())


def draw(task, count=20, lengths=(200, 400), **kwargs):
    return [*draw_text_haystacks(None, count, lengths, task, **kwargs)]


@EACH
def test_lengths_are_exact_and_nothing_else_is_random(task):
    haystacks = draw(task, seed=3)
    for haystack in haystacks:
        text = " ".join([*haystack.images, haystack.question])
        assert len(text.split()) == haystack.length == haystack.size
        assert len(haystack.needles) == len(haystack.depths)
    assert haystacks == draw(task, seed=3)
    assert haystacks != draw(task, seed=4)
    assert {h.length for h in haystacks} == {200, 400}
    if len(haystacks[0].depths) == 1 and task != "meaning":
        depths = sorted(h.depths[0] for h in haystacks)
        assert depths[0] < 0.25 and depths[-1] > 0.75


def solver(images, prompts):
    """Answers by the wording of facts, from the documents that it is shown."""
    return [
        answer_of(" ".join(documents), prompt)
        for documents, prompt in zip(images, prompts, strict=True)
    ]


def answer_of(text, prompt):
    if "variable" in prompt:
        name = re.search(r"variable (\w+) hold", prompt)[1]
        while name.startswith("x"):
            found = re.search(
                f"Variable {name} is set to (variable )?(\\w+)", text
            )
            if not found:
                return ""
            name = found[2]
        return name
    for fact, meaning in MEANINGS:
        if f"Who {meaning}?" in prompt:
            pattern = re.escape(fact).replace(r"\{name\}", r"(\w+)")
            return " ".join(re.findall(pattern, text))
    if "pass key" in prompt:
        return " ".join(re.findall(r"The pass key is (\w+)\.", text))
    kind, city = re.search(r"(password|code)s? of (\w+)\?", prompt).groups()
    return ", ".join(re.findall(rf"{kind} of {city} is (\w+)\.", text))


@EACH
def test_a_solver_needs_the_needle(task):
    rule = "contains_all" if task == "multi_value" else "contains"
    accuracy = {
        shown: evaluate_haystacks(
            solver,
            draw(task, 40),
            through="generate",
            rule=rule,
            shown=shown,
            verbose=False,
        ).accuracy
        for shown in ("all", "needles", "none")
    }
    assert accuracy["all"] == accuracy["needles"] == {200: 1.0, 400: 1.0}
    assert accuracy["none"] == {200: 0.0, 400: 0.0}


@EACH
def test_guessing_is_chance(task):
    haystacks = draw(task, 200)
    rng = np.random.default_rng(0)
    if haystacks[0].options is None:
        pytest.skip("Answers in free words cannot be guessed.")
    guesses = [h.options[rng.integers(4)] == h.answer for h in haystacks]
    assert abs(np.mean(guesses) - 0.25) < 0.1
    # No place among the options is more often right than others.
    places = [h.options.index(h.answer) for h in haystacks]
    assert np.bincount(places, minlength=4).min() > 25


@EACH
def test_splits_share_no_needle(task):
    facts = {
        split: {
            sentence
            for h in draw(task, 100, (300,), split=split)
            for needle in h.needles
            for sentence in re.findall(r"[^.]+\.", h.images[needle])
            if not is_filler(sentence.strip())
        }
        for split in text_tasks.SPLITS
    }
    assert all(facts.values())
    for one in facts:
        for other in facts:
            assert one == other or not facts[one] & facts[other]


def is_filler(sentence):
    if sentence in filler.NOISE:
        return True
    return any(part in sentence.lower() for part in filler.WHO)


def test_meanings_share_no_word_with_their_questions():
    plain = {"a", "an", "the", "in", "is", "on", "to", "with", "and", "of"}
    for fact, meaning in MEANINGS:
        said = words(fact.format(name=""))
        asked = words(f"who {meaning} the name of the person who is")
        shared = {*said} & {*asked}
        assert not shared - plain, fact
    assert len({meaning for _, meaning in MEANINGS}) == len(MEANINGS)


def test_filler_gives_nothing_away():
    parts = (filler.WHO, filler.DID, filler.WHERE, filler.WHEN, filler.NOISE)
    said = {word for part in parts for text in part for word in words(text)}
    for names in (text_tasks.CITIES, text_tasks.WORDS, text_tasks.PEOPLE):
        assert len({*names}) == len(names)
        assert not {name.lower() for name in names} & said


@pytest.mark.parametrize("task", SHARED)
def test_questions_about_one_text(task):
    haystacks = draw(task, 12, (400,), questions_per_text=4)
    for start in (0, 4, 8):
        texts = {h.images for h in haystacks[start : start + 4]}
        asked = {h.question for h in haystacks[start : start + 4]}
        assert len(texts) == 1 and len(asked) == 4
    assert len({h.images for h in haystacks}) == 3
    right = evaluate_haystacks(
        solver, haystacks, through="generate", rule="contains", verbose=False
    )
    assert right.accuracy == {400: 1.0}
    assert right.unit == "tokens"


@pytest.fixture(scope="module")
def model():
    preprocessor = PREPROCESSORS[small_models.llama]()
    model, _ = make_pair(small_models.llama, preprocessor)
    model.preprocessor = preprocessor
    return model


def test_tokens_of_a_model_are_counted(model):
    form = prompts_for(model).form
    for haystack in draw_text_haystacks(model, 4, (900, 1500)):
        tokens, _ = form.prompt_tokens(haystack.images, haystack.question)
        assert len(tokens) == haystack.length


def test_shared_documents_change_no_answer(model, tmp_path):
    drawn = [
        *draw_text_haystacks(model, 8, (1200,), "multi_key", "test", 4),
        *draw_text_haystacks(model, 2, (1200,), seed=1),
    ]
    # To this tokenizer, all words begin alike.
    haystacks = [dataclasses.replace(each, options=None) for each in drawn]

    def evaluate(haystacks, **kwargs):
        return evaluate_haystacks(
            model, haystacks, verbose=False, tokens_per_batch=2500, **kwargs
        )

    together = evaluate(haystacks, output=tmp_path)
    alone = [evaluate([each]).records[0] for each in haystacks]
    assert [r["answer"] for r in together.records] == [
        r["answer"] for r in alone
    ]
    assert together.unit == "tokens"
    for name in ("results.csv", "accuracy.png", "positions.png"):
        assert (tmp_path / name).stat().st_size


def test_a_text_too_short_for_a_models_tokens(model):
    with pytest.raises(ValueError, match="room for its facts"):
        list(draw_text_haystacks(model, 1, (60,)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lengths=(12,)), "room for its facts"),
        (dict(num_questions=10, questions_per_text=3), "multiple"),
        (dict(questions_per_text=2), "has one question"),
        (dict(task="multi_key", num_questions=30, questions_per_text=30), "24"),
        (dict(task="counting"), "`task` must be one of"),
        (dict(split="dev"), "`split` must be one of"),
    ],
)
def test_what_it_refuses(change, message):
    given = dict(model=None, num_questions=4, lengths=(200,)) | change
    with pytest.raises(ValueError, match=message):
        list(draw_text_haystacks(**given))


def test_models_of_images_are_refused():
    model = small_models.make_model(small_models.llama)
    with pytest.raises(ValueError, match="family whose prompts"):
        draw_text_haystacks(model, 4, (9,))


def test_length_and_depths_belong_together():
    with pytest.raises(ValueError, match="given together"):
        Haystack("Is it?", "yes", "", "", (0,), ["A page."], length=9)
    with pytest.raises(ValueError, match="one number for each needle"):
        Haystack(
            "Is it?", "yes", "", "", (0,), ["A page."], length=9, depths=()
        )


def test_images_and_text_are_not_mixed(model):
    text = Haystack(
        "Is it?", "yes", "", "", (0,), ["A."], length=5, depths=(0.5,)
    )
    pages = Haystack("Is it?", "yes", "", "", (0,), ["A page."])
    results = evaluate_haystacks(
        lambda images, prompts: ["yes"] * len(prompts),
        [text, pages],
        through="generate",
        verbose=False,
    )
    with pytest.raises(ValueError, match="evaluated apart"):
        _ = results.unit


class TextHaystacksTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = TextHaystacks
    SPLITS = {"train": 6, "validation": 2, "test": 4}
    BUILDER_CONFIG_NAMES_TO_TEST = [
        TextHaystackConfig(
            task=task,
            lengths=(200,),
            num_questions={"train": 6, "validation": 2, "test": 4},
        )
        for task in ("meaning", "pass_key")
    ]

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.EXAMPLE_DIR = folder.name
        super().setUpClass()


def test_examples_become_haystacks_again(tmp_path):
    config = TextHaystackConfig(lengths=(200,), num_questions={"test": 4})
    builder = keras_laid.haystacks.TextHaystacks(
        config=config, data_dir=tmp_path
    )
    builder.download_and_prepare(file_format="array_record")
    found = [*map(Haystack.from_example, builder.as_data_source("test"))]
    expected = draw_text_haystacks(None, 4, (200,), seed=(0, 2))
    by_question = {h.question + h.answer: h for h in found}
    for haystack in expected:
        again = by_question[haystack.question + haystack.answer]
        # Numbers are kept in float32.
        np.testing.assert_allclose(again.depths, haystack.depths, rtol=1e-6)
        assert dataclasses.replace(again, depths=haystack.depths) == haystack
