"""One script distils and evaluates a pair of models of every family."""

import inspect

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid.backbones import several_images
from keras_laid.haystacks import example_haystacks
from tests.backbones import small_models
from tests.haystacks.families import PREPROCESSORS
from tests.haystacks.families import make_pair
from tests.haystacks.long_prompts_test import EACH
from tests.haystacks.long_prompts_test import make_examples
from tests.support import FEW_STEPS


def script(teacher, student, examples, folder):
    data = keras_laid.LongPrompts(
        examples, student.preprocessor, sizes=(2, 3), batch_size=4
    )
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        several_images(teacher), several_images(student)
    )
    distiller.compile(keras.optimizers.Adam(1e-3), **FEW_STEPS)
    history = distiller.fit(data, epochs=2, verbose=0)
    student.save_to_preset(str(folder / "student"))
    results = keras_laid.evaluate_haystacks(
        student,
        example_haystacks(examples, 4, sizes=(1, 3), model=student),
        through="generate",
        rule="contains",
        max_answer_tokens=2,
        output=folder / "answers",
    )
    return history.history, results


@pytest.mark.extra_large_but_on("torch")
@EACH
def test_a_script_for_every_family(family, tmp_path):
    assert len(inspect.getsource(script).splitlines()) <= 25
    preprocessor = PREPROCESSORS[family]()
    task = small_models.TASKS[family]
    teacher, student = (
        task(backbone=model.backbone, preprocessor=preprocessor)
        for model in make_pair(family, preprocessor)
    )
    history, results = script(teacher, student, make_examples(family), tmp_path)
    assert np.isfinite(history["loss"]).all()
    assert np.isfinite(history["retrieval"]).all()
    assert results.questions == {1: 2, 3: 2}
    assert (tmp_path / "answers/accuracy.png").is_file()
    assert (tmp_path / "student/config.json").is_file()
