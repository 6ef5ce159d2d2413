"""Scores the embedded teacher and students on drawings they never saw.

    KERAS_BACKEND=jax python -m benchmarks.preset_scores

Appends rows to `benchmarks/results/preset_scores.csv`; presets that already
have a row are skipped. `benchmarks.report` adds the scores to the model cards.
"""

import functools
import pathlib

import keras_hub

import keras_laid
from benchmarks import rows
from benchmarks.markdown import markdown_table
from benchmarks.window_extension.tables import SIZES

PATH = rows.RESULTS / "preset_scores.csv"
QUESTIONS = 1024  # At each size.
SEED = 1


def table(name):
    """Accuracy of an embedded preset by haystack size."""
    row = rows.only("preset_scores", preset=name)
    accuracy = [f"{float(row[f'accuracy_{size}']):.3f}" for size in SIZES]
    return markdown_table(["images", *SIZES], [["accuracy", *accuracy]])


PRESETS = ("digits_single_image", "digits_student", "digits_teacher")
TABLES = {name: functools.partial(table, name) for name in PRESETS}


def main():
    source = keras_laid.Digits("test")
    for preset in (
        keras_laid.presets.SINGLE_IMAGE_STUDENT,
        keras_laid.presets.STUDENT,
        keras_laid.presets.TEACHER,
    ):
        key = dict(preset=pathlib.Path(preset).name, seed=SEED)
        if rows.is_done(PATH, key, key):
            continue
        model = keras_hub.models.PaliGemmaCausalLM.from_preset(preset)
        haystacks = keras_laid.draw_haystacks(
            source, QUESTIONS * len(SIZES), SIZES, seed=SEED
        )
        accuracy = keras_laid.evaluate_haystacks(model, haystacks).accuracy
        rows.append_row(
            PATH,
            dict(
                **key,
                questions=QUESTIONS,
                **{f"accuracy_{n}": value for n, value in accuracy.items()},
                commit=rows.commit(),
                **rows.versions(),
            ),
        )


if __name__ == "__main__":
    main()
