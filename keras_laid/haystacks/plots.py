"""Pictures of what an evaluation found."""

from collections.abc import Mapping
from typing import Any
from typing import Protocol

import matplotlib.pyplot as plt
import numpy as np

from keras_laid.plotting import check_some
from keras_laid.plotting import finish
from keras_laid.plotting import label_of
from keras_laid.plotting import styles_of
from keras_laid.typing import PathLike


class Results(Protocol):
    """The parts of a `keras_laid.haystacks.HaystackResults` that are drawn."""

    @property
    def chance(self) -> float: ...

    @property
    def unit(self) -> str: ...

    def by_position(self, bins: int = ...) -> Mapping[int, Any]: ...


def plot_accuracy(
    path: PathLike,
    accuracy: dict[str, dict[int, float]],
    windows: Mapping[str, float] | None = None,
    trained_on: int | None = None,
    intervals: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
    chance: float = 0.5,
    unit: str = "images",
) -> None:
    """Accuracy over haystack size, on a logarithmic axis.

    Args:
        path: File to write.
        accuracy: Dictionary from names of models to dictionaries from size, in
            images or tokens, to accuracy, such as `HaystackResults.accuracy`.
            `"teacher"`, `"before"` and `"after"` have styles of their own here
            and in every other picture. A single model needs no name: `""`.
        windows: Optional dictionary from the same names to effective windows,
            drawn as marks on the axis.
        trained_on: Optional largest size trained on.
        intervals: Optional dictionary from the same names to dictionaries from
            size to a pair of ends, such as `HaystackResults.intervals()`.
        chance: Float, the accuracy of guessing, drawn as a line. Defaults to
            `0.5`.
        unit: String, what sizes count, such as `HaystackResults.unit`. Defaults
            to `"images"`.
    """
    check_some("accuracy", accuracy)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = styles_of([*accuracy, *(windows or {})])
    sizes = sorted(set().union(*accuracy.values()))
    lowest = [chance]
    for name, by_size in accuracy.items():
        measured = sorted(by_size)
        axes.plot(
            measured,
            [by_size[size] for size in measured],
            marker="o",
            markersize=4,
            label=label_of(name),
            **styles[name],
        )
        lowest.extend(by_size.values())
    for name, ends in (intervals or {}).items():
        measured = sorted(ends)
        low, high = zip(*(ends[size] for size in measured), strict=True)
        axes.fill_between(
            measured, low, high, color=styles[name]["color"], alpha=0.2
        )
        lowest.extend(low)
    for name, window in (windows or {}).items():
        axes.axvline(
            window, ymax=0.06, color=styles[name]["color"], linewidth=5
        )
    if trained_on is not None:
        axes.axvspan(0.9 * sizes[0], trained_on, color="0.95", zorder=0)
        axes.text(sizes[0], 1.012, "sizes trained on", color="0.45", fontsize=9)
    axes.axhline(chance, color="0.8", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.set(
        xlim=(0.9 * sizes[0], 1.15 * sizes[-1]),
        ylim=(max(-0.03, min(lowest) - 0.08), 1.04),
        xlabel=f"{unit} in the haystack",
        ylabel=f"accuracy (chance {chance:.3g})"
        + (", intervals shaded" if intervals else ""),
    )
    if any(accuracy):
        axes.legend(
            frameon=False,
            loc="best",
            title="bars: effective window" if windows else None,
            title_fontsize=9,
            alignment="left",
        )
    finish(figure, path)


def plot_positions(path: PathLike, results: Results, bins: int = 5) -> None:
    """Accuracy by size and by position of the needle, as a heat map.

    Args:
        path: File to write.
        results: A `HaystackResults`.
        bins: Integer, parts of a haystack; small ones have fewer. Defaults to
            `5`.
    """
    ranges = results.by_position(bins)
    figure, axes = plt.subplots(
        figsize=(7, 1.4 + 0.42 * len(ranges)), layout="constrained"
    )
    for row, parts in enumerate(ranges.values()):
        edges = [0.0, *(part.high for part in parts)]
        values = np.array(
            [[np.nan if p.accuracy is None else p.accuracy for p in parts]]
        )
        mesh = axes.pcolormesh(
            edges,
            [row - 0.5, row + 0.5],
            np.ma.masked_invalid(values),
            cmap="RdYlBu",
            vmin=0.0,
            vmax=1.0,
            edgecolor="white",
            linewidth=1.5,
        )
        for part in parts:
            if part.accuracy is None:
                continue
            # The ends of the colour map are dark.
            dark = abs(part.accuracy - 0.5) > 0.38
            axes.text(
                (part.low + part.high) / 2,
                row,
                f"{part.accuracy:.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
            )
    axes.set_yticks(range(len(ranges)), [str(size) for size in ranges])
    ends = {"images": ("first image", "last image"), "tokens": ("start", "end")}
    first, last = ends[results.unit]
    axes.set_xticks([0, 0.5, 1], [first, "middle", last])
    axes.set(
        xlim=(0, 1),
        ylim=(len(ranges) - 0.5, -0.5),
        xlabel="position of the needle",
        ylabel=f"{results.unit} in the haystack",
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    ticks = {0.0: "0", results.chance: "chance", 1.0: "1"}
    bar = figure.colorbar(mesh, ax=axes, ticks=[*ticks])
    bar.ax.set_yticklabels([*ticks.values()])
    bar.set_label("accuracy")
    bar.outline.set_visible(False)
    finish(figure, path)
