"""Style of all pictures. Not imported by `keras_laid`: matplotlib is slow."""

import itertools
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
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
    """A style for each name: its style in `STYLES`, or the next colour."""
    others = [name for name in names if name not in STYLES]
    colors = itertools.cycle(OTHER_COLORS)
    own = {
        name: dict(color=color)
        for name, color in zip(others, colors, strict=False)
    }
    return STYLES | own


def check_some(name: str, values: object) -> None:
    """Refuses a picture with nothing to draw."""
    if not isinstance(values, dict) or not values:
        raise ValueError(
            f"`{name}` must be a dictionary with one or more entries. "
            f"Received: {name}={values!r:.80}"
        )


def label_of(name: str) -> str:
    return LABELS.get(name, name)


def finish(figure: Figure, path: PathLike) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
