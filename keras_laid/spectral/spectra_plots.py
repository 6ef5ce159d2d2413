"""Pictures of spectra, heads, mixtures and gains. Nothing is computed here.

Values with an interval are results of `mean_with_interval`.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from keras_laid.plotting import check_some
from keras_laid.plotting import finish
from keras_laid.plotting import label_of
from keras_laid.plotting import styles_of
from keras_laid.spectral.intervals import Interval
from keras_laid.typing import PathLike

FREQUENCY_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
HEAD_COLORS = {"global": "tab:blue", "local": "tab:orange"}


def plot_spectra(
    path: PathLike,
    frequency: np.ndarray,
    powers: dict[str, Interval],
    per: Literal["token", "image"] = "token",
    cutoff: float | None = None,
) -> None:
    """Energy of attention by frequency, on logarithmic axes.

    Args:
        path: File to write.
        frequency: Array of shape `(frequencies,)`, from `power_spectrum`.
        powers: Dictionary from names of models to an `Interval` of arrays of
            shape `(frequencies,)`.
        per: `"token"` or `"image"`, the unit of distance. Defaults to
            `"token"`.
        cutoff: Optional float, in cycles per unit of distance; frequencies up
            to it are shaded as low. Defaults to `None`, no shading.
    """
    check_some("powers", powers)
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for name, style in _named_styles(powers):
        _draw_with_interval(axes, frequency[1:], powers[name], 1, name, style)
    axes.set(
        xlabel=f"cycles per {per}",
        ylabel="energy of attention",
        xscale="log",
        yscale="log",
        xlim=(frequency[1], 0.5),
    )
    ticks = [t for t in FREQUENCY_TICKS if frequency[1] <= t]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    if cutoff is not None:
        axes.axvspan(frequency[1], cutoff, color="0.95", zorder=0)
        axes.set_title(
            "shaded: low frequencies", color="0.45", fontsize=9, loc="left"
        )
    _outside_legend(axes)
    finish(figure, path)


def plot_intervals(
    path: PathLike,
    values: dict[str, Interval],
    ylabel: str,
    reference: tuple[float, str] | None = None,
) -> None:
    """One number for each model, with its interval.

    Args:
        path: File to write.
        values: Dictionary from names of models to an `Interval` of scalars.
        ylabel: String, what the number is.
        reference: Optional pair of a number, drawn as a line, and a string that
            says what it stands for. Defaults to `None`, no line.
    """
    check_some("values", values)
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for index, (name, style) in enumerate(_named_styles(values)):
        mean, low, high = values[name]
        axes.errorbar(
            [index],
            [mean],
            yerr=[[mean - low], [high - mean]],
            marker="o",
            capsize=4,
            color=style["color"],
        )
    if reference is not None:
        level, meaning = reference
        axes.axhline(level, color="0.8", linewidth=1, zorder=0)
        axes.set_title(f"line: {meaning}", color="0.45", fontsize=9, loc="left")
    axes.set_xticks(range(len(values)), [label_of(name) for name in values])
    axes.set(ylabel=ylabel, xlim=(-0.6, len(values) - 0.4), ylim=(0, None))
    finish(figure, path)


def plot_frequency_shares(
    path: PathLike,
    wavelengths: np.ndarray,
    shares: dict[str, Interval],
    window: int | None = None,
) -> None:
    """Each rotary frequency's share of the logits, over its wavelength.

    Args:
        path: File to write.
        wavelengths: Array of shape `(frequencies,)`, from `rotary_wavelengths`.
        shares: Dictionary from names of models to an `Interval` of arrays of
            shape `(frequencies,)`.
        window: Optional integer, the window in tokens. Longer wavelengths,
            which do not complete a turn within it, are shaded. Defaults to
            `None`, no shading.
    """
    check_some("shares", shares)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.axhline(0, color="0.8", linewidth=1)
    for name, style in _named_styles(shares):
        style = dict(style, marker="o", markersize=4)
        _draw_with_interval(axes, wavelengths, shares[name], 0, name, style)
    if window is not None:
        axes.axvspan(window, wavelengths[-1] * 1.3, color="0.95", zorder=0)
        axes.set_title(
            f"shaded: longer than the window, {window:,} tokens",
            color="0.45",
            fontsize=9,
            loc="left",
        )
    axes.set(
        xlabel="wavelength of the rotary frequency, in tokens",
        ylabel="share of the logits' variance",
        xscale="log",
        xlim=(wavelengths[0] / 1.3, wavelengths[-1] * 1.3),
    )
    _outside_legend(axes)
    finish(figure, path)


def plot_band_agreement(
    path: PathLike,
    bands: Sequence[float],
    agreements: dict[str, Interval],
    per: Literal["token", "image"] = "token",
) -> None:
    """Agreement of students with the teacher, band by band.

    Args:
        path: File to write.
        bands: Increasing sequence of frequencies, the edges of the bands, as
            passed to `band_agreement`.
        agreements: Dictionary from names of students to an `Interval` of arrays
            of shape `(len(bands) - 1,)`.
        per: `"token"` or `"image"`, the unit of distance. Defaults to
            `"token"`.
    """
    check_some("agreements", agreements)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    centers = list(range(len(bands) - 1))
    axes.axhline(0, color="0.8", linewidth=1)
    for index, (name, style) in enumerate(_named_styles(agreements)):
        mean, low, high = agreements[name]
        shift = 0.12 * (index - (len(agreements) - 1) / 2)
        axes.errorbar(
            [center + shift for center in centers],
            mean,
            yerr=[mean - low, high - mean],
            marker="o",
            linestyle="none",
            capsize=3,
            color=style["color"],
            label=label_of(name),
        )
    axes.set_xticks(
        centers,
        [
            f"{low:.3g} to {high:.3g}"
            for low, high in zip(bands, bands[1:], strict=False)
        ],
    )
    axes.set(
        xlabel=f"band, in cycles per {per}",
        ylabel="agreement with the teacher",
        ylim=(min(-0.05, *(min(a.low) for a in agreements.values())), 1.03),
    )
    _outside_legend(axes)
    finish(figure, path)


def plot_head_activations(
    path: PathLike,
    activations: dict[str, dict[int, np.ndarray]],
    kinds: Mapping[str, np.ndarray],
) -> None:
    """Figure 4 of the paper: activation of each head over haystack size.

    Args:
        path: File to write.
        activations: Dictionary from names of models to dictionaries from size,
            in images, to arrays of shape `(layers, heads)`, means over
            examples.
        kinds: Dictionary from names of models to results of `classify_heads`.
    """
    check_some("activations", activations)
    figure, panels = plt.subplots(
        1,
        len(activations),
        figsize=(3.4 * len(activations) + 1.2, 3.2),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, by_size) in zip(
        panels[0], activations.items(), strict=True
    ):
        sizes = sorted(by_size)
        for head, kind in enumerate(kinds[name].ravel()):
            values = [by_size[size].ravel()[head] for size in sizes]
            axes.plot(
                sizes,
                values,
                marker="o",
                markersize=3,
                color=HEAD_COLORS[kind],
                alpha=0.8,
            )
        axes.set_xscale("log")
        axes.set_xticks(
            sizes, [str(size) for size in sizes], fontsize=8, rotation=45
        )
        axes.minorticks_off()
        axes.set(title=label_of(name), xlabel="images", ylim=(0, None))
    panels[0, 0].set_ylabel("key activation")
    lines = [
        Line2D([], [], color=color, label=kind)
        for kind, color in HEAD_COLORS.items()
    ]
    figure.legend(handles=lines, frameon=False, loc="outside right upper")
    finish(figure, path)


def plot_head_mixtures(
    path: PathLike, mixtures: dict[tuple[int, int], np.ndarray]
) -> None:
    """Weights of the teacher's heads in each student head.

    There is one panel for each pair of layers.

    Args:
        path: File to write.
        mixtures: Dictionary from pairs `(student_layer, teacher_layer)` to
            arrays of shape `(student_heads, teacher_heads)`, from
            `head_mixtures`.
    """
    check_some("mixtures", mixtures)
    figure, panels = plt.subplots(
        1,
        len(mixtures),
        figsize=(2.8 * len(mixtures) + 1, 2.2),
        layout="constrained",
        squeeze=False,
    )
    for axes, ((student, teacher), mixture) in zip(
        panels[0], mixtures.items(), strict=True
    ):
        image = axes.imshow(mixture, vmin=0, vmax=1, cmap="Blues")
        for (row, column), weight in _cells(mixture):
            axes.text(
                column,
                row,
                f"{weight:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if weight > 0.5 else "0.2",
            )
        axes.set_yticks(range(mixture.shape[0]))
        axes.set_xticks(range(mixture.shape[1]))
        axes.set(
            xlabel=f"teacher head, layer {teacher}",
            ylabel=f"student head, layer {student}",
        )
    figure.colorbar(image, ax=panels[0].tolist(), label="weight", shrink=0.7)
    finish(figure, path)


def plot_gains(
    path: PathLike, wavelengths: np.ndarray, gains: dict[int, np.ndarray]
) -> None:
    """Learned gains over the wavelength of their frequency.

    Args:
        path: File to write.
        wavelengths: Array of shape `(frequencies,)`, from `rotary_wavelengths`.
        gains: Dictionary from indices of layers to arrays of shape
            `(frequencies,)` or `(heads, frequencies)`, from `rotary_gains`.
    """
    check_some("gains", gains)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.axhline(1, color="0.8", linewidth=1)
    colors = plt.get_cmap("viridis")
    extremes = [value for each in gains.values() for value in each.flat]
    for position, (layer, layer_gains) in enumerate(gains.items()):
        color = colors(position / max(1, len(gains) - 1) * 0.9)
        heads = layer_gains.reshape(-1, layer_gains.shape[-1])
        for head, values in enumerate(heads):
            axes.plot(
                wavelengths,
                values,
                marker="o",
                markersize=3,
                color=color,
                label=f"layer {layer}" if head == 0 else None,
            )
    axes.set(
        xlabel="wavelength of the rotary frequency, in tokens",
        ylabel="gain on the logits",
        xscale="log",
        ylim=(min(0.9, *extremes) * 0.97, max(1.1, *extremes) * 1.03),
    )
    _outside_legend(axes)
    finish(figure, path)


def _named_styles(by_name: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    styles = styles_of(by_name)
    return [(name, styles[name]) for name in by_name]


def _draw_with_interval(
    axes: Axes,
    x: np.ndarray,
    interval: Interval,
    start: int,
    name: str,
    style: dict[str, Any],
) -> None:
    """A line with its interval as a band, from index `start`."""
    mean, low, high = (values[start:] for values in interval)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
    axes.plot(x, mean, label=label_of(name), **style)


def _outside_legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _cells(matrix: np.ndarray) -> list[tuple[tuple[int, int], float]]:
    return [
        ((row, column), matrix[row, column])
        for row in range(matrix.shape[0])
        for column in range(matrix.shape[1])
    ]
