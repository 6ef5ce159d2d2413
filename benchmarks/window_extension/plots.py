"""The study's figures, from its rows."""

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import rows
from benchmarks.window_extension.settings import read_settings
from benchmarks.window_extension.tables import SIZES
from benchmarks.window_extension.tables import UNTOUCHED
from benchmarks.window_extension.tables import accuracy_over_steps
from benchmarks.window_extension.tables import interval
from benchmarks.window_extension.tables import read_runs
from benchmarks.window_extension.tables import read_spectra
from benchmarks.window_extension.tables import sizes_over_steps


def plot_low_frequency(by_method, path):
    intervals = {
        method: interval([float(row["low_frequency_share"]) for row in rows])
        for method, rows in by_method.items()
    }
    figure, axes = plt.subplots(
        figsize=(7, 0.8 + 0.28 * len(intervals)), layout="constrained"
    )
    means, halves = zip(*intervals.values(), strict=True)
    names = [name.replace("_", " ") for name in intervals]
    axes.errorbar(means, names, xerr=halves, fmt="o", capsize=3)
    axes.axvline(means[names.index("teacher")], color="0.6", linestyle="--")
    axes.invert_yaxis()
    axes.set(xlabel="low-frequency share of attention's energy, 100 images")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_line(axes, numbers, found, **style):
    """Draws the mean of `found` at each of `numbers`, with its interval.

    Without three seeds or more, the interval is too wide to be drawn.
    """
    means, halves = np.transpose([interval(values) for values in found])
    (line,) = axes.plot(numbers, means, **style)
    if min(map(len, found)) < 3:
        return
    axes.fill_between(
        numbers,
        means - halves,
        means + halves,
        color=line.get_color(),
        alpha=0.12,
    )


def plot_accuracy(by_method, methods, path):
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    bases = list(dict.fromkeys(m.removesuffix("_stretched") for m in methods))
    for method in methods:
        runs = by_method.get(method)
        if not runs:
            continue
        base = method.removesuffix("_stretched")
        color = "0.4" if base == UNTOUCHED else colors[bases.index(base) % 10]
        draw_line(
            axes,
            SIZES,
            [[run[size] for run in runs.values()] for size in SIZES],
            color=color,
            linestyle="-" if method.endswith("_stretched") else "--",
            label=method.replace("_", " "),
        )
    axes.axhline(0.5, color="0.8", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(SIZES, SIZES)
    axes.minorticks_off()
    axes.set(
        xlabel="images in the haystack",
        ylabel="accuracy (chance 0.5), 95% interval over seeds",
        ylim=(0.3, 1.02),  # The intervals of few seeds may reach further.
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_steps(by_method, settings, path):
    """Accuracy over steps of training, a panel for each of some sizes."""
    sizes = sizes_over_steps(settings)
    figure, panels = plt.subplots(
        ncols=len(sizes),
        figsize=(4 + 2 * len(sizes), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    untouched = by_method[UNTOUCHED].values()
    for axes, size in zip(panels[0], sizes, strict=True):
        start = [run[size] for run in untouched]
        for method, by_steps in accuracy_over_steps(settings).items():
            found = [
                [run[size] for run in by_seed.values()]
                for by_seed in by_steps.values()
            ]
            draw_line(
                axes,
                [0, *by_steps],
                [start, *found],
                marker=".",
                label=method.replace("_", " "),
            )
        axes.axhline(0.5, color="0.8", linewidth=1)
        axes.set(
            title=f"{size} images",
            xlabel="steps of training",
            ylim=(0.45, 1.02),
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set(ylabel="accuracy (chance 0.5),\n95% interval over seeds")
    panels[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw():
    """Draws the study's figures; those of accuracy need several seeds."""
    for name, by_method in read_runs().items():
        if max(map(len, by_method.values())) < 2:
            continue
        settings = read_settings(name)
        path = rows.RESULTS / f"window_extension_{name}.png"
        plot_accuracy(by_method, settings.methods, path)
        if settings.measured_at and accuracy_over_steps(settings):
            path = rows.RESULTS / f"window_extension_{name}_steps.png"
            plot_steps(by_method, settings, path)
    for name, by_method in read_spectra().items():
        path = rows.RESULTS / f"window_extension_{name}_spectra.png"
        plot_low_frequency(by_method, path)
