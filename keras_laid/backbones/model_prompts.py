"""The base class of prompts that a KerasHub model is asked."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_laid.backbones.families import has_linear_layers
from keras_laid.backbones.fingerprint import model_fingerprint
from keras_laid.backbones.fingerprint import preprocessor_fingerprint
from keras_laid.backbones.gated_delta import linear_layers_without_loops
from keras_laid.typing import Tensor


class ModelPrompts:
    """Asks a model about several images, or documents of text, at once.

    It shares the layers and weights of the model, and leaves it as it is.

    Args:
        causal_lm: A `keras_hub.models.CausalLM` of its own, around the model's
            backbone.
        preprocessor: Its preprocessor.
        hidden_states: Function from inputs to the hidden states of tokens.

    Attributes:
        takes_images: Boolean, or else prompts hold documents of text.
        reads_once: Boolean, whether documents are read once for several
            prompts about them.
        image_size: Tuple of integers, height and width that images need, in
            pixels. Prompts of text have none.
    """

    takes_images = True
    reads_once = False
    image_size: tuple[int, int]

    def __init__(
        self,
        causal_lm: keras.Model,
        preprocessor: keras.layers.Layer,
        hidden_states: Callable[[dict[str, Tensor]], Tensor],
    ) -> None:
        self.causal_lm = causal_lm
        self.preprocessor = preprocessor
        self._hidden_states = hidden_states
        self._needs_length = has_linear_layers(causal_lm)
        # From the length of prompts, or 0 for any, to a model that reads them.
        self._by_length: dict[int, FirstLogits] = {}
        causal_lm.compile(sampler="greedy")

    def fill(self, template: str, images: int, **texts: str) -> str:
        """Makes a prompt from a template.

        Args:
            template: String with `{images}` where the images or documents go,
                and the names in `texts` in braces. Without `{images}`, they
                come first.
            images: Integer, the number of images or documents.
            **texts: Strings for the other names in the template.

        Returns:
            A string.

        Raises:
            ValueError: If the template has text before `{images}`, and the
                model's images or documents must come before all text.
        """
        raise NotImplementedError

    def length(self, images: Sequence[Any], prompt: str) -> int:
        """About how many tokens a prompt has. Prompts of a batch agree in it.

        Args:
            images: Sequence of images, or of strings, the documents.
            prompt: String, made by `fill`.
        """
        raise NotImplementedError

    def first_logits(self, images: Any, prompts: Sequence[str]) -> np.ndarray:
        """Logits of the first token after each prompt.

        Args:
            images: `uint8` array of shape `(batch, images, height, width, 3)`,
                or a list of lists of strings, the documents.
            prompts: Sequence of strings, made by `fill`.

        Returns:
            A float array of shape `(batch, vocabulary)`.
        """
        raise NotImplementedError

    def generate(
        self, images: Any, prompts: Sequence[str], max_tokens: int
    ) -> list[str]:
        """Generates greedy answers.

        Args:
            images: `uint8` array of shape `(batch, images, height, width, 3)`,
                or a list of lists of strings, the documents.
            prompts: Sequence of strings, made by `fill`.
            max_tokens: Integer, the largest number of tokens of an answer.

        Returns:
            A list of strings, the answers without the prompts.
        """
        raise NotImplementedError

    def logits_at(
        self, inputs: dict[str, np.ndarray], last: np.ndarray
    ) -> np.ndarray:
        """Logits after one token of each prompt.

        Args:
            inputs: Dictionary of the model's inputs.
            last: Integer array of shape `(batch,)`, the places of the tokens.

        Returns:
            A float array of shape `(batch, vocabulary)`.
        """
        # What TensorFlow has compiled for two lengths knows neither of them.
        length = inputs["token_ids"].shape[1] if self._needs_length else 0
        if length not in self._by_length:
            self._by_length[length] = FirstLogits(
                self.causal_lm.backbone, self._hidden_states
            )
        return self._by_length[length].predict_on_batch(
            {"inputs": inputs, "last": last}
        )

    def fingerprint(self) -> str:
        """A string that changes with everything that answers depend on."""
        return (
            f"{model_fingerprint(self.causal_lm)}, "
            f"{preprocessor_fingerprint(self.preprocessor)}"
        )

    def first_tokens(self, word: str) -> set[int]:
        """The tokens that an answer can begin with.

        Args:
            word: String, the answer or its first word.

        Returns:
            A set of integers: the tokens that are the whole string, also in
            capitals or after a space; if there are none, its first token.
        """
        spellings = (word, word.capitalize(), word.upper())
        first = {
            self._tokenize(spelling)[0]
            for spelling in (*spellings, *(f" {s}" for s in spellings))
        }
        whole = {
            token
            for token in first
            if self.text(token).strip().lower() == word.lower()
        }
        return whole or {self._tokenize(word)[0]}

    def text(self, token: int) -> str:
        """A token as a string."""
        return self.preprocessor.tokenizer.detokenize([int(token)])

    def _tokenize(self, text: str) -> list[int]:
        tokens = self.preprocessor.tokenizer(text)
        return [int(token) for token in ops.convert_to_numpy(tokens)]


class FirstLogits(keras.Model):
    """Computes logits at one position, so that no others are ever stored."""

    def __init__(
        self,
        backbone: keras.Model,
        hidden_states: Callable[[dict[str, Tensor]], Tensor],
    ) -> None:
        super().__init__()
        # The backbone is tracked, so that compiled steps are given its weights.
        # The task is not: it has a preprocessor, which cannot be compiled, and
        # Keras compiles either a whole model or nothing of it.
        self.backbone = backbone
        self.hidden_states = hidden_states
        self.built = True  # Otherwise Keras would first run it uncompiled.

    def call(self, data: dict[str, Any]) -> Tensor:
        with linear_layers_without_loops(self.backbone):
            x = self.hidden_states(data["inputs"])
        last = data["last"][:, None, None]
        x = ops.take_along_axis(x, last, axis=1)
        return self.backbone.token_embedding(x, reverse=True)[:, 0]
