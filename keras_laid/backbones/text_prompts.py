"""Prompts with several documents of text, for a decoder without images."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops
from keras_hub.models import CausalLM
from keras_hub.models import PaliGemmaCausalLM

from keras_laid.backbones.decoder import check_values
from keras_laid.backbones.image_prompts import ImagePrompts
from keras_laid.backbones.model_prompts import ModelPrompts
from keras_laid.backbones.prompt_form_base import LENGTH_STEP
from keras_laid.backbones.prompt_forms import TextForm
from keras_laid.backbones.read_documents import DocumentReader
from keras_laid.backbones.read_documents import can_be_read_once

STEPS = 8  # Padded lengths between a number of tokens and twice as many.


class TextPrompts(ModelPrompts):
    """All documents stand before the text, as in `keras_laid.LongPrompts`.

    Args:
        model: A `keras_hub.models.CausalLM` with a preprocessor of text.
    """

    takes_images = False

    def __init__(self, model: CausalLM) -> None:
        # Without a preprocessor, generation takes and returns tokens.
        causal_lm = type(model)(backbone=model.backbone, preprocessor=None)
        super().__init__(causal_lm, model.preprocessor, model.backbone)
        self.form = TextForm(model.preprocessor)
        self.reads_once = can_be_read_once(model)
        self._reader = DocumentReader(self.causal_lm)

    def fill(self, template: str, images: int, **texts: str) -> str:
        template = template.removeprefix("{images}")
        if "{images}" in template:
            raise ValueError(
                "Documents must stand before all text. Received: "
                f"template={template!r}. Leave out '{{images}}'."
            )
        return template.format(**texts)

    def length(self, images: Sequence[str], prompt: str) -> int:
        tokens, _ = self.form.prompt_tokens(images, prompt)
        return padded_length(len(tokens))

    def first_logits(
        self, images: Sequence[Sequence[str]], prompts: Sequence[str]
    ) -> np.ndarray:
        documents = [*map(tuple, images)]
        asked = {*zip(documents, prompts, strict=True)}
        if self.reads_once and len(asked) > len({*documents}):
            return self.logits_of_shared(documents, prompts)
        inputs, lengths = self.inputs(images, prompts)
        return self.logits_at(inputs, lengths - 1)

    def logits_of_shared(
        self, documents: Sequence[tuple[str, ...]], prompts: Sequence[str]
    ) -> np.ndarray:
        """First logits, where prompts about the same documents share a pass."""
        check_values(self.causal_lm)
        groups: dict[tuple[str, ...], list[str]] = {}
        for each, prompt in zip(documents, prompts, strict=True):
            groups.setdefault(each, []).append(prompt)
        found: dict[tuple[tuple[str, ...], str], np.ndarray] = {}
        for each, texts in groups.items():
            texts = list(dict.fromkeys(texts))
            tokens, _ = self.form.document_tokens(each)
            logits = self._reader(tokens, [*map(self.form.tokenize, texts)])
            found |= {
                (each, text): row
                for text, row in zip(texts, logits, strict=True)
            }
        return np.stack(
            [found[each] for each in zip(documents, prompts, strict=True)]
        )

    def generate(
        self,
        images: Sequence[Sequence[str]],
        prompts: Sequence[str],
        max_tokens: int,
    ) -> list[str]:
        inputs, lengths = self.inputs(images, prompts, max_tokens)
        end = self.preprocessor.tokenizer.end_token_id
        outputs = self.causal_lm.generate(inputs, stop_token_ids=[end])
        tokens = ops.convert_to_numpy(outputs["token_ids"])
        answers = []
        for row, length in zip(tokens, lengths, strict=True):
            answer = row[length : length + max_tokens].tolist()
            if end in answer:
                answer = answer[: answer.index(end)]
            answers.append(self.preprocessor.tokenizer.detokenize(answer))
        return answers

    def inputs(
        self,
        images: Sequence[Sequence[str]],
        prompts: Sequence[str],
        room: int = 0,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs of the model, and the length of each prompt in tokens.

        Args:
            images: Sequence of sequences of strings, the documents.
            prompts: Sequence of strings.
            room: Integer, tokens of padding at the end, for an answer.
        """
        check_values(self.causal_lm)
        rows = [
            self.form.prompt_tokens(*each)[0]
            for each in zip(images, prompts, strict=True)
        ]
        lengths = np.array([len(row) for row in rows], "int32")
        longest = padded_length(int(lengths.max())) + room
        present = np.arange(longest) < lengths[:, None]
        tokens = np.full(
            present.shape, self.preprocessor.tokenizer.pad_token_id or 0
        )
        tokens[present] = np.concatenate(rows)
        inputs = {"token_ids": tokens.astype("int32"), "padding_mask": present}
        return inputs, lengths


def padded_length(length: int) -> int:
    """A length to pad to: one of few, so that few shapes are compiled."""
    step = max(LENGTH_STEP, 2 ** (length.bit_length() - 1) // STEPS)
    return -(-length // step) * step


def prompts_for(model: keras.Model) -> ModelPrompts:
    """The prompts of a model's family.

    Raises:
        ValueError: If the family is unknown, or the model has no preprocessor
            that its prompts need.
    """
    preprocessor = getattr(model, "preprocessor", None)
    if (
        isinstance(model, CausalLM)
        and not isinstance(model, PaliGemmaCausalLM)
        and preprocessor is not None
        and getattr(preprocessor, "image_converter", None) is None
    ):
        return TextPrompts(model)
    return ImagePrompts(model)
