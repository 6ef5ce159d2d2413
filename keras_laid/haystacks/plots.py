"""Pictures of what an evaluation found."""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from keras_laid.typing import PathLike

CHANCE = 0.5
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")


class Results(Protocol):
    """What is drawn of a `keras_laid.haystacks.HaystackResults`."""

    @property
    def questions(self) -> Mapping[int, int]: ...

    @property
    def accuracy(self) -> Mapping[int, float]: ...

    def intervals(
        self, confidence: float = ...
    ) -> Mapping[int, tuple[float, float]]: ...

    def by_position(self, bins: int = ...) -> Mapping[int, Any]: ...


def plot_accuracy(
    path: PathLike,
    results: Mapping[str, Results],
    confidence: float = 0.95,
) -> None:
    """Accuracy over size, with bootstrap intervals.

    Args:
        path: File to write.
        results: Dictionary from a label to a `HaystackResults`, one or more. A
            single one needs no label and may have `""`.
        confidence: Float in `(0, 1)`, of the intervals. Defaults to `0.95`.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    sizes = sorted({size for r in results.values() for size in r.questions})
    for (label, result), color in zip(
        results.items(), np.resize(COLORS, len(results)), strict=True
    ):
        accuracy = result.accuracy
        intervals = result.intervals(confidence)
        low, high = zip(*(intervals[size] for size in accuracy), strict=True)
        axes.fill_between(list(accuracy), low, high, color=color, alpha=0.2)
        axes.plot(
            list(accuracy),
            list(accuracy.values()),
            color=color,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.axhline(CHANCE, color="0.8", linewidth=1, zorder=0)
    axes.annotate(
        "chance",
        (1, CHANCE),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.5",
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    lowest = min(low for r in results.values() for low, _ in _ends(r))
    axes.set(
        ylim=(max(-0.03, min(lowest, CHANCE) - 0.08), 1.03),
        xlabel="images in the haystack",
        ylabel=f"accuracy, {confidence:.0%} interval",
    )
    if any(results):
        axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    _finish(figure, path)


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
            dark = abs(part.accuracy - CHANCE) > 0.38
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
    axes.set_xticks([0, 0.5, 1], ["first image", "middle", "last image"])
    axes.set(
        xlim=(0, 1),
        ylim=(len(ranges) - 0.5, -0.5),
        xlabel="position of the needle",
        ylabel="images in the haystack",
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, ticks=[0, CHANCE, 1])
    bar.ax.set_yticklabels(["0", "chance", "1"])
    bar.set_label("accuracy")
    bar.outline.set_visible(False)
    _finish(figure, path)


def _ends(result: Results) -> Iterable[tuple[float, float]]:
    return result.intervals().values()


def _finish(figure: Figure, path: PathLike) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
