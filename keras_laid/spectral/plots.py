"""Pictures of numbers computed elsewhere. Nothing is computed here."""

import itertools
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from keras_laid.typing import PathLike

STYLES: dict[str, dict[str, Any]] = {
    "teacher": dict(color="0.6", linestyle="--"),
    "before": dict(color="tab:orange"),
    "after": dict(color="tab:blue"),
}
OTHER_COLORS = ("tab:green", "tab:purple", "tab:red", "tab:brown", "tab:pink")
LABELS = {
    "before": "student before",
    "after": "student after",
    "logits": "logits alone",
}


def styles_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A style for each name: its own in every picture, or the next colour."""
    others = [name for name in names if name not in STYLES]
    colors = itertools.cycle(OTHER_COLORS)
    own = {
        name: dict(color=color)
        for name, color in zip(others, colors, strict=False)
    }
    return STYLES | own


def check_some(name: str, values: object) -> None:
    """Refuses a picture of nothing."""
    if not isinstance(values, dict) or not values:
        raise ValueError(
            f"`{name}` must be a dictionary of one or more to draw. "
            f"Received: {name}={values!r:.80}"
        )


def label_of(name: str) -> str:
    return LABELS.get(name, name)


def plot_accuracy(
    path: PathLike,
    accuracy: dict[str, dict[int, float]],
    windows: Mapping[str, float] | None = None,
    trained_on: int | None = None,
) -> None:
    """Accuracy over haystack size, on a logarithmic axis.

    Args:
        path: File to write.
        accuracy: Dictionary from names of models to dictionaries from size, in
            images, to accuracy. `"teacher"`, `"before"` and `"after"` have
            styles of their own here and in every other picture.
        windows: Optional dictionary from the same names to effective windows,
            in images, drawn as marks on the axis.
        trained_on: Optional largest size trained on, in images.
    """
    check_some("accuracy", accuracy)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = styles_of([*accuracy, *(windows or {})])
    for name, by_size in accuracy.items():
        sizes = sorted(by_size)
        axes.plot(
            sizes,
            [by_size[size] for size in sizes],
            marker="o",
            markersize=4,
            label=label_of(name),
            **styles[name],
        )
    for name, window in (windows or {}).items():
        axes.axvline(
            window, ymax=0.06, color=styles[name]["color"], linewidth=5
        )
    if trained_on is not None:
        axes.axvspan(0.9, trained_on, color="0.95", zorder=0)
        axes.text(1, 1.012, "sizes trained on", color="0.45", fontsize=9)
    axes.axhline(0.5, color="0.8", linewidth=1)
    sizes = sorted(set().union(*accuracy.values()))
    lowest = min(min(by_size.values()) for by_size in accuracy.values())
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.set(
        xlim=(0.9, max(sizes) * 1.15),
        ylim=(min(lowest, 0.5) - 0.08, 1.04),
        xlabel="images in the haystack",
        ylabel="accuracy (chance 0.5)",
    )
    axes.legend(
        frameon=False,
        loc="center left",
        title="bars: effective window" if windows else None,
        title_fontsize=9,
        alignment="left",
    )
    finish(figure, path)


def plot_terms(
    path: PathLike, history: Mapping[str, Sequence[float]], steps_per_epoch: int
) -> None:
    """Loss terms over training steps, a panel each.

    Args:
        path: File to write.
        history: `keras.callbacks.History.history` of a distiller.
        steps_per_epoch: Integer.
    """
    names = [
        name
        for name in ("loss", "attention", "query_key", "logits", "supervised")
        if name in history
    ]
    if not names:
        raise ValueError(
            "`history` must have a loss or a term of one. "
            f"Received: {list(history)!r:.80}"
        )
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(2.6 * len(names), 2.6),
        layout="constrained",
        squeeze=False,
    )
    for axes, name in zip(panels[0], names, strict=True):
        values = history[name]
        steps = [steps_per_epoch * (epoch + 1) for epoch in range(len(values))]
        axes.plot(steps, values, color="tab:blue", marker="o", markersize=3)
        axes.set(title=name, xlabel="steps", ylim=(0, None))
    finish(figure, path)


def plot_attention_mass(
    path: PathLike,
    masses: dict[str, np.ndarray],
    edges: Sequence[int],
    image_length: int,
) -> None:
    """Attention of the question by distance.

    Args:
        path: File to write.
        masses: Dictionary from names of models to what
            `keras_laid.spectral.attention_mass` returned.
        edges: Edges of the ranges, in tokens.
        image_length: Integer, tokens an image has.
    """
    check_some("masses", masses)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    in_images = [edge / image_length for edge in edges]
    styles = styles_of(masses)
    for name, mass in masses.items():
        axes.stairs(mass, in_images, label=label_of(name), **styles[name])
    axes.set(
        xlabel="distance from the question, in images",
        ylabel="share of attention",
        xlim=(0, in_images[-1]),
        yscale="log",
    )
    axes.legend(frameon=False)
    finish(figure, path)


def finish(figure: Figure, path: PathLike) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
