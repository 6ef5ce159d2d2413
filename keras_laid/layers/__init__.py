"""Layers that can be used in any Keras model."""

from keras_laid.layers.gain_modulated_rotary_embedding import (
    GainModulatedRotaryEmbedding,
)
from keras_laid.layers.head_mixer import HeadMixer

__all__ = ["GainModulatedRotaryEmbedding", "HeadMixer"]
