"""Accuracy over haystack size, and the effective window."""

import itertools

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


def effective_window(accuracy, share=0.85, chance=0.5):
    """The longest haystack over which accuracy stays near the shortest's.

    The relative rule: accuracy above chance must stay at least `share` of what
    it is at the smallest size. Between two measured sizes accuracy is
    interpolated linearly in the logarithm of the size; the first crossing
    counts, whatever follows.

    Args:
        accuracy: Dictionary from haystack size, in images, to accuracy, 0 to 1.
        share: Float in `(0, 1]`. Defaults to `0.85`, as in NoLiMa.
        chance: Float, accuracy of guessing. Defaults to `0.5`.

    Returns:
        A tuple `(window, censored)`: the window in images, and whether accuracy
        never fell below, so that the true window is at least that.

    Raises:
        ValueError: If `accuracy` is empty, or at the smallest size is not above
            chance.

    Reference:
     - [Modarressi et al., 2025](https://arxiv.org/abs/2502.05167), NoLiMa:
       effective length at 85% of the base score.
    """
    if not accuracy:
        raise ValueError("`accuracy` must have at least one size. Received: {}")
    sizes = sorted(accuracy)
    base = accuracy[sizes[0]] - chance
    if base <= 0:
        raise ValueError(
            "Accuracy at the smallest size must be above `chance`. Received: "
            f"accuracy[{sizes[0]}]={accuracy[sizes[0]]}, chance={chance}"
        )
    threshold = chance + share * base
    for near, far in itertools.pairwise(sizes):
        if accuracy[far] < threshold:
            fall = accuracy[near] - accuracy[far]
            part = (accuracy[near] - threshold) / fall
            return float(near * (far / near) ** part), False
    return float(sizes[-1]), True
