"""The lengths of prompts and responses in tokens, so that none is cut."""

from collections.abc import Sequence
from typing import Any

from keras_hub.models import PaliGemmaCausalLMPreprocessor


def training_length(
    preprocessor: PaliGemmaCausalLMPreprocessor,
    prompts: Sequence[str],
    responses: Sequence[str],
) -> int:
    """The `sequence_length` that training needs for the longest example.

    The last token of an example is only a label, so the inputs are one token
    shorter than the example.

    Args:
        preprocessor: A `keras_hub.models.PaliGemmaCausalLMPreprocessor`.
        prompts: Sequence of strings.
        responses: Sequence of strings, one for each prompt.

    Returns:
        Integer, in tokens.
    """
    special = preprocessor.add_start_token + preprocessor.add_end_token
    pairs = zip(
        preprocessor.tokenizer(list(prompts)),
        preprocessor.tokenizer(list(responses)),
        strict=True,
    )
    return max(len(one) + len(other) for one, other in pairs) + special - 1


def generation_length(
    preprocessor: PaliGemmaCausalLMPreprocessor, inputs: dict[str, Any]
) -> int:
    """The least `max_length` with which something can be generated.

    Args:
        preprocessor: A `keras_hub.models.PaliGemmaCausalLMPreprocessor`.
        inputs: A dictionary with `"prompts"`, a sequence of strings, and
            optionally `"responses"`, a string for each prompt, which generation
            continues.

    Returns:
        Integer, in tokens: a start token, the longest text and one new token.
    """
    texts = [
        preprocessor.tokenizer(list(inputs[name]))
        for name in ("prompts", "responses")
        if name in inputs
    ]
    return max(sum(map(len, parts)) for parts in zip(*texts, strict=True)) + 2
