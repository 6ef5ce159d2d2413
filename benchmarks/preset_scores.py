"""Scores the embedded teacher and student on drawings they never saw.

    KERAS_BACKEND=jax python -m benchmarks.preset_scores

Writes `benchmarks/results/preset_scores.csv` anew; `benchmarks.report` puts the
scores on the presets' cards.
"""

import pathlib

import keras
import keras_hub

import keras_laid
from benchmarks import rows
from benchmarks.window_extension.tables import SIZES

PATH = rows.RESULTS / "preset_scores.csv"
QUESTIONS = 1024  # At each size.
SEED = 1


def main():
    PATH.unlink(missing_ok=True)
    source = keras_laid.Digits("test")
    for preset in (keras_laid.presets.STUDENT, keras_laid.presets.TEACHER):
        model = keras_hub.models.PaliGemmaCausalLM.from_preset(preset)
        haystacks = keras_laid.draw_haystacks(
            source, QUESTIONS * len(SIZES), SIZES, seed=SEED
        )
        accuracy = keras_laid.evaluate_haystacks(model, haystacks).accuracy
        rows.append_row(
            PATH,
            dict(
                preset=pathlib.Path(preset).name,
                seed=SEED,
                questions=QUESTIONS,
                **{f"accuracy_{n}": value for n, value in accuracy.items()},
                commit=rows.commit(),
                keras_laid=keras_laid.__version__,
                keras=keras.__version__,
                keras_hub=keras_hub.__version__,
                backend=keras.backend.backend(),
                machine=rows.machine(),
            ),
        )


if __name__ == "__main__":
    main()
