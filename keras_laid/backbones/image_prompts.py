"""Prompts with several images, in the form that each family expects."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_hub.models import CausalLM
from keras_hub.models import Gemma3CausalLM
from keras_hub.models import Gemma4CausalLM
from keras_hub.models import PaliGemmaCausalLM
from keras_hub.models import Qwen3_5CausalLM

from keras_laid.backbones.decoder import check_values
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.model_prompts import ModelPrompts
from keras_laid.backbones.multi_image_pali_gemma import (
    MultiImagePaliGemmaCausalLM,
)
from keras_laid.backbones.prompt_form_base import LENGTH_STEP
from keras_laid.backbones.prompt_form_base import PromptForm
from keras_laid.backbones.prompt_forms import Gemma3Form
from keras_laid.backbones.prompt_forms import Gemma4Form
from keras_laid.backbones.prompt_forms import PlaceholderForm
from keras_laid.backbones.qwen_form import Qwen3_5Form
from keras_laid.backbones.qwen_vision import hidden_states_of
from keras_laid.typing import Tensor

TEXT_LENGTH = 32  # About how many tokens a question takes.


class FamilyPrompts:
    """The prompts of one family, as `ImagePrompts` uses them.

    Attributes:
        causal_lm_class: Class of the family's models in KerasHub.
        placeholder: String that stands for an image in the text; empty where
            images stand before all text.
        resizes: Boolean, whether the image converter takes images of any size.
        generates: Boolean, whether KerasHub's `generate` takes several images.
    """

    causal_lm_class: type
    placeholder = ""
    resizes = False
    generates = True
    causal_lm: CausalLM
    image_length: int

    def tokens_of(self, images: Sequence[Any]) -> int:
        """How many tokens images take."""
        return len(images) * self.image_length

    def first_length(self, images: np.ndarray) -> int:
        """A first guess at the length of prompts with these images."""
        raise NotImplementedError

    def inputs(
        self, images: np.ndarray, prompts: Sequence[str], length: int
    ) -> dict[str, Tensor]:
        """Inputs of the model, cut or padded to `length` tokens of text."""
        return self.causal_lm.preprocessor.generate_preprocess(
            {"images": images, "prompts": list(prompts)},
            sequence_length=length,
        )


class PaliGemmaPrompts(FamilyPrompts):
    """All images stand before the text; their tokens are not part of it."""

    causal_lm_class = PaliGemmaCausalLM

    def __init__(self, model: PaliGemmaCausalLM) -> None:
        self.causal_lm = MultiImagePaliGemmaCausalLM.from_causal_lm(model)
        self.image_length = model.backbone.image_sequence_length
        self.hidden_states = self.causal_lm.hidden_states
        self.image_size = as_pair(model.backbone.image_size)

    def first_length(self, images: np.ndarray) -> int:
        return LENGTH_STEP


class PlaceholderPrompts(FamilyPrompts):
    """A placeholder in the text stands for each image."""

    form: type[PlaceholderForm]

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

    def first_length(self, images: np.ndarray) -> int:
        return with_room_for_text(images.shape[1] * self.image_length)

    def inputs(
        self, images: np.ndarray, prompts: Sequence[str], length: int
    ) -> dict[str, Tensor]:
        self.causal_lm.preprocessor.max_images_per_prompt = images.shape[1]
        return super().inputs(images, prompts, length)


class Gemma3Prompts(PlaceholderPrompts):
    causal_lm_class = Gemma3CausalLM
    form = Gemma3Form


class Gemma4Prompts(PlaceholderPrompts):
    causal_lm_class = Gemma4CausalLM
    form = Gemma4Form
    resizes = True

    def size_of(self, model: CausalLM, form: PromptForm) -> tuple[int, int]:
        return form.image_size


class Qwen3_5Prompts(FamilyPrompts):
    """Images have marks around them, and any one size in a batch.

    KerasHub's `generate` cannot be compiled with images, runs linear layers
    over padding, and gives answers other positions than M-RoPE does. So each
    token of an answer takes a pass over the prompt.
    """

    causal_lm_class = Qwen3_5CausalLM
    placeholder = Qwen3_5Form.placeholder
    resizes = True
    generates = False

    def __init__(self, model: Qwen3_5CausalLM) -> None:
        if model.backbone.vision_encoder is None:
            raise ValueError(
                "A Qwen 3.5 must have a vision encoder to be asked about "
                f"images. Received: {model.name!r}, whose backbone has "
                "vision_encoder=None. Pass a model with one, or set "
                "`model.preprocessor.image_converter = None` to ask about text."
            )
        self.form = Qwen3_5Form(model.preprocessor)
        self.image_size = self.form.image_size
        self.image_length = self.form.image_length
        self.causal_lm = Qwen3_5CausalLM(
            backbone=model.backbone, preprocessor=model.preprocessor
        )
        self.hidden_states = functools.partial(hidden_states_of, model.backbone)

    def tokens_of(self, images: Sequence[Any]) -> int:
        size = self.image_size  # That paths are made to have.
        if not isinstance(images[0], str):
            size = images[0].shape[:2]
        tokens = self.form.tokens_of(size) + 2 * self.form.margin
        return len(images) * tokens

    def first_length(self, images: np.ndarray) -> int:
        return with_room_for_text(self.tokens_of(images[0]))

    def inputs(
        self, images: np.ndarray, prompts: Sequence[str], length: int
    ) -> dict[str, Tensor]:
        return self.form.prompt_inputs(images, prompts, length)


FAMILIES = (PaliGemmaPrompts, Gemma3Prompts, Gemma4Prompts, Qwen3_5Prompts)


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
        # From the tokens of a prompt's images to all of its tokens.
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
        return self._family.tokens_of(images) + TEXT_LENGTH

    def first_logits(
        self, images: np.ndarray, prompts: Sequence[str]
    ) -> np.ndarray:
        inputs, lengths = self._preprocess(images, prompts)
        return self.logits_at(inputs, lengths - 1)

    def generate(
        self, images: np.ndarray, prompts: Sequence[str], max_tokens: int
    ) -> list[str]:
        _, lengths = self._preprocess(images, prompts)
        length = self._length_of(images) + max_tokens
        if not self._family.generates:
            inputs = as_arrays(self._family.inputs(images, prompts, length))
            return self._generate_by_logits(inputs, lengths, max_tokens)
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
                max_length=length,
                strip_prompt=True,
            )

    def _generate_by_logits(
        self, inputs: dict[str, np.ndarray], lengths: np.ndarray, most: int
    ) -> list[str]:
        """Greedy answers, each token by a pass over the whole prompt.

        Args:
            inputs: Inputs of the model with room for `most` tokens.
            lengths: Integer array of shape `(batch,)`, tokens of each prompt.
            most: Integer, the largest number of tokens of an answer.
        """
        rows = np.arange(len(lengths))
        end = self.preprocessor.tokenizer.end_token_id
        tokens = np.full((len(rows), most), end, "int32")
        going = np.ones(len(rows), "bool")
        for step in range(most):
            logits = self.logits_at(inputs, lengths + step - 1)
            tokens[going, step] = logits.argmax(axis=-1)[going]
            going &= tokens[:, step] != end
            if not going.any():
                break
            inputs["token_ids"][rows, lengths + step] = tokens[:, step]
            inputs["padding_mask"][rows, lengths + step] = 1
        return self.preprocessor.generate_postprocess(
            {"token_ids": tokens, "padding_mask": tokens != end}
        )

    def _preprocess(
        self, images: np.ndarray, prompts: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs of the model, and the length of each prompt in tokens."""
        check_values(self.causal_lm)
        self._check_images(images)
        length = self._length_of(images)
        while True:
            inputs = as_arrays(self._family.inputs(images, prompts, length))
            # Some preprocessors make more room themselves.
            length = inputs["padding_mask"].shape[1]
            lengths = inputs["padding_mask"].sum(axis=1).astype("int32")
            if lengths.max() < length:
                self._lengths[self._family.tokens_of(images[0])] = length
                return inputs, lengths
            length += LENGTH_STEP  # A full row may have been cut.

    def _length_of(self, images: np.ndarray) -> int:
        """Tokens that prompts with such images have room for, as far as known.

        A number of tokens stands for a number of images and their size.
        """
        return self._lengths.get(
            self._family.tokens_of(images[0]), self._family.first_length(images)
        )

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


def with_room_for_text(tokens: int) -> int:
    """A multiple of `LENGTH_STEP` that is larger by two steps or more."""
    return -(-(tokens + 2 * LENGTH_STEP) // LENGTH_STEP) * LENGTH_STEP


def as_arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: ops.convert_to_numpy(value) for name, value in inputs.items()}


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, of one number where they are equal."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
