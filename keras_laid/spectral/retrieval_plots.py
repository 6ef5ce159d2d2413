"""Pictures of retrieval heads. Nothing is computed here."""

import textwrap
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_kind
from keras_laid.backbones.retrieval_heads import RetrievalHeads
from keras_laid.plotting import check_some
from keras_laid.plotting import finish
from keras_laid.plotting import label_of
from keras_laid.typing import PathLike

# Labels of the colour scale.
VALUES = {
    "needle": "attention to the needle, less\nthe mean of other segments",
    "score": "score",
    "mass": "attention to segments",
    "sharpness": "sharpness",
    "selectivity": "selectivity",
}
OUTLINE = "tab:red"
MANY_LAYERS = 12  # More are drawn in smaller cells.
# In inches: cells have the same size in every panel, whatever the models.
LEFT, RIGHT, TOP, BOTTOM, BETWEEN = 0.55, 1.1, 0.5, 0.75, 0.45
TITLE, BAR = 1.2, (0.12, 2.2)  # Least width of a title; a bar's size.


def plot_retrieval_heads(
    path: PathLike,
    found: dict[str, RetrievalHeads],
    rows: Literal["text", "image"] = "text",
    value: Literal[
        "needle", "score", "mass", "sharpness", "selectivity"
    ] = "needle",
) -> None:
    """How much each head retrieves, with one panel for each model.

    Chosen heads are outlined. All panels share one colour scale, from 0 to 1.
    Layers without full attention and unknown values stay grey.

    Args:
        path: File to write.
        found: Dictionary from names of models to results of
            `keras_laid.find_retrieval_heads`.
        rows: `"text"` or `"image"`, the kind of rows whose statistics are
            drawn. Defaults to `"text"`.
        value: The number to draw: an attribute of `HeadStatistics`, or
            `"score"`, by which the heads were chosen. Defaults to `"needle"`.

    Raises:
        TypeError: If a value of `found` is not a result of
            `find_retrieval_heads`, such as `None`.
        ValueError: If `found` is empty, if `value` is unknown, or if a model
            has no such number for these rows, such as `"needle"` where no
            needle was known.
    """
    check_some("found", found)
    check_choice("value", value, VALUES)
    tables = {
        name: _table_of(name, heads, rows, value)
        for name, heads in found.items()
    }
    rows_drawn = max(len(table) for table in tables.values())
    cell, font_size = (0.42, 0.32), 8.0
    if rows_drawn > MANY_LAYERS:
        cell, font_size = (0.34, 0.19), 6.5
    widths = [cell[0] * table.shape[1] for table in tables.values()]
    pitches = [max(width, TITLE) + BETWEEN for width in widths]
    size = np.array(
        [
            LEFT + sum(pitches) + RIGHT,
            TOP + cell[1] * rows_drawn + BOTTOM,
        ]
    )
    figure = plt.figure(figsize=tuple(size))

    def add_axes(left: float, width: float, height: float) -> Axes:
        """Adds axes below the titles; lengths are in inches."""
        corner = np.array([left, size[1] - TOP - height]) / size
        return figure.add_axes((*corner, *([width, height] / size)))

    left = LEFT
    for (name, table), width, pitch in zip(
        tables.items(), widths, pitches, strict=True
    ):
        axes = add_axes(left, width, cell[1] * len(table))
        image = _draw_table(axes, table, font_size)
        for layer, head in found[name].heads:
            _outline(axes, layer, head)
        characters = round(pitch / 0.085)
        axes.set_title(
            textwrap.fill(label_of(name), characters), fontsize=9, loc="left"
        )
        left += pitch
    figure.axes[0].set_ylabel("layer", fontsize=8)
    height = min(BAR[1], cell[1] * rows_drawn)
    bar = figure.colorbar(
        image, cax=add_axes(left, BAR[0], height), ticks=[0, 0.5, 1]
    )
    bar.set_label(VALUES[value], fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    figure.text(
        LEFT / size[0],
        0.15 / size[1],
        "outlined: chosen",
        fontsize=8,
        color=OUTLINE,
    )
    finish(figure, path)


def _table_of(
    name: str, found: RetrievalHeads, rows: str, value: str
) -> np.ndarray:
    """The numbers to draw, of shape `(layers, heads)`; not all are NaN."""
    words = "what `keras_laid.find_retrieval_heads` returned"
    check_kind(
        f"found[{name!r}]", found, RetrievalHeads, words, "Leave it out."
    )
    check_choice("rows", rows, found.by_rows)
    table = found.score
    if value != "score":
        table = getattr(found.by_rows[rows], value)
    if not np.isfinite(table).any():
        raise ValueError(
            f"`found[{name!r}]` must have some numbers to draw. Received: "
            f"value={value!r}, which is NaN for all heads. Pass another "
            "value, such as `value='score'`."
        )
    return table


def _draw_table(axes: Axes, table: np.ndarray, font_size: float) -> AxesImage:
    """Draws a cell for each layer and head, with its number."""
    image = axes.imshow(
        np.ma.masked_invalid(table),
        vmin=0,
        vmax=1,
        cmap="Blues",
        aspect="auto",
    )
    for (layer, head), number in np.ndenumerate(table):
        if np.isfinite(number):
            axes.text(
                head,
                layer,
                f"{number:.2f}".replace("0.", ".").replace("-.00", ".00"),
                ha="center",
                va="center",
                fontsize=font_size,
                color="white" if number > 0.5 else "0.3",
            )
    axes.set_facecolor("0.92")
    axes.set_xticks(range(table.shape[1]))
    axes.set_yticks(range(table.shape[0]))
    axes.tick_params(length=0, labelsize=font_size)
    axes.set_xlabel("head", fontsize=8)
    axes.spines[:].set_visible(False)
    return image


def _outline(axes: Axes, layer: int, head: int) -> None:
    corner = (head - 0.46, layer - 0.46)
    axes.add_patch(
        Rectangle(
            corner, 0.92, 0.92, fill=False, edgecolor=OUTLINE, linewidth=1.6
        )
    )
