"""Reads documents once for several questions about them."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_hub.models import CausalLM

from keras_laid.backbones.decoder import rotates_plainly
from keras_laid.backbones.families import FAMILIES
from keras_laid.backbones.families import attention_layers
from keras_laid.backbones.prompt_form_base import LENGTH_STEP

CHUNK = 1024  # Tokens read at once, so that memory is linear in length.


def can_be_read_once(model: keras.Model) -> bool:
    """Whether cached decoding in chunks gives what a single pass gives.

    It does not where layers are recurrent, whose state the padding of a chunk
    would change, or where frequencies depend on the length of the prompt. It is
    not known for families without a record.
    """
    if not isinstance(model.backbone, tuple(FAMILIES)):
        return False
    return all(map(rotates_plainly, attention_layers(model)))


class DocumentReader:
    """Logits after several questions about the same documents.

    Documents are read by KerasHub's cached decoding, a chunk at a time, and
    each question after them.

    Args:
        causal_lm: A `keras_hub.models.CausalLM` of text without a preprocessor.
    """

    def __init__(self, causal_lm: CausalLM) -> None:
        self.causal_lm = causal_lm
        self.read = CachedStep(causal_lm, returns_cache=True)
        self.answer = CachedStep(causal_lm, returns_cache=False)

    def __call__(
        self, documents: Sequence[int], questions: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Logits of the first token after each question.

        Args:
            documents: Sequence of integers, the tokens of the documents.
            questions: Sequence of sequences of integers.

        Returns:
            A float array of shape `(questions, vocabulary)`.
        """
        longest = multiple(max(map(len, questions)), LENGTH_STEP)
        chunk = min(CHUNK, multiple(len(documents), LENGTH_STEP))
        # What is read of the last chunk after the documents is written over.
        end = multiple(len(documents), chunk)
        tokens = np.zeros(end, "int32")
        tokens[: len(documents)] = documents
        cache = self.empty_cache(end + longest)
        for start in range(0, end, chunk):
            piece = tokens[start : start + chunk]
            cache = self.read.predict_on_batch(step_inputs(piece, cache, start))
        rows = []
        for question in questions:
            padded = np.zeros(longest, "int32")
            padded[: len(question)] = question
            inputs = step_inputs(padded, cache, len(documents))
            inputs["last"] = np.array([len(question) - 1], "int32")
            rows.append(self.answer.predict_on_batch(inputs)[0])
        return np.stack(rows)

    def empty_cache(self, length: int) -> Any:
        """A cache of keys and values of so many tokens, all of them zero."""
        return keras.tree.map_structure(
            lambda one, two: np.zeros(
                [
                    length if few < more else few
                    for few, more in zip(one.shape, two.shape, strict=True)
                ],
                keras.backend.standardize_dtype(one.dtype),
            ),
            *self.short_caches,
        )

    @functools.cached_property
    def short_caches(self) -> list[Any]:
        """The caches of prompts of one and of two tokens."""
        return [cache_of(self.causal_lm, tokens) for tokens in (1, 2)]


def step_inputs(tokens: np.ndarray, cache: Any, start: int) -> dict[str, Any]:
    """Inputs of a `CachedStep`, for tokens that begin at a place."""
    return {
        "tokens": tokens[None],
        "cache": cache,
        "start": np.array([start], "int32"),
    }


class CachedStep(keras.Model):
    """Runs some tokens after those in a cache of keys and values.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
        returns_cache: Boolean, whether the output is the new cache, or the
            logits at one of the tokens.
    """

    def __init__(self, causal_lm: CausalLM, returns_cache: bool) -> None:
        super().__init__()
        self.backbone = causal_lm.backbone
        self.causal_lm = causal_lm
        self.returns_cache = returns_cache
        self.built = True  # Otherwise Keras would first run it uncompiled.

    def call(self, data: dict[str, Any]) -> Any:
        _, hidden, cache = self.causal_lm.call_with_cache(
            data["tokens"], data["cache"], data["start"][0]
        )
        if self.returns_cache:
            return cache
        last = data["last"][:, None, None]
        hidden = ops.take_along_axis(hidden, last, axis=1)
        return self.backbone.token_embedding(hidden, reverse=True)[:, 0]


def cache_of(causal_lm: CausalLM, tokens: int) -> Any:
    """The cache of a prompt of so many tokens."""
    ones = ops.ones((1, tokens), "int32")
    known = {"token_ids": ones, "padding_mask": ones}
    names = inspect.signature(causal_lm._build_cache).parameters
    _, cache = causal_lm._build_cache(*(known.get(name) for name in names))
    return cache


def multiple(number: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step
