"""Trains every method of a config on several seeds, and keeps the rows.

    export KERAS_BACKEND=jax
    python -m benchmarks.window_extension --config short --tune
    python -m benchmarks.window_extension --config short

The first command tries each learning rate on one seed and measures on the
validation split; the second uses each method's best learning rate and measures
on the test split. Rows are appended to
`benchmarks/results/window_extension.csv`: settings, accuracy by haystack size,
commit, machine and versions. Runs that already have a row are skipped, so that
the script can be stopped and started again, and several processes can share the
work.
"""

import argparse
import time

import keras

import keras_laid
from benchmarks import rows
from benchmarks.window_extension import methods as study
from benchmarks.window_extension.settings import RUNS
from benchmarks.window_extension.settings import names_of_configs
from benchmarks.window_extension.settings import read_settings
from benchmarks.window_extension.tables import SIZES
from keras_laid.haystacks import draw_haystacks

PATH = rows.RESULTS / "window_extension.csv"
QUESTIONS = 256  # At each size.
TUNING_SEED = 100
KEY = ("config", "method", "seed", "split", "learning_rate", "steps")


def measure(student, split, seed, output, scope, sizes=SIZES):
    """Accuracy by size, on questions that depend only on split and seed."""
    accuracy = {}
    for size in sizes:
        haystacks = draw_haystacks(
            keras_laid.Digits(split),
            QUESTIONS,
            sizes=(size,),
            seed=(seed, size),
        )
        image_tokens = size * student.backbone.image_sequence_length
        length = image_tokens + student.preprocessor.sequence_length
        with scope(student, length):
            results = keras_laid.evaluate_haystacks(
                study.several_images(student),
                haystacks,
                output=output / str(size),
                verbose=False,
            )
        accuracy |= results.accuracy
    return accuracy


def run(settings, name, seed, split, learning_rate, missing):
    """Trains once, and appends a row for each missing number of steps."""
    key = dict(
        config=settings.name,
        method=name,
        seed=seed,
        split=split,
        learning_rate=learning_rate,
    )
    prior = study.prior_teacher if name == "teacher" else study.prior_student
    student = prior(settings)
    keras.utils.set_random_seed(seed)
    output = RUNS / settings.name / f"{name}_{seed}_{split}_{learning_rate}"
    commit = rows.commit()
    began = time.time()

    def append_row(steps, scope=study.untouched, distiller=None):
        seconds = round(time.time() - began)
        sizes = SIZES
        if steps < settings.steps:
            sizes = settings.measured_sizes or SIZES
        found = measure(student, split, seed, output / str(steps), scope, sizes)
        row = key | dict(steps=steps, commit=commit, seconds_training=seconds)
        row |= {f"accuracy_{size}": found.get(size, "") for size in SIZES}
        row |= dict(
            questions=QUESTIONS,
            **rows.versions(),
            retrieval_heads=heads_as_text(distiller),
        )
        rows.append_row(PATH, row)

    if name in study.UNTRAINED:
        append_row(settings.steps, study.UNTRAINED[name])
        return
    method = study.METHODS[name]

    def append_row_on_the_way(steps, distiller):
        # The student is already in the scope that it is trained in.
        append_row(steps, distiller=distiller)

    on_the_way = study.AfterSteps(
        {*missing} - {settings.steps}, append_row_on_the_way
    )
    distiller = study.train(
        method, settings, seed, learning_rate, student, [on_the_way]
    )
    output.mkdir(parents=True, exist_ok=True)
    student.backbone.save_weights(output / "student.weights.h5")
    if settings.steps in missing:
        append_row(settings.steps, study.scope_of(method), distiller)


def heads_as_text(distiller):
    """The teacher's heads that were matched: `layer.head` of each."""
    heads = distiller.retrieval_heads if distiller else ()
    return " ".join(f"{layer}.{head}" for layer, head in heads)


def best_learning_rate(settings, method):
    """The rate with the best mean accuracy on the validation split."""
    if method in study.UNTRAINED:
        return 0.0
    if settings.tuned_as:
        return best_learning_rate(read_settings(settings.tuned_as), method)
    method = settings.tuned_methods.get(method, method)
    tried = {
        float(row["learning_rate"]): sum(
            float(row[f"accuracy_{size}"]) for size in SIZES
        )
        for row in rows.read_rows(PATH)
        if row["config"] == settings.name
        and row["method"] == method
        and row["split"] == "validation"
    }
    if len(tried) < len(settings.learning_rates):
        raise ValueError(
            "Every learning rate must have been tried. Received: "
            f"config={settings.name!r}, method={method!r}, tried {list(tried)} "
            f"of {settings.learning_rates}. Run with `--tune` first."
        )
    return max(tried, key=tried.get)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, choices=names_of_configs())
    parser.add_argument("--methods", nargs="+", help="default: the config's")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    settings = read_settings(args.config)
    names = args.methods or settings.methods
    if args.tune:
        runs = [
            (name, TUNING_SEED, "validation", rate)
            for rate in settings.learning_rates
            for name in names
            if name in study.METHODS
            and name not in settings.tuned_methods
            and not settings.tuned_as
        ]
    else:
        runs = [
            (name, seed, "test", best_learning_rate(settings, name))
            for seed in args.seeds
            for name in names
        ]
    for number, (name, seed, split, rate) in enumerate(runs, 1):
        key = (settings.name, name, seed, split, rate)
        measured_at = {settings.steps}
        if name in study.METHODS and split == "test":
            measured_at |= {*settings.measured_at}
        missing = [
            steps
            for steps in measured_at
            if not rows.is_done(
                PATH, dict(zip(KEY, (*key, steps), strict=True)), KEY
            )
        ]
        if missing:
            print(f"Run {number} of {len(runs)}: {key}", flush=True)
            run(settings, name, seed, split, rate, missing)


if __name__ == "__main__":
    main()
