"""Batches that workers read ahead belong to their epoch and come once."""

import time

import keras
import numpy as np
import pytest

from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid.backbones.workers import batch_to_build_on
from keras_laid.backbones.workers import check_workers

BATCHES = 5


class Numbered(keras.utils.PyDataset):
    """A batch holds its epoch and its index."""

    epoch = 0

    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        time.sleep(0.002 * index)
        x = np.full((2, 2), (self.epoch, index), "float32")
        return x, x[:, :1]

    def on_epoch_end(self):
        self.epoch += 1


class Reader(keras.Sequential):
    """Records the batches that it is trained or evaluated on."""

    def __init__(self, layers):
        super().__init__(layers)
        self.read = []
        # Never built, like a preprocessor: Keras builds in each `fit`.
        self.unused = keras.layers.Dense(1)

    def fit(self, x, **kwargs):
        check_workers(x, kwargs)
        return super().fit(x, **kwargs)

    def _symbolic_build(self, iterator=None, data_batch=None):
        if data_batch is None:
            data_batch = batch_to_build_on(iterator)
        super()._symbolic_build(iterator, data_batch)

    def train_step(self, *arguments):
        self.note(arguments)
        return super().train_step(*arguments)

    def test_step(self, *arguments):
        self.note(arguments)
        return super().test_step(*arguments)

    def note(self, arguments):
        x, _ = arguments[-1]  # JAX passes a state first.
        x = keras.ops.convert_to_numpy(x)
        self.read.append(tuple(x[0].astype(int).tolist()))


def make_reader():
    reader = Reader([keras.layers.Dense(1)])
    reader.compile("sgd", "mse", run_eagerly=True)
    return reader


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "workers",
    [
        dict(workers=1),
        dict(workers=3),
        dict(workers=2, max_queue_size=2),
        dict(workers=2, use_multiprocessing=True),
    ],
    ids=["none", "threads", "a short queue", "processes"],
)
def test_each_batch_once_in_its_epoch(workers, shuffle):
    reader, data = make_reader(), Numbered(**workers)
    validation = Numbered(**workers)
    keras.utils.set_random_seed(0)
    reader.fit(
        data,
        epochs=3,
        shuffle=shuffle,
        validation_data=validation,
        verbose=0,
    )
    expected = [(epoch, i) for epoch in (1, 2, 3) for i in range(BATCHES)]
    steps = range(0, 6 * BATCHES, BATCHES)
    parts = [reader.read[start : start + BATCHES] for start in steps]
    trained = [parts[i] for i in (0, 2, 4)]
    if shuffle:
        assert trained != [sorted(part) for part in trained]
        trained = [sorted(part) for part in trained]
    assert sum(trained, []) == expected
    for part in (parts[i] for i in (1, 3, 5)):
        assert sorted(part) == part
        assert len({epoch for epoch, _ in part}) == 1


def test_a_part_of_what_workers_read_is_refused():
    reader, data = make_reader(), Numbered(workers=2)
    with pytest.raises(ValueError, match="Received: steps_per_epoch=2"):
        reader.fit(data, steps_per_epoch=2)
    with pytest.raises(ValueError, match="Received: validation_steps=2"):
        reader.fit(Numbered(), validation_data=data, validation_steps=2)
    model = MultiImagePaliGemmaCausalLM
    with pytest.raises(ValueError, match="workers=2"):
        model.fit(_Nothing(), data, steps_per_epoch=2)


class _Nothing:
    preprocessor = None
