"""A picture of training."""

from collections.abc import Mapping
from collections.abc import Sequence

import matplotlib.pyplot as plt

from keras_laid.plotting import finish
from keras_laid.typing import PathLike

NO_TERMS = ("kl", "learning_rate", "progress")


def plot_terms(
    path: PathLike, history: Mapping[str, Sequence[float]], steps_per_epoch: int
) -> None:
    """Plots loss terms over training steps, each in a panel of its own.

    Args:
        path: Path of the picture to write.
        history: Dictionary, the `keras.callbacks.History.history` of a
            distiller.
        steps_per_epoch: Integer, the number of training steps in an epoch.
    """
    if "loss" not in history:
        raise ValueError(
            "`history` must be that of a distiller, with its loss. "
            f"Received: {list(history)!r:.80}"
        )
    terms = [
        name
        for name in history
        if name not in ("loss", *NO_TERMS) and not name.startswith("val_")
    ]
    names = ["loss", *sorted(terms)]
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
