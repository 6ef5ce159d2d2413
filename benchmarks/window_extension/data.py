"""Training questions, with labels for all, few or none of them."""

import collections
import itertools

import keras
import numpy as np

import keras_laid

IGNORED = -1  # The label of an unlabelled question.


def make_data(
    settings,
    preprocessor,
    uses_unlabelled,
    stretching,
    seed,
    teacher_images=None,
):
    """The training batches of one run, with each kind of question in each."""
    joined = settings.labelled and settings.unlabelled and uses_unlabelled
    labelled_in_batch = settings.batch_size
    if joined:
        labelled_in_batch = settings.labelled_in_batch
        if labelled_in_batch is None:
            labelled_in_batch = settings.batch_size // 2
    kinds = []  # Pairs: questions in total, and in a batch.
    if settings.labelled:
        kinds.append((settings.labelled, labelled_in_batch))
    if settings.unlabelled and (uses_unlabelled or not settings.labelled):
        rest = settings.batch_size - (labelled_in_batch if joined else 0)
        kinds.append((settings.unlabelled, rest))
    parts = [
        keras_laid.Haystacks(
            keras_laid.Digits("train", augment=True),
            preprocessor,
            num_questions=count,
            sizes=settings.sizes,
            batch_size=batch_size,
            stretching=stretching,
            teacher_images=teacher_images,
            seed=seed + 1000 * number,
        )
        for number, (count, batch_size) in enumerate(kinds)
    ]
    if not settings.labelled:
        return Unlabelled(parts[0]) if uses_unlabelled else parts[0]
    if len(parts) == 1:
        return parts[0]
    return PartlyLabelled(parts[0], Unlabelled(parts[1]))


class Unlabelled(keras.utils.PyDataset):
    """Haystacks without their answers.

    Every response is replaced by the same token. Only the first token of the
    response is marked, since no part of an answer precedes it.
    """

    def __init__(self, haystacks):
        super().__init__()
        self.haystacks = haystacks

    def __len__(self):
        return len(self.haystacks)

    def __getitem__(self, index):
        x, y, sample_weight = self.haystacks[index]
        response = x["response_mask"] > 0
        any_token = x["token_ids"][0][response[0]][0]
        x["token_ids"] = np.where(response, any_token, x["token_ids"])
        is_first = np.cumsum(sample_weight > 0, axis=1) == 1
        return x, np.full_like(y, IGNORED), sample_weight * is_first

    def on_epoch_end(self):
        self.haystacks.on_epoch_end()


class PartlyLabelled(keras.utils.PyDataset):
    """Each unlabelled batch, joined with a labelled one of as many images."""

    def __init__(self, labelled, unlabelled):
        super().__init__()
        self.labelled = labelled
        self.unlabelled = unlabelled
        by_size = collections.defaultdict(list)
        for index, size in enumerate(labelled.batch_images):
            by_size[size].append(index)
        turns = {size: itertools.cycle(each) for size, each in by_size.items()}
        self._partner = [
            next(turns[size]) for size in unlabelled.haystacks.batch_images
        ]

    def __len__(self):
        return len(self.unlabelled)

    def __getitem__(self, index):
        batches = (
            self.labelled[self._partner[index]],
            self.unlabelled[index],
        )
        return keras.tree.map_structure(
            lambda *parts: np.concatenate(parts), *batches
        )

    def on_epoch_end(self):
        self.labelled.on_epoch_end()
        self.unlabelled.on_epoch_end()
