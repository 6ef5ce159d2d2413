"""A picture of attention by distance. Nothing is computed here."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from keras_laid.plotting import check_some
from keras_laid.plotting import finish
from keras_laid.plotting import label_of
from keras_laid.plotting import styles_of
from keras_laid.typing import PathLike


def plot_attention_mass(
    path: PathLike,
    masses: dict[str, np.ndarray],
    edges: Sequence[int],
    image_length: int,
) -> None:
    """Attention of the question by distance.

    Args:
        path: File to write.
        masses: Dictionary from names of models to results of
            `keras_laid.spectral.attention_mass`.
        edges: Sequence of integers, the edges of the ranges, in tokens, as
            passed to `attention_mass`.
        image_length: Integer, the number of tokens of an image.
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
