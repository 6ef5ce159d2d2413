"""The study's tables, from its rows."""

import collections
import itertools

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
STEPS_SIZES = (20, 50, 100)
REACHED = 0.9  # How fast methods learn: steps until this accuracy.
UNTOUCHED = "untouched"


def read_runs():
    """Final accuracies of the test split, by config, method and seed."""
    runs = collections.defaultdict(lambda: collections.defaultdict(dict))
    by_steps = read_steps()
    last = {config: steps for config, _, steps in by_steps}
    for (config, method, steps), by_seed in by_steps.items():
        if steps == last[config]:
            runs[config][method] = by_seed
    return runs


def read_steps():
    """Accuracies of the test split by config, method and steps, then seed.

    Fewer steps come first.
    """
    found = collections.defaultdict(dict)
    for row in sorted(rows.read_rows(ROWS), key=lambda row: int(row["steps"])):
        if row["split"] == "test":
            key = row["config"], row["method"], int(row["steps"])
            accuracy = {
                size: float(row[f"accuracy_{size}"])
                for size in SIZES
                if row[f"accuracy_{size}"]
            }
            found[key][int(row["seed"])] = accuracy
    return found


def read_spectra():
    """Rows of `spectra.py` by config and method, in the order they came."""
    spectra = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows.read_rows(SPECTRA):
        spectra[row["config"]][row["method"]].append(row)
    return spectra


def interval(values):
    """Mean and half the width of its 95% interval, by Student's t."""
    values = np.asarray(values)
    if len(values) < 2:
        return values.mean(), np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * error


def cell(values):
    mean, half = interval(values)
    # One seed has no interval.
    return f"{mean:.3f}" if np.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def geometric(values):
    """Geometric mean and its 95% interval."""
    mean, half = interval(np.log(values))
    if np.isnan(half):
        return f"{np.exp(mean):.1f}"
    low, high = np.exp(mean - half), np.exp(mean + half)
    return f"{np.exp(mean):.1f} ({low:.1f} to {high:.1f})"


def ratio_of_windows(runs, untouched):
    """Ratio of a window to the untouched student's, over common seeds."""
    return geometric(
        [
            window(runs[seed]) / window(untouched[seed])
            for seed in runs.keys() & untouched.keys()
        ]
    )


def window(accuracy):
    return keras_laid.effective_window(accuracy).window


def make_table(by_method, methods):
    """Accuracy by size, its mean over short haystacks, and windows."""
    lines = []
    for method in methods:
        runs = by_method.get(method)
        if not runs:
            continue
        short = [np.mean([run[s] for s in SHORT]) for run in runs.values()]
        cells = [cell([run[s] for run in runs.values()]) for s in SIZES]
        windows = geometric([window(run) for run in runs.values()])
        ratio = ratio_of_windows(runs, by_method[UNTOUCHED])
        lines.append([method, len(runs), *cells, cell(short), windows, ratio])
    header = ["method", "seeds", *SIZES, "1 to 5", "window", "window ratio"]
    return markdown_table(header, lines)


def accuracy_over_steps(settings):
    """Accuracies by method, steps and seed, of methods with all steps."""
    steps = [*settings.measured_at, settings.steps]
    by_steps = read_steps()
    keys = {
        method: [(settings.name, method, number) for number in steps]
        for method in settings.methods
    }
    return {
        method: {key[-1]: by_steps[key] for key in needed}
        for method, needed in keys.items()
        if by_steps.keys() >= {*needed}
    }


def make_steps_table(settings):
    """Accuracy at some sizes after each number of steps that was measured."""
    over_steps = accuracy_over_steps(settings)
    lines = []
    for size, method in itertools.product(
        sizes_over_steps(settings), over_steps
    ):
        cells = [
            cell([run[size] for run in by_seed.values()])
            for by_seed in over_steps[method].values()
        ]
        reached = steps_until(over_steps[method], size)
        lines.append([size, method, *cells, reached])
    header = ["images", "method", *settings.measured_at, settings.steps]
    return markdown_table([*header, f"steps to {REACHED}"], lines)


def sizes_over_steps(settings):
    """The haystack sizes for which accuracy over steps is shown."""
    return settings.measured_sizes or STEPS_SIZES


def steps_until(by_steps, size):
    """The first measured number of steps at which a seed reaches `REACHED`."""
    seeds = set.intersection(*({*runs} for runs in by_steps.values()))
    first = [
        min(
            (n for n, runs in by_steps.items() if runs[seed][size] >= REACHED),
            default=None,
        )
        for seed in sorted(seeds)
    ]
    found = [steps for steps in first if steps is not None]
    if not found:
        return "never"
    ends = sorted({min(found), max(found)})
    text = " to ".join(f"{steps:,}" for steps in ends)
    if len(found) < len(first):
        text += f" ({len(found)} of {len(first)} seeds)"
    return text


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


def single_image_summary():
    """What a student of single images learns from each method."""
    names = {
        "untouched": "untouched",
        "all_labels": "labels",
        "logits": "the teacher's logits",
        "last_layer": "logits, whole maps of the last layer",
        "hidden_states": "logits, hidden states of every layer",
        "wrong_heads": "logits, retrieval of heads drawn at random",
        "blind_heads": "logits, retrieval of heads that hardly see the needle",
        "retrieval": "LAid: logits, retrieval of the retrieval heads",
    }
    return methods_table("single_image", names, (1, 5, 10, 20))


def drawn_heads():
    """The needle attention of the teacher's heads that each run matched."""
    attention = collections.defaultdict(list)
    for row in rows.read("retrieval_heads"):
        head = f"{row['layer']}.{row['head']}"
        attention[head].append(float(row["needle"]))
    found = []
    for method in ("retrieval", "wrong_heads", "blind_heads"):
        runs = rows.read(
            "window_extension", config="single_image", method=method
        )
        for row in runs:
            if row["accuracy_20"] and row["retrieval_heads"]:
                heads = row["retrieval_heads"].split()
                means = [np.mean(attention[head]) for head in heads]
                found.append((means, sorted(heads), row))
    lines = [
        [
            row["method"],
            row["seed"],
            ", ".join(heads),
            f"{np.mean(means):.2f}",
            f"{max(means):.2f}",
            *(f"{float(row[f'accuracy_{size}']):.3f}" for size in (5, 10, 20)),
        ]
        for means, heads, row in sorted(found, key=lambda each: -max(each[0]))
    ]
    header = ["method", "seed", "layer.head", "mean", "largest", 5, 10, 20]
    return markdown_table(header, lines)


def methods_table(config, names, sizes):
    """Accuracy at some sizes and the window, of methods that have rows."""
    by_method = read_runs()[config]
    lines = []
    for name, label in names.items():
        if name not in by_method:
            continue
        runs = by_method[name]
        cells = [cell([run[size] for run in runs.values()]) for size in sizes]
        window = ratio_of_windows(runs, by_method[UNTOUCHED])
        lines.append([label, len(runs), *cells, window])
    return markdown_table(["method", "seeds", *sizes, "window"], lines)


def make_tables():
    """Every table of the study that has rows, by the name of its marks."""
    tables = {}
    for name, by_method in read_runs().items():
        settings = read_settings(name)
        tables[name] = make_table(by_method, settings.methods)
        if by_method.keys() & {*settings.ablation} - {*settings.methods}:
            ablation = make_table(by_method, settings.ablation)
            tables[f"{name}_ablation"] = ablation
        if settings.measured_at:
            tables[f"{name}_steps"] = make_steps_table(settings)
    for name, by_method in read_spectra().items():
        tables[f"{name}_spectra"] = make_spectra_table(by_method)
    tables["single_image_summary"] = single_image_summary()
    tables["drawn_heads"] = drawn_heads()
    return tables
