"""All that keras_laid knows of KerasHub's models."""

from keras_laid.backbones.families import AttentionLayer
from keras_laid.backbones.families import attention_layers

__all__ = ["AttentionLayer", "attention_layers"]
