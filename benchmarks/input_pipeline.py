"""Times training fed by a `PyDataset`, by tf.data and by grain, side by side.

    KERAS_BACKEND=jax python -m benchmarks.input_pipeline

Writes the backend's rows in `benchmarks/results/input_pipeline.csv`. Batches
are like those of the guide: 32 questions about 2, 10 or 20 images, with
stretched positions and augmented digits. A step is one of the default
distiller. Feeders take turns, with one epoch each, and are compared with
batches made beforehand.
"""

import argparse
import functools
import time

import grain
import keras
import keras_hub
import tensorflow as tf

import keras_laid
from benchmarks import rows
from benchmarks.measuring import Prepared
from benchmarks.measuring import ms_by_feeder
from keras_laid.backbones import several_images

PATH = rows.RESULTS / "input_pipeline.csv"


def tf_data(haystacks):
    def spec(one, other):
        # Two batches of different sizes show which axes vary.
        pairs = zip(one.shape, other.shape, strict=True)
        shape = [a if a == b else None for a, b in pairs]
        return tf.TensorSpec(shape, one.dtype)

    signature = keras.tree.map_structure(spec, haystacks[0], haystacks[1])
    dataset = tf.data.Dataset.from_generator(
        lambda: (haystacks[i] for i in range(len(haystacks))),
        output_signature=signature,
    )
    return dataset.prefetch(tf.data.AUTOTUNE)


def grain_dataset(haystacks):
    dataset = grain.MapDataset.range(len(haystacks))
    return dataset.map(lambda index: haystacks[index]).to_iter_dataset()


FEEDERS = {
    "prepared": Prepared,
    "py_dataset": lambda haystacks: haystacks,
    "tf_data": tf_data,
    "grain": grain_dataset,
}


def make_distiller():
    models = [
        keras_hub.models.PaliGemmaCausalLM.from_preset(preset)
        for preset in (keras_laid.presets.TEACHER, keras_laid.presets.STUDENT)
    ]
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        *map(several_images, models)
    )
    distiller.compile(keras.optimizers.AdamW(1e-3))
    return distiller, models[1].preprocessor


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=7, help="of each feeder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    distiller, preprocessor = make_distiller()
    haystacks = keras_laid.Haystacks(
        keras_laid.Digits("train", augment=True),
        preprocessor,
        num_questions=32 * args.steps,
        sizes=(2, 10, 20),
        stretching=keras_laid.PositionStretching(150, 4),
        seed=args.seed,
    )
    started = time.perf_counter()
    Prepared(haystacks)
    making = time.perf_counter() - started
    feeders = {name: make(haystacks) for name, make in FEEDERS.items()}
    ms = ms_by_feeder(
        functools.partial(distiller.fit, steps_per_epoch=args.steps, verbose=0),
        feeders,
        args.steps,
        args.epochs,
    )
    found = [
        {
            "backend": keras.backend.backend(),
            "feeder": name,
            "ms_per_step": round(ms[name], 2),
            "ratio_to_prepared": round(ms[name] / ms["prepared"], 3),
            "ms_making_a_batch": round(1e3 * making / args.steps, 2),
            "steps": args.steps,
            "epochs": args.epochs,
            "seed": args.seed,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "grain": grain.__version__,
            "commit": rows.commit(),
            "machine": rows.machine(),
        }
        for name in feeders
    ]
    backend = keras.backend.backend()
    others = [row for row in rows.read_rows(PATH) if row["backend"] != backend]
    PATH.unlink(missing_ok=True)
    for row in [*others, *found]:
        rows.append_row(PATH, row)
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
