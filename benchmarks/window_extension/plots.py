"""The study's figures, from its rows."""

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import rows
from benchmarks.window_extension.settings import read_settings
from benchmarks.window_extension.tables import SIZES
from benchmarks.window_extension.tables import UNTOUCHED
from benchmarks.window_extension.tables import interval
from benchmarks.window_extension.tables import read_runs
from benchmarks.window_extension.tables import read_spectra


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


def plot_accuracy(of_config, methods, path):
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    bases = list(dict.fromkeys(m.removesuffix("_stretched") for m in methods))
    for method in methods:
        runs = of_config.get(method)
        if not runs:
            continue
        base = method.removesuffix("_stretched")
        color = "0.4" if base == UNTOUCHED else colors[bases.index(base) % 10]
        means, halves = zip(
            *(interval([run[size] for run in runs.values()]) for size in SIZES),
            strict=True,
        )
        means, halves = np.array(means), np.array(halves)
        stretched = method.endswith("_stretched")
        axes.plot(
            SIZES,
            means,
            color=color,
            linestyle="-" if stretched else "--",
            label=method.replace("_", " "),
        )
        axes.fill_between(
            SIZES, means - halves, means + halves, color=color, alpha=0.12
        )
    axes.axhline(0.5, color="0.8", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(SIZES, SIZES)
    axes.minorticks_off()
    axes.set(
        xlabel="images in the haystack",
        ylabel="accuracy (chance 0.5), 95% interval over seeds",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw():
    """Every figure of the study that has rows of several seeds."""
    for name, of_config in read_runs().items():
        if min(map(len, of_config.values())) < 2:
            continue
        path = rows.RESULTS / f"window_extension_{name}.png"
        plot_accuracy(of_config, read_settings(name).methods, path)
    for name, by_method in read_spectra().items():
        path = rows.RESULTS / f"window_extension_{name}_spectra.png"
        plot_low_frequency(by_method, path)
