"""How far real pretrained decoders see: accuracy by length and by depth.

    make real-models
    export KERAS_BACKEND=jax
    python -m benchmarks.text_windows
    python -m benchmarks.text_windows --lengths 16384 --methods yarn self_extend

Appends a row for each model, method, task and length to
`benchmarks/results/text_windows.csv`; those that already have one are skipped.
An evaluation that is interrupted resumes: its answers are in
`runs/text_windows`.
"""

import argparse
import contextlib
import functools
import math
import pathlib
import time

import keras_hub

import keras_laid
from benchmarks import rows
from keras_laid.haystacks import draw_text_haystacks

PATH = rows.RESULTS / "text_windows.csv"
RUNS = pathlib.Path("runs/text_windows")
PRESETS = pathlib.Path("runs/real_models")
KEY = ("model", "method", "task", "length", "seed")
# From the name of a preset to the tokens that it was trained on.
WINDOWS = {"smollm2_135m_instruct": 8192, "gemma_3_270m": 32768}
LENGTHS = (512, 1024, 2048, 4096, 8192)
# Questions about one text, and texts up to 4,096 tokens and beyond.
TASKS = {"multi_key": (20, 13, 5), "variable_tracking": (10, 25, 10)}
LONG = 4096
DEPTHS = 5
SEED = 0
NEIGHBORS = 1024


def untouched(model, window, length):
    return contextlib.nullcontext()


def yarn(model, window, length):
    return keras_laid.yarn(
        model, factor=max(1.0, length / window), original_length=window
    )


def self_extend(model, window, length):
    grouped = (length - NEIGHBORS) / (window - NEIGHBORS)
    return keras_laid.self_extend(
        model, group_size=max(1, math.ceil(grouped)), neighbor_window=NEIGHBORS
    )


METHODS = {"untouched": untouched, "yarn": yarn, "self_extend": self_extend}


@functools.cache
def load(name):
    return keras_hub.models.CausalLM.from_preset(str(PRESETS / name))


def measure(name, method, task, length):
    """Asks all questions of a length, and appends a row."""
    key = dict(model=name, method=method, task=task, length=length, seed=SEED)
    if rows.is_done(PATH, key, KEY):
        return
    print(key, flush=True)
    model = load(name)
    questions, few, fewer = TASKS[task]
    texts = few if length <= LONG else fewer
    haystacks = draw_text_haystacks(
        model,
        questions * texts,
        (length,),
        task,
        questions_per_text=questions,
        seed=(SEED, length),
    )
    commit = rows.commit()
    began = time.time()
    with METHODS[method](model, WINDOWS[name], length):
        results = keras_laid.evaluate_haystacks(
            model,
            haystacks,
            through="choice",
            tokens_per_batch=length,
            output=RUNS / name / method / task / str(length),
        )
    (accuracy,) = results.accuracy.values()
    ((low, high),) = results.intervals().values()
    (depths,) = results.by_position(DEPTHS).values()
    rows.append_row(
        PATH,
        dict(
            **key,
            questions=questions * texts,
            texts=texts,
            accuracy=accuracy,
            low=low,
            high=high,
            chance=results.chance,
            **{
                f"depth_{index}": depth.accuracy
                for index, depth in enumerate(depths, 1)
            },
            least_in_a_cell=min(depth.questions for depth in depths),
            seconds=round(time.time() - began),
            commit=commit,
            **rows.versions(),
        ),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=[*WINDOWS])
    parser.add_argument("--methods", nargs="+", default=["untouched"])
    parser.add_argument("--tasks", nargs="+", default=[*TASKS])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    args = parser.parse_args()
    for length in args.lengths:
        for name in args.models:
            for task in args.tasks:
                for method in args.methods:
                    measure(name, method, task, length)


if __name__ == "__main__":
    main()
