"""Prompts with several images, in the form that each family expects."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_hub.models import CausalLM
from keras_hub.models import Gemma3CausalLM
from keras_hub.models import Gemma4CausalLM
from keras_hub.models import PaliGemmaCausalLM

from keras_laid.backbones.decoder import check_values
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.model_prompts import ModelPrompts
from keras_laid.backbones.multi_image_pali_gemma import (
    MultiImagePaliGemmaCausalLM,
)
from keras_laid.backbones.prompt_forms import LENGTH_STEP
from keras_laid.backbones.prompt_forms import Gemma3Form
from keras_laid.backbones.prompt_forms import Gemma4Form
from keras_laid.backbones.prompt_forms import PlaceholderForm
from keras_laid.backbones.prompt_forms import PromptForm
from keras_laid.typing import Tensor

TEXT_LENGTH = 32  # About how many tokens a question takes.


class PaliGemmaPrompts:
    """All images stand before the text; their tokens are not part of it."""

    causal_lm_class = PaliGemmaCausalLM
    placeholder = ""
    resizes = False

    def __init__(self, model: PaliGemmaCausalLM) -> None:
        self.causal_lm = MultiImagePaliGemmaCausalLM.from_causal_lm(model)
        self.image_length = model.backbone.image_sequence_length
        self.hidden_states = self.causal_lm.hidden_states
        self.image_size = as_pair(model.backbone.image_size)

    def first_length(self, images: int) -> int:
        """A first guess at the length of a prompt with `images` images."""
        return LENGTH_STEP

    def set_images(self, images: int) -> None:
        """Prepares for prompts with `images` images each."""


class PlaceholderPrompts:
    """A placeholder in the text stands for each image."""

    causal_lm_class: type
    form: type[PlaceholderForm]
    resizes = False  # Whether the image converter takes images of any size.

    def __init__(self, model: CausalLM) -> None:
        form = self.form(model.preprocessor)
        self.placeholder = form.placeholder
        self.image_length = form.image_length
        # A copy of the user's preprocessor: the numbers of images and tokens
        # are set for each batch, and the user's own must not change.
        self.causal_lm = self.causal_lm_class(
            backbone=model.backbone, preprocessor=form.with_images(1)
        )
        self.hidden_states = model.backbone
        self.image_size = self.size_of(model, form)

    def size_of(self, model: CausalLM, form: PromptForm) -> tuple[int, int]:
        """Height and width that images need, in pixels."""
        return as_pair(model.backbone.image_size)

    def first_length(self, images: int) -> int:
        length = images * self.image_length + 2 * LENGTH_STEP
        return -(-length // LENGTH_STEP) * LENGTH_STEP

    def set_images(self, images: int) -> None:
        self.causal_lm.preprocessor.max_images_per_prompt = images


class Gemma3Prompts(PlaceholderPrompts):
    causal_lm_class = Gemma3CausalLM
    form = Gemma3Form


class Gemma4Prompts(PlaceholderPrompts):
    causal_lm_class = Gemma4CausalLM
    form = Gemma4Form
    resizes = True

    def size_of(self, model: CausalLM, form: PromptForm) -> tuple[int, int]:
        return form.image_size


FAMILIES = (PaliGemmaPrompts, Gemma3Prompts, Gemma4Prompts)


class ImagePrompts(ModelPrompts):
    """Asks a KerasHub model about several images at once.

    It shares the layers and weights of the model, and leaves it as it is.

    Args:
        model: A `keras_hub.models.CausalLM` of one of the families above, with
            its preprocessor.

    Attributes:
        image_length: Integer, tokens of an image.
        image_size: Tuple of integers, height and width of images in pixels.

    Raises:
        ValueError: If the family is unknown, or the model has no preprocessor
            for images.
    """

    def __init__(self, model: keras.Model) -> None:
        family = next(
            (f for f in FAMILIES if isinstance(model, f.causal_lm_class)), None
        )
        if family is None:
            names = [f.causal_lm_class.__name__ for f in FAMILIES]
            raise ValueError(
                "The model must be of a family whose prompts can hold several "
                f"images, one of {names} of KerasHub. "
                f"Received: {type(model).__name__}. For any other model, pass "
                "a function of images and prompts."
            )
        if model.preprocessor is None or not model.preprocessor.image_converter:
            raise ValueError(
                "The model must have a preprocessor with an image converter. "
                f"Received: {type(model).__name__} with "
                f"preprocessor={model.preprocessor}. Pass the model of a "
                "preset, or set `model.preprocessor`."
            )
        self._family = family(model)
        causal_lm = self._family.causal_lm
        super().__init__(
            causal_lm, causal_lm.preprocessor, self._family.hidden_states
        )
        # From a number of images to tokens of a prompt.
        self._lengths: dict[int, int] = {}
        self.image_length = self._family.image_length
        self.image_size = self._family.image_size

    def fill(self, template: str, images: int, **texts: str) -> str:
        if "{images}" not in template:
            template = "{images}" + template
        placeholder = self._family.placeholder
        if not placeholder and not template.startswith("{images}"):
            raise ValueError(
                "The images of PaliGemma must stand before all text. Received: "
                f"template={template!r}. Leave out '{{images}}'."
            )
        return template.format(images=placeholder * images, **texts)

    def length(self, images: Sequence[Any], prompt: str) -> int:
        return len(images) * self.image_length + TEXT_LENGTH

    def first_logits(
        self, images: np.ndarray, prompts: Sequence[str]
    ) -> np.ndarray:
        inputs, lengths = self._preprocess(images, prompts)
        return self._first_logits.predict_on_batch(
            {"inputs": inputs, "last": lengths - 1}
        )

    def generate(
        self, images: np.ndarray, prompts: Sequence[str], max_tokens: int
    ) -> list[str]:
        self._preprocess(images, prompts)  # Sets `self._lengths`.
        to_words = self.preprocessor.generate_postprocess

        def to_first_words(outputs: dict[str, Tensor]) -> list[str]:
            # Cut to `max_tokens`: short prompts leave room for longer answers.
            return to_words(
                {name: x[:, :max_tokens] for name, x in outputs.items()}
            )

        with replaced_method(
            self.preprocessor, "generate_postprocess", to_first_words
        ):
            return self.causal_lm.generate(
                {"images": images, "prompts": list(prompts)},
                max_length=self._lengths[images.shape[1]] + max_tokens,
                strip_prompt=True,
            )

    def _preprocess(
        self, images: np.ndarray, prompts: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs of the model, and the length of each prompt in tokens."""
        check_values(self.causal_lm)
        self._check_images(images)
        count = images.shape[1]
        self._family.set_images(count)
        length = self._lengths.get(count, self._family.first_length(count))
        while True:
            inputs = self.preprocessor.generate_preprocess(
                {"images": images, "prompts": list(prompts)},
                sequence_length=length,
            )
            inputs = {
                name: ops.convert_to_numpy(value)
                for name, value in inputs.items()
            }
            lengths = inputs["padding_mask"].sum(axis=1).astype("int32")
            if lengths.max() < length:
                self._lengths[count] = length
                return inputs, lengths
            length += LENGTH_STEP  # A full row may have been cut.

    def _check_images(self, images: np.ndarray) -> None:
        if images.dtype != "uint8" or images.shape[4:] != (3,):
            raise ValueError(
                "Images must be `uint8` arrays of shape `(height, width, 3)`. "
                f"Received: dtype={images.dtype}, shape={images.shape[2:]}. "
                "Pass colours of 0 to 255, not scaled."
            )
        made = self.preprocessor.image_converter.image_size
        if (
            not self._family.resizes
            and (made or images.shape[2:4]) != self.image_size
        ):
            raise ValueError(
                "Images must have the size that the model takes, unless its "
                "preprocessor resizes them. Received: images of shape "
                f"{images.shape[2:]}, image_converter.image_size={made}, for a "
                f"model that takes {self.image_size}. Pass `image_size` to the "
                "source of the images."
            )


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, of one number where they are equal."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
