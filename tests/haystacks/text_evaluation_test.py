"""Decoders of text, asked about one document among many."""

import numpy as np
import pytest

from keras_laid import evaluate_haystacks
from keras_laid.backbones.prompt_forms import prompt_form
from keras_laid.backbones.text_prompts import padded_length
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks import Haystack
from tests.backbones import small_models
from tests.haystacks.families import COLOURS
from tests.haystacks.families import PREPROCESSORS
from tests.haystacks.families import make_pair
from tests.support import to_numpy

LLAMA = small_models.llama


@pytest.fixture(scope="module")
def model():
    preprocessor = PREPROCESSORS[LLAMA]()
    model, _ = make_pair(LLAMA, preprocessor)
    model.preprocessor = preprocessor
    return model


def make_haystacks(sizes=(1, 3, 3, 4), **changes):
    return [
        Haystack(
            f"Is there a {COLOURS[0]} page?",
            ("yes", "no")[number % 2],
            anchor="",
            target="",
            needles=(size - 1,),
            images=[f"A {colour} page." for colour in COLOURS[:size]],
            **changes,
        )
        for number, size in enumerate(sizes)
    ]


def evaluate(model, haystacks, **kwargs):
    return evaluate_haystacks(model, haystacks, verbose=False, **kwargs)


def test_logits_are_those_that_training_reads(model):
    documents = [[f"A {c} page." for c in COLOURS[n : n + 3]] for n in range(4)]
    texts = [f"Is there a {colour} page?" for colour in COLOURS[:4]]
    x, _, sample_weight = prompt_form(model.preprocessor).encode(
        documents, texts, ["yes"] * 4, 80
    )
    logits = to_numpy(
        model({name: x[name] for name in ("token_ids", "padding_mask")})
    )
    # Before the first token of the response.
    expected = logits[np.arange(4), sample_weight.argmax(axis=1)]
    found = prompts_for(model).first_logits(documents, texts)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.extra_large_but_on("torch")
def test_logits_choice_and_words(model):
    haystacks = make_haystacks()
    logits = evaluate(model, haystacks)
    words = evaluate(model, haystacks, through="generate", max_answer_tokens=1)
    choice = evaluate(model, haystacks, through="choice")
    assert logits.questions == words.questions == {1: 1, 3: 2, 4: 1}
    for one, other in zip(logits.records, words.records, strict=True):
        special = one["answer"].startswith("<")
        said = "" if special else one["answer"].strip()
        assert said == other["answer"].strip()
    assert {r["answer"] for r in choice.records} <= {"yes", "no"}
    # Answers of any length, and any wording.
    free = make_haystacks(options=None)
    results = evaluate(
        model, free, through="generate", rule="exact", max_answer_tokens=5
    )
    assert results.chance == 0


def test_documents_are_read(model):
    prompts = prompts_for(model)
    documents = [f"A {colour} page." for colour in COLOURS[:3]]
    text = prompts.fill("{images}{question}", 3, question="Is there?")
    assert text == "Is there?"
    seen = prompts.first_logits([documents], [text])
    for place in range(3):
        others = list(documents)
        others[place] = "A brown page."
        found = prompts.first_logits([others], [text])
        assert np.abs(found - seen).max() > 1e-4
    # Rows of a batch do not change each other.
    both = prompts.first_logits([documents, documents[:1]], [text, text])
    np.testing.assert_allclose(both[:1], seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shown", ["needles", "none"])
def test_reference_lines(model, shown):
    results = evaluate(model, make_haystacks(), shown=shown)
    assert results.questions == {1: 1, 3: 2, 4: 1}
    if shown == "none":
        answers = {record["answer"] for record in results.records}
        assert len(answers) == 1  # The question is always the same.


def test_few_lengths_are_compiled():
    lengths = {padded_length(n) for n in range(1, 4097)}
    assert all(n <= padded_length(n) < 1.125 * n + 16 for n in range(1, 4097))
    assert len(lengths) < 60


def test_what_it_cannot_ask(model):
    image = np.zeros((4, 4, 3), "uint8")
    haystack = Haystack("Is it?", "yes", "", "", (0,), [image])
    with pytest.raises(TypeError, match="asked about documents.*haystack 0"):
        evaluate(model, [haystack])
    with pytest.raises(ValueError, match="Documents must stand before"):
        evaluate(model, make_haystacks(), prompt="{question}{images}")
