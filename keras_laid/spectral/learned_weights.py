"""Weights that distillation learned besides the student: mixtures, gains."""

from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import ops

from keras_laid.backbones.gain_modulation import gains_by_index

if TYPE_CHECKING:
    from keras_laid.distillation.distiller import (
        DistanceWeightedAttentionDistillation,
    )


def head_mixtures(
    distiller: "DistanceWeightedAttentionDistillation",
) -> dict[tuple[int, int], np.ndarray]:
    """The weights of the teacher's heads in each student head.

    Args:
        distiller: A `keras_laid.DistanceWeightedAttentionDistillation`.

    Returns:
        A dictionary from pairs of indices `(student_layer, teacher_layer)` to
        float arrays of shape `(student_heads, teacher_heads)`, whose rows sum
        to 1. Empty if no term of the distiller mixes heads.
    """
    if not distiller.mixers:
        return {}
    return {
        pair: ops.convert_to_numpy(mixer.mixture())
        for pair, mixer in zip(
            distiller.layer_pairs, distiller.mixers, strict=True
        )
    }


def rotary_gains(model: keras.Model) -> dict[int, np.ndarray]:
    """The gains on a model's rotary frequencies.

    Args:
        model: A model that `keras_laid.attach_gain_modulation` was called on.

    Returns:
        A dictionary from the index of a decoder layer, from 0, to a float array
        of shape `(frequencies,)`, or `(heads, frequencies)` with gains of each
        head, highest frequency first. Empty once the gains are folded.
    """
    return {
        index: ops.convert_to_numpy(layer.gains())
        for index, layer in gains_by_index(model).items()
    }
