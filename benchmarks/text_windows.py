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
import matplotlib.pyplot as plt
import numpy as np

import keras_laid
from benchmarks import rows
from benchmarks.markdown import markdown_table
from keras_laid.haystacks import draw_text_haystacks
from keras_laid.plotting import finish

PATH = rows.RESULTS / "text_windows.csv"
RUNS = pathlib.Path("runs/text_windows")
PRESETS = pathlib.Path("runs/real_models")
KEY = ("model", "method", "task", "length", "seed")
# From the name of a preset to the tokens that it was trained on.
WINDOWS = {"smollm2_135m_instruct": 8192, "gemma_3_270m": 32768}
LENGTHS = (512, 1024, 2048, 4096, 8192)
# Questions about one text, and texts up to 4,096 tokens and beyond.
TASKS = {"multi_key": (20, 16, 6), "variable_tracking": (10, 32, 12)}
LONG = 4096
DEPTHS = 5
PARTS = range(1, DEPTHS + 1)
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


def read_runs():
    """From (model, method, task) to the row of each length, shortest first."""
    runs = {}
    for row in sorted(rows.read_rows(PATH), key=lambda row: int(row["length"])):
        key = row["model"], row["method"], row["task"]
        runs.setdefault(key, {})[int(row["length"])] = row
    return runs


def accuracy_table():
    """Accuracy by length, and the window by three rules, in tokens."""
    runs = read_runs()
    lengths = sorted({length for run in runs.values() for length in run})
    lines = []
    for key, run in runs.items():
        cells = [
            f"{float(run[n]['accuracy']):.2f} ({float(run[n]['low']):.2f} to "
            f"{float(run[n]['high']):.2f})"
            if n in run
            else ""
            for n in lengths
        ]
        lines.append([*key, *cells, *windows_of(run)])
    header = ["model", "method", "task", *(f"{n:,}" for n in lengths)]
    return markdown_table([*header, "relative", "RULER", "NoLiMa"], lines)


def windows_of(run):
    """Windows by the relative rule, RULER's and NoLiMa's, with intervals."""
    accuracy = {n: float(row["accuracy"]) for n, row in run.items()}
    questions = {n: int(row["questions"]) for n, row in run.items()}
    (chance,) = {float(row["chance"]) for row in run.values()}
    cells = []
    for arguments in (
        dict(rule="relative", chance=chance),
        dict(rule="ruler"),
        dict(rule="nolima"),
    ):
        ends = keras_laid.effective_window_interval(
            accuracy, questions, **arguments
        )
        window = keras_laid.effective_window(accuracy, **arguments)
        low, high = map(window_text, ends)
        cells.append(f"{window_text(window)} ({low} to {high})")
    return cells


def window_text(window):
    sign = {"above": "≥ ", "below": "< ", None: ""}[window.censored]
    return f"{sign}{window.window:,.0f}"


def depth_table():
    """Accuracy by length and by the fifth of the prompt with the needle."""
    lines = [
        [
            *(row[name] for name in ("model", "method", "task")),
            f"{length:,}",
            *(f"{float(row[f'depth_{n}']):.2f}" for n in PARTS),
            row["least_in_a_cell"],
        ]
        for run in read_runs().values()
        for length, row in run.items()
    ]
    header = ["model", "method", "task", "tokens"]
    parts = ["first fifth", "second", "third", "fourth", "last fifth"]
    return markdown_table([*header, *parts, "questions, at least"], lines)


TABLES = {"text_windows": accuracy_table, "text_windows_depth": depth_table}


def draw():
    """A picture of accuracy by length and depth, a panel for each run."""
    runs = read_runs()
    figure, panels = plt.subplots(
        1,
        len(runs),
        figsize=(1.2 + 3.4 * len(runs), 3.4),
        layout="constrained",
        squeeze=False,
    )
    for axes, (key, run) in zip(panels[0], runs.items(), strict=True):
        values = np.array(
            [[float(r[f"depth_{n}"]) for r in run.values()] for n in PARTS]
        )
        image = axes.imshow(
            values, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto"
        )
        for (y, x), value in np.ndenumerate(values):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center")
        axes.set_xticks(range(len(run)), [f"{n:,}" for n in run])
        axes.set_yticks(range(DEPTHS), ["start", "", "middle", "", "end"])
        axes.set(title="\n".join(key), xlabel="tokens in the prompt")
        axes.tick_params(length=0)
    panels[0][0].set_ylabel("where the needle is")
    figure.colorbar(image, ax=panels[0], label="accuracy (chance 0.25)")
    finish(figure, rows.RESULTS / "text_windows.png")


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
