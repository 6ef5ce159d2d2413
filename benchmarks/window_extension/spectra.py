"""Measures where the attention of the trained students goes, by frequency.

    export KERAS_BACKEND=jax
    python -m benchmarks.window_extension.spectra --config short_200

Reads the weights that `python -m benchmarks.window_extension` left in
`runs/window_extension/`, and appends a row for each student to
`benchmarks/results/window_extension_spectra.csv`: means over questions, layers
and heads, on test haystacks of 100 images.
"""

import argparse

import keras
import numpy as np

import keras_laid
from benchmarks import rows
from benchmarks.window_extension import methods as study
from benchmarks.window_extension.settings import RUNS
from benchmarks.window_extension.settings import names_of_configs
from benchmarks.window_extension.settings import read_settings
from keras_laid import spectral

PATH = rows.RESULTS / "window_extension_spectra.csv"
KEY = ("config", "method", "seed")
IMAGES = 100
QUESTIONS = 64
CUTOFF = 0.05  # Cycles per image; frequencies up to it are low.
BANDS = (0.0, CUTOFF, 0.5)


def measure(model, teacher, seed):
    """Numbers of one student, or of the teacher itself."""
    inputs, _, _ = keras_laid.Haystacks(
        keras_laid.Digits("test"),
        model.preprocessor,
        QUESTIONS,
        sizes=(IMAGES,),
        batch_size=QUESTIONS,
        seed=seed,
    )[0]
    layers = range(model.backbone.num_layers)
    model, teacher = study.several_images(model), study.several_images(teacher)
    signal = spectral.attention_by_distance(
        model, inputs, layers=layers, per="image"
    )
    share = spectral.low_frequency_share(signal, CUTOFF)
    power = spectral.power_spectrum(signal).power[..., 1:].sum(axis=-1)
    agreement = spectral.band_agreement(
        teacher,
        model,
        inputs,
        BANDS,
        teacher_layers=layers,
        student_layers=layers,
        per="image",
        heads="best",
    )
    low, high = np.nanmean(agreement, axis=0)
    return dict(
        low_frequency_share=np.nanmean(share),
        low_frequency_energy=np.nanmean(share * power),
        energy=power.mean(),
        agreement_low=low,
        agreement_high=high,
    )


def students(settings, names, seeds):
    """Yields method, seed and model, for the teacher and untouched too."""
    for seed in seeds:
        yield "teacher", seed, study.load(keras_laid.presets.TEACHER)
        yield "untouched", seed, study.prior_student(settings)
        for name in names:
            (weights,) = (RUNS / settings.name).glob(
                f"{name}_{seed}_test_*/student.weights.h5"
            )
            student = study.load(getattr(keras_laid.presets, settings.student))
            rank = study.METHODS[name].lora_rank
            if rank:
                student.backbone.enable_lora(rank)
            student.backbone.load_weights(weights)
            yield name, seed, student


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, choices=names_of_configs())
    parser.add_argument("--methods", nargs="+", help="default: all trained")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    args = parser.parse_args()
    settings = read_settings(args.config)
    names = args.methods or [
        name for name in settings.methods if name in study.METHODS
    ]
    teacher = study.load(keras_laid.presets.TEACHER)
    for name, seed, model in students(settings, names, args.seeds):
        row = dict(config=settings.name, method=name, seed=seed)
        if rows.is_done(PATH, row, KEY):
            continue
        scope = study.untouched
        if name in study.METHODS:
            scope = study.scope_of(study.METHODS[name])
        with scope(model, length=None):
            row |= measure(model, teacher, seed)
        row |= dict(
            images=IMAGES,
            questions=QUESTIONS,
            cutoff=CUTOFF,
            commit=rows.commit(),
            keras=keras.__version__,
            backend=keras.backend.backend(),
            machine=rows.machine(),
        )
        print(row, flush=True)
        rows.append_row(PATH, row)


if __name__ == "__main__":
    main()
