"""All that keras_laid knows of KerasHub's models."""

from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.attention_layer import LinearLayer
from keras_laid.backbones.families import attention_layers
from keras_laid.backbones.multi_image_pali_gemma import several_images

__all__ = [
    "AttentionLayer",
    "LinearLayer",
    "attention_layers",
    "several_images",
]
