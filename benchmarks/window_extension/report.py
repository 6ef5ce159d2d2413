"""Draws the study's tables and figures from its rows.

    python -m benchmarks.window_extension.report

Fills the tables between the marks in `benchmarks/window_extension.md`, and
writes `benchmarks/results/window_extension_*.png`. Trains nothing.
"""

import collections
import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import keras_laid
from benchmarks.rows import read_rows
from benchmarks.window_extension.settings import names_of_configs
from benchmarks.window_extension.settings import read_settings

BENCHMARKS = pathlib.Path(__file__).parents[1]
ROWS = BENCHMARKS / "results/window_extension.csv"
SPECTRA = BENCHMARKS / "results/window_extension_spectra.csv"
REPORT = BENCHMARKS / "window_extension.md"
SIZES = (1, 2, 5, 10, 20, 50, 100, 150)
UNTOUCHED = "untouched"


def read_runs():
    """Accuracies of the test split: config, method, then seed."""
    runs = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in read_rows(ROWS):
        if row["split"] == "test":
            accuracy = {s: float(row[f"accuracy_{s}"]) for s in SIZES}
            of_method = runs[row["config"]][row["method"]]
            of_method[int(row["seed"])] = accuracy
    return runs


def read_spectra(config):
    """Rows of `spectra.py` by method, in the order they came."""
    by_method = collections.defaultdict(list)
    for row in read_rows(SPECTRA):
        if row["config"] == config:
            by_method[row["method"]].append(row)
    return by_method


def interval(values):
    """Mean and half of its 95% interval, by Student's t over seeds."""
    values = np.asarray(values)
    if len(values) < 2:
        return values.mean(), np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * error


def ratio_of_windows(runs, untouched):
    """Window over the untouched student's: geometric mean and 95% interval."""
    logs = [
        np.log(window(runs[seed]) / window(untouched[seed]))
        for seed in runs.keys() & untouched.keys()
    ]
    mean, half = interval(logs)
    return np.exp(mean), np.exp(mean - half), np.exp(mean + half)


def window(accuracy):
    return keras_laid.effective_window(accuracy).window


def make_table(of_config, methods):
    lines = [
        "| method | seeds | "
        + " | ".join(map(str, SIZES))
        + " | window ratio |",
        "| --- | --- |" + " --- |" * (len(SIZES) + 1),
    ]
    for method in methods:
        runs = of_config.get(method)
        if not runs:
            continue
        cells = []
        for size in SIZES:
            mean, half = interval([run[size] for run in runs.values()])
            cells.append(f"{mean:.3f} ± {half:.3f}")
        ratio, low, high = ratio_of_windows(runs, of_config[UNTOUCHED])
        cells.append(f"{ratio:.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {method} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_spectra_table(by_method):
    columns = {
        "low_frequency_share": "low-frequency share",
        "low_frequency_energy": "low-frequency energy, 1e-3",
        "energy": "energy, 1e-3",
        "agreement_low": "agreement, low",
        "agreement_high": "agreement, high",
    }
    lines = [
        "| method | seeds | " + " | ".join(columns.values()) + " |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for method, rows in by_method.items():
        cells = []
        for name in columns:
            unit = 1e-3 if "energy" in name else 1.0
            mean, half = interval([float(row[name]) / unit for row in rows])
            cells.append(f"{mean:.3f} ± {half:.3f}")
        lines.append(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def plot(of_config, methods, path):
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


def fill(text, name, table):
    """Replaces what stands between the marks of a table."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(
            f"{REPORT.name} must have the marks {begin} and {end}. "
            "Add them where the table belongs."
        )
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def main():
    text = REPORT.read_text()
    runs = read_runs()
    for name in names_of_configs():
        if name not in runs:
            continue
        settings = read_settings(name)
        text = fill(text, name, make_table(runs[name], settings.methods))
        results = BENCHMARKS / "results"
        path = results / f"window_extension_{name}.png"
        plot(runs[name], settings.methods, path)
        if runs[name].keys() & {*settings.ablation} - {*settings.methods}:
            table = make_table(runs[name], settings.ablation)
            text = fill(text, f"{name}_ablation", table)
        spectra = read_spectra(name)
        if spectra:
            text = fill(text, f"{name}_spectra", make_spectra_table(spectra))
            path = results / f"window_extension_{name}_spectra.png"
            plot_low_frequency(spectra, path)
    REPORT.write_text(text)


if __name__ == "__main__":
    main()
