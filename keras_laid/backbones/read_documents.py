"""Reads documents once for several questions about them."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_hub.models import CausalLM

from keras_laid.typing import Tensor

CHUNK = 1024  # Tokens read at once, so that memory is linear in length.
STEP = 16  # Lengths of questions are multiples, so that few are compiled.


class DocumentReader:
    """Logits after several questions about the same documents.

    Documents are read by KerasHub's cached decoding, a chunk at a time, and
    each question after them.

    Args:
        causal_lm: A `keras_hub.models.CausalLM` of text without a preprocessor.
    """

    def __init__(self, causal_lm: CausalLM) -> None:
        self.causal_lm = causal_lm
        self.cached_step = CachedStep(causal_lm)

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
        longest = multiple(max(map(len, questions)), STEP)
        chunk = min(CHUNK, multiple(len(documents), STEP))
        # What is read of the last chunk after the documents is written over.
        end = multiple(len(documents), chunk)
        tokens = np.zeros(end, "int32")
        tokens[: len(documents)] = documents
        cache = empty_cache(self.causal_lm, end + longest)
        for start in range(0, end, chunk):
            piece = tokens[start : start + chunk]
            _, cache = self.step(piece, cache, start, 0)
        rows = []
        for question in questions:
            padded = np.zeros(longest, "int32")
            padded[: len(question)] = question
            logits, _ = self.step(
                padded, cache, len(documents), len(question) - 1
            )
            rows.append(logits[0])
        return np.stack(rows)

    def step(
        self, tokens: np.ndarray, cache: Any, start: int, last: int
    ) -> tuple[np.ndarray, Any]:
        return self.cached_step.predict_on_batch(
            {
                "tokens": tokens[None],
                "cache": cache,
                "start": np.array([start], "int32"),
                "last": np.array([last], "int32"),
            }
        )


class CachedStep(keras.Model):
    """Runs some tokens after those in a cache of keys and values."""

    def __init__(self, causal_lm: CausalLM) -> None:
        super().__init__()
        self.backbone = causal_lm.backbone
        self.causal_lm = causal_lm
        self.built = True  # Otherwise Keras would first run it uncompiled.

    def call(self, data: dict[str, Any]) -> tuple[Tensor, Any]:
        """Logits at one of the tokens, and the new cache."""
        _, hidden, cache = self.causal_lm.call_with_cache(
            data["tokens"], data["cache"], data["start"][0]
        )
        last = data["last"][:, None, None]
        hidden = ops.take_along_axis(hidden, last, axis=1)
        return self.backbone.token_embedding(hidden, reverse=True)[:, 0], cache


def empty_cache(causal_lm: CausalLM, length: int) -> Any:
    """A cache of keys and values of so many tokens, all of them zero."""
    return keras.tree.map_structure(
        lambda one, two: np.zeros(
            [
                length if few < more else few
                for few, more in zip(one.shape, two.shape, strict=True)
            ],
            keras.backend.standardize_dtype(one.dtype),
        ),
        *(cache_of(causal_lm, tokens) for tokens in (1, 2)),
    )


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
