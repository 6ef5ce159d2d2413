"""A student that learns on its own answers."""

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid.backbones import several_images
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks import StudentResponses
from tests.backbones import small_models
from tests.haystacks.families import make_pair
from tests.haystacks.long_prompts_test import EACH
from tests.haystacks.long_prompts_test import make_prompts
from tests.support import FEW_STEPS
from tests.support import to_numpy


def make_distiller(family, data, supervised_weight=0.0):
    teacher, student = make_pair(family, data.form.preprocessor)
    for model in (teacher, student):
        model.preprocessor = data.form.preprocessor
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        several_images(teacher),
        several_images(student),
        retrieval_weight=0,
        supervised_weight=supervised_weight,
    )
    distiller.compile(keras.optimizers.Adam(1e-3), **FEW_STEPS)
    return distiller


@pytest.mark.extra_large_but_on("torch")
@EACH
def test_responses_are_the_students_answers(family):
    data = make_prompts(family, sizes=(2,))
    distiller = make_distiller(family, data)
    before = data[0]
    callback = StudentResponses(data, max_tokens=3)
    seen = []

    def record(epoch, logs):
        seen.append(dict(data.responses))

    distiller.fit(
        data,
        epochs=2,
        verbose=0,
        callbacks=[
            callback,
            keras.callbacks.LambdaCallback(on_epoch_end=record),
        ],
    )
    assert all(set(each) == set(range(8)) for each in seen)
    # As the student answers now.
    callback.on_epoch_begin(2)
    images, _ = data.drawn(0)
    prompts = prompts_for(distiller.student)
    texts = [
        prompts.fill("{question}", 2, question=data.examples[row].prompt)
        for row in data.order[:4]
    ]
    shown = data.load(images) if prompts.takes_images else images
    answers = prompts.generate(shown, texts, 3)
    assert [data.responses[number] for number in range(4)] == answers
    # They are the marked tokens, after the same prompts.
    x, y, sample_weight = data[0]
    tokenizer = data.form.preprocessor.tokenizer
    for row, answer in enumerate(answers):
        marked = y[row][sample_weight[row] > 0].tolist()
        assert len(marked) >= 1
        tokens = to_numpy(tokenizer(answer)).tolist() if answer else []
        assert marked[:-1] == tokens
        first = int(sample_weight[row].argmax())
        assert first == int(before[2][row].argmax())
        np.testing.assert_array_equal(
            x["token_ids"][row, : first + 1],
            before[0]["token_ids"][row, : first + 1],
        )


def test_a_share_of_the_prompts():
    data = make_prompts(small_models.llama, num_prompts=40, sizes=(2,))
    callback = StudentResponses(data, share=0.5, every=2, max_tokens=2)
    callback._prompts = FixedAnswers()
    callback.on_epoch_begin(0)
    first = dict(data.responses)
    assert 8 < len(first) < 32
    callback.on_epoch_begin(1)
    assert data.responses == first
    callback.on_epoch_begin(2)
    assert set(data.responses) != set(first)
    # The others keep their own responses.
    _, y, sample_weight = data[0]
    for row in range(4):
        own = data.examples[data.order[row]].response
        text = data.responses.get(row, own)
        marked = y[row][sample_weight[row] > 0].tolist()
        said = data.form.preprocessor.tokenizer.detokenize(marked[:-1])
        assert said.strip() == text
    state = callback.get_state()
    again = StudentResponses(make_prompts(small_models.llama, num_prompts=40))
    again.set_state(state)
    assert again.data.responses == data.responses


class FixedAnswers:
    takes_images = False

    def fill(self, template, images, question):
        return question

    def generate(self, images, texts, max_tokens):
        return ["page"] * len(texts)


def test_what_is_refused():
    data = make_prompts(small_models.llama, sizes=(2,))
    distiller = make_distiller(small_models.llama, data, supervised_weight=1.0)
    with pytest.raises(ValueError, match="cannot be its labels"):
        distiller.fit(data, verbose=0, callbacks=[StudentResponses(data)])
    with pytest.raises(TypeError, match="`data` must be a"):
        StudentResponses([])
    for name, value in (("share", 0.0), ("every", 0), ("max_tokens", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            StudentResponses(data, **{name: value})
