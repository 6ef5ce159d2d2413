"""A description of a model, which a distiller checks before any run."""

import dataclasses
from typing import Any
from typing import Self

import keras

from keras_laid.backbones import attention_layers
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.attention_layer import DecoderLayer
from keras_laid.backbones.attention_layer import LinearLayer
from keras_laid.backbones.families import with_maps
from keras_laid.backbones.multi_image_pali_gemma import (
    MultiImagePaliGemmaCausalLM,
)


@dataclasses.dataclass(frozen=True)
class Description:
    """A model in numbers and names, which can be written down as JSON.

    Attributes:
        model: String, the name of its class.
        several_images: Boolean, whether a prompt may hold several images by
            `keras_laid.MultiImagePaliGemmaCausalLM`.
        image_layout: Dictionary, the settings that decide how many tokens an
            image becomes.
        vocabulary_size: Integer, the number of tokens that have logits.
        tokens: List of strings, those of the tokenizer; empty without one.
        layers: List of `keras_laid.backbones.AttentionLayer` and `LinearLayer`,
            all layers of the decoder.
        layer_types: List of strings, the class name of each layer's Keras
            attention layer.
        hidden_dim: Integer, the width of the hidden states; `None` for a stored
            teacher, which has no hidden states.
    """

    model: str
    several_images: bool
    image_layout: dict[str, Any]
    vocabulary_size: int
    tokens: list[str]
    layers: list[DecoderLayer]
    layer_types: list[str]
    hidden_dim: int | None = None

    @classmethod
    def from_model(cls, model: keras.Model) -> Self:
        """The description of a `keras_hub.models.CausalLM`."""
        layers = attention_layers(model)
        tokenizer = model.preprocessor and model.preprocessor.tokenizer
        return cls(
            model=type(model).__name__,
            several_images=isinstance(model, MultiImagePaliGemmaCausalLM),
            image_layout={
                name: list(value) if isinstance(value, tuple) else value
                for name, value in decoder.image_layout(model).items()
            },
            vocabulary_size=decoder.backbone_of(model).vocabulary_size,
            tokens=list(tokenizer.get_vocabulary()) if tokenizer else [],
            layers=layers,
            layer_types=[
                type(getattr(layer, "layer", None)).__name__ for layer in layers
            ],
            hidden_dim=decoder.backbone_of(model).hidden_dim,
        )

    @property
    def layers_with_maps(self) -> dict[int, AttentionLayer]:
        """The layers with attention maps, by their index."""
        return with_maps(self.layers)

    def to_json(self) -> dict[str, Any]:
        layers = [
            {
                field.name: getattr(layer, field.name)
                for field in dataclasses.fields(layer)
                if field.repr
            }
            for layer in self.layers
        ]
        values = vars(self) | {"layers": layers}
        values.pop("hidden_dim")
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        layers = [
            LinearLayer(layer["index"])
            if layer["kind"] == "linear"
            else AttentionLayer(**layer)
            for layer in values["layers"]
        ]
        return cls(**values | {"layers": layers})
