"""Writes the files that `fixtures_test.py` reads, on the backend it runs on.

    KERAS_BACKEND=jax python -m tests.saving.make_fixtures

Run it once for each backend at a release, and commit the file that it writes,
`fixtures/<version>/<backend>.zip`. Never change the files of released versions:
the test checks that every backend can still read them. A file holds

- `layers.keras`, a functional model of the library's layers;
- `student.keras`, a model for several images, with gains;
- `folded/`, a preset of it after training, its gains folded;
- `store/`, a teacher's targets;
- `training/`, the state of a distiller that has trained that student from
  that store, with a learning rate for each group;
- `arrays.npz`, the inputs, and the arrays computed from them.
"""

import pathlib
import shutil
import tempfile

import keras
import numpy as np

import keras_laid
from keras_laid import distillation
from keras_laid.backbones.gain_modulation import gain_layers
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import to_numpy

FOLDER = pathlib.Path(__file__).parent / "fixtures"
# As few layers as possible: most bytes of a file are names.
CONFIG = dict(
    image_size=8,
    num_layers=1,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=8,
    intermediate_dim=8,
    head_dim=4,
    vit_patch_size=4,
    vit_num_heads=2,
    vit_hidden_dim=4,
    vit_num_layers=1,
    vit_intermediate_dim=4,
)


class Batches(keras.utils.PyDataset):
    """Arrays of a file as two batches."""

    def __init__(self, arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(2 * index, 2 * index + 2)
        names = ("images", "token_ids", "padding_mask", "response_mask")
        x = {name: self.arrays[name][rows] for name in names}
        return x, self.arrays["labels"][rows], self.arrays["weights"][rows]


def make_arrays(vocabulary_size):
    rng = np.random.default_rng(0)
    token_ids = rng.integers(4, vocabulary_size, (4, 7)).astype("int32")
    padding_mask = np.tile(np.arange(7) < 6, (4, 1)).astype("int32")
    response_mask = np.tile(np.arange(7) >= 4, (4, 1)).astype("int32")
    return {
        "images": rng.uniform(-1, 1, (4, 2, 8, 8, 3)).astype("float32"),
        "token_ids": token_ids,
        "padding_mask": padding_mask,
        "response_mask": response_mask * padding_mask,
        "labels": np.roll(token_ids, -1, axis=1),
        "weights": (response_mask * padding_mask).astype("float32"),
        "features": rng.standard_normal((2, 5, 4, 8)).astype("float32"),
    }


def make_layers():
    """A model of every layer, with other arguments than the default ones."""
    inputs = keras.Input((None, 4, 8))
    x = keras_laid.GainModulatedRotaryEmbedding(
        max_wavelength=500,
        scaling_factor=2.0,
        rope_type="yarn",
        original_max_position_embeddings=16,
        num_heads=4,
        max_gain=2.5,
    )(inputs)
    x = keras_laid.HeadMixer(2, 4, sharpness=1.0)(x)
    outputs = keras_laid.GainModulatedRotaryEmbedding(max_gain=3.0)(x)
    return keras.Model(inputs, outputs)


def make_distiller(teacher, student):
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher,
        student,
        terms=[
            distillation.AttentionMatching(1.0, query_key_weight=0.1),
            distillation.NextTokens(temperature=2.0),
        ],
    )
    optimizer = keras_laid.group_optimizer(
        student=keras.optimizers.SGD(0.1, momentum=0.9),
        mixer=keras.optimizers.SGD(1.0),
        gains=keras.optimizers.Adam(0.1),
    )
    # Compiling would take longer than the few steps.
    distiller.compile(optimizer, run_eagerly=keras.backend.backend() != "jax")
    return distiller


def train(distiller, arrays, folder):
    """Trains for an epoch, or restores the state of an earlier call."""
    distiller.fit(
        distiller.teacher.targets_for(Batches(arrays)),
        shuffle=False,
        verbose=0,
        callbacks=[keras_laid.ResumableTraining(folder)],
    )


def state_of(distiller, arrays):
    """Arrays that say what a distiller has learned, and how it resumes."""
    data = distiller.teacher.targets_for(Batches(arrays))
    optimizer = [
        np.ravel(to_numpy(variable))
        for variable in distiller.optimizer.variables
    ]
    return {
        "trained": to_numpy(distiller.student(Batches(arrays)[0][0])),
        "mixture": to_numpy(distiller.mixers[0].mixture()),
        "optimizer": np.concatenate(optimizer),
        "steps": to_numpy(distiller.step),
        **distiller.evaluate(data, verbose=0, return_dict=True),
    }


def randomize(variables, rng):
    for variable in variables:
        variable.assign(rng.standard_normal(variable.shape))


def write(folder):
    # The default normalization rules would be most of a tokenizer's bytes.
    preprocessor = make_preprocessor(normalization_rule_name="identity")
    arrays = make_arrays(preprocessor.tokenizer.vocabulary_size())
    data = Batches(arrays)
    x, _, _ = data[0]
    rng = np.random.default_rng(1)

    layers = make_layers()
    randomize(layers.trainable_variables, rng)
    arrays["layers"] = to_numpy(layers(arrays["features"]))
    layers.save(folder / "layers.keras")

    student = make_multi_image(CONFIG, preprocessor, seed=2)
    keras_laid.attach_gain_modulation(student, per_head=True, max_gain=2.0)
    randomize([layer.log_gain for layer in gain_layers(student)], rng)
    arrays["student"] = to_numpy(student(x))
    student.save(folder / "student.keras")

    teacher = make_multi_image(
        CONFIG, preprocessor, seed=1, hidden_dim=12, num_query_heads=4
    )
    store = keras_laid.store_teacher(
        teacher,
        data,
        folder / "store",
        top_k=4,
        temperature=2.0,
        dtype="float32",
    )
    distiller = make_distiller(store, student)
    train(distiller, arrays, folder / "training")
    arrays |= state_of(distiller, arrays)
    keras_laid.fold_gain_modulation(student)
    student.save_to_preset(str(folder / "folded"))
    np.savez_compressed(folder / "arrays.npz", **arrays)


def main():
    version = FOLDER / keras_laid.__version__
    version.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder))
        archive = version / keras.backend.backend()
        shutil.make_archive(str(archive), "zip", folder)


if __name__ == "__main__":
    main()
