"""Accuracy over haystack size."""

import numpy as np
from keras import ops
from tqdm import tqdm

from keras_laid.backbones.multi_image_pali_gemma import (
    MultiImagePaliGemmaCausalLM,
)
from keras_laid.haystacks.dataset import Haystacks


def haystack_accuracy(
    model,
    source,
    preprocessor,
    sizes,
    num_questions=512,
    tokens_per_batch=8192,
    seed=0,
    verbose=True,
):
    """Measures how often a model answers single-needle questions rightly.

    Scoring is strict: of the whole vocabulary, the most likely first token of
    the response must be that of the right answer.

    Args:
        model: A `keras_hub.models.PaliGemmaCausalLM` or
            `keras_laid.MultiImagePaliGemmaCausalLM`.
        source: Source of images, such as `keras_laid.Digits("test")`.
        preprocessor: The preprocessor of the model's preset.
        sizes: Sequence of integers, numbers of images.
        num_questions: Integer, questions for each size.
        tokens_per_batch: Integer, about how many tokens one forward pass
            holds.
        seed: Integer; questions depend on it alone.
        verbose: Boolean, whether to show a progress bar.

    Returns:
        A dictionary from size to accuracy, 0 to 1, chance being 0.5.
    """
    # Without a preprocessor: these batches are preprocessed.
    model = MultiImagePaliGemmaCausalLM(model.backbone)
    accuracy = {}
    for size in tqdm(sizes, desc="haystacks", disable=not verbose):
        length = size * model.backbone.image_sequence_length
        haystacks = Haystacks(
            source,
            preprocessor,
            num_questions,
            sizes=(size,),
            batch_size=max(1, min(num_questions, tokens_per_batch // length)),
            seed=seed,
        )
        right = 0
        for index in range(len(haystacks)):
            x, y, sample_weight = haystacks[index]
            logits = model.predict_on_batch(x)
            right += np.sum(first_answer_is_right(logits, y, sample_weight))
        accuracy[size] = float(right / num_questions)
    return accuracy


def first_answer_is_right(logits, y, sample_weight):
    """Whether the first marked token of each row is predicted: `(batch,)`."""
    row = np.arange(len(y))
    first = np.argmax(sample_weight > 0, axis=1)
    predicted = ops.convert_to_numpy(ops.argmax(logits, axis=-1))
    return predicted[row, first] == y[row, first]
