"""Times making a batch of haystacks against training on it, side by side.

    KERAS_BACKEND=jax python -m benchmarks.input_pipeline

Appends a row for each size to `benchmarks/results/input_pipeline.csv`. The
batches are those of the guide: 32 questions, stretched positions, augmented
digits; the step is one of the guide's distiller.
"""

import argparse
import csv
import platform
import time

import keras
import keras_hub
import numpy as np

import keras_laid
from benchmarks.compare_methods import RESULTS
from benchmarks.compare_methods import commit
from benchmarks.compare_methods import machine


def milliseconds(function, repeats):
    """The median time of a call."""
    times = []
    for index in range(repeats):
        start = time.perf_counter()
        function(index)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


def make_distiller():
    models = [
        keras_hub.models.PaliGemmaCausalLM.from_preset(preset)
        for preset in (keras_laid.presets.TEACHER, keras_laid.presets.STUDENT)
    ]
    several_images = keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        *map(several_images, models)
    )
    distiller.compile(keras.optimizers.AdamW(1e-3))
    return distiller, models[1].preprocessor


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 10, 20])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    distiller, preprocessor = make_distiller()
    path = RESULTS.parent / "input_pipeline.csv"
    for size in args.sizes:
        haystacks = keras_laid.Haystacks(
            keras_laid.Digits("train", augment=True),
            preprocessor,
            num_questions=32 * args.repeats,
            sizes=(size,),
            stretching=keras_laid.PositionStretching(150, 4),
        )
        batches = []
        batch_ms = milliseconds(
            lambda index, h=haystacks, b=batches: b.append(h[index]),
            args.repeats,
        )
        distiller.train_on_batch(*batches[0])  # Compiles.
        step_ms = milliseconds(
            lambda index, b=batches: distiller.train_on_batch(*b[index]),
            args.repeats,
        )
        row = {
            "backend": keras.backend.backend(),
            "images": size,
            "batch_ms": round(batch_ms, 2),
            "step_ms": round(step_ms, 2),
            "batch_share": round(batch_ms / step_ms, 4),
            "keras": keras.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "machine": machine(),
        }
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row)


if __name__ == "__main__":
    main()
