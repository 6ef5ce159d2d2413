"""The study's tables, from its rows."""

import collections

import numpy as np
from scipy import stats

import keras_laid
from benchmarks import rows
from benchmarks.markdown import markdown_table
from benchmarks.window_extension.settings import read_settings

ROWS = rows.RESULTS / "window_extension.csv"
SPECTRA = rows.RESULTS / "window_extension_spectra.csv"
SIZES = (1, 2, 5, 10, 20, 50, 100, 150)
SHORT = (1, 2, 5)
UNTOUCHED = "untouched"


def read_runs():
    """Accuracies of the test split: config, method, then seed."""
    runs = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in rows.read_rows(ROWS):
        if row["split"] == "test":
            accuracy = {s: float(row[f"accuracy_{s}"]) for s in SIZES}
            of_method = runs[row["config"]][row["method"]]
            of_method[int(row["seed"])] = accuracy
    return runs


def read_spectra():
    """Rows of `spectra.py` by config and method, in the order they came."""
    spectra = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows.read_rows(SPECTRA):
        spectra[row["config"]][row["method"]].append(row)
    return spectra


def interval(values):
    """Mean and half of its 95% interval, by Student's t over seeds."""
    values = np.asarray(values)
    if len(values) < 2:
        return values.mean(), np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * error


def cell(values):
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def ratio_of_windows(runs, untouched):
    """Window over the untouched student's: geometric mean and 95% interval."""
    logs = [
        np.log(window(runs[seed]) / window(untouched[seed]))
        for seed in runs.keys() & untouched.keys()
    ]
    mean, half = interval(logs)
    low, high = np.exp(mean - half), np.exp(mean + half)
    return f"{np.exp(mean):.1f} ({low:.1f} to {high:.1f})"


def window(accuracy):
    return keras_laid.effective_window(accuracy).window


def make_table(of_config, methods):
    """Accuracy by size, its mean over short haystacks, and windows."""
    lines = []
    for method in methods:
        runs = of_config.get(method)
        if not runs:
            continue
        short = [np.mean([run[s] for s in SHORT]) for run in runs.values()]
        cells = [cell([run[s] for run in runs.values()]) for s in SIZES]
        ratio = ratio_of_windows(runs, of_config[UNTOUCHED])
        lines.append([method, len(runs), *cells, cell(short), ratio])
    header = ["method", "seeds", *SIZES, "1 to 5", "window ratio"]
    return markdown_table(header, lines)


def make_spectra_table(by_method):
    columns = {
        "low_frequency_share": "low-frequency share",
        "low_frequency_energy": "low-frequency energy, 1e-3",
        "energy": "energy, 1e-3",
        "agreement_low": "agreement, low",
        "agreement_high": "agreement, high",
    }
    lines = []
    for method, found in by_method.items():
        cells = []
        for name in columns:
            unit = 1e-3 if "energy" in name else 1.0
            cells.append(cell([float(row[name]) / unit for row in found]))
        lines.append([method, len(found), *cells])
    return markdown_table(["method", "seeds", *columns.values()], lines)


def make_tables():
    """Every table of the study that has rows, by the name of its marks."""
    tables = {}
    for name, of_config in read_runs().items():
        settings = read_settings(name)
        tables[name] = make_table(of_config, settings.methods)
        if of_config.keys() & {*settings.ablation} - {*settings.methods}:
            ablation = make_table(of_config, settings.ablation)
            tables[f"{name}_ablation"] = ablation
    for name, by_method in read_spectra().items():
        tables[f"{name}_spectra"] = make_spectra_table(by_method)
    return tables
