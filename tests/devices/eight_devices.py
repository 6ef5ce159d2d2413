"""Run by `model_parallel_test.py` in a process with eight devices."""

import collections
import json
import math
import os
import sys

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),  # Set by the tests.
        "--xla_force_host_platform_device_count=8",
    ]
)

import jax
import keras
import keras_hub

import keras_laid
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import make_terms

SHAPE = dict(
    hidden_dim=32,
    intermediate_dim=64,
    num_query_heads=8,
    num_key_value_heads=1,
    vit_hidden_dim=32,
    vit_intermediate_dim=64,
)


def mesh(*shape):
    return keras.distribution.DeviceMesh(shape, ["batch", "model"])


def losses(distribution):
    """Losses of ten steps of the distiller, and layouts of split variables."""
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    preprocessor = make_preprocessor()
    size = preprocessor.tokenizer.vocabulary_size()
    teacher, student = (
        make_multi_image(seed=seed, vocabulary_size=size, **SHAPE)
        for seed in (1, 2)
    )
    keras_laid.attach_gain_modulation(student)
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher, student, terms=make_terms(query_key_weight=0.1)
    )
    distiller.compile(keras.optimizers.SGD(0.03))
    seen = []
    distiller.fit(
        make_haystacks(preprocessor, 80, (3,), batch_size=8),
        shuffle=False,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: seen.append(logs["loss"])
            )
        ],
        verbose=0,
    )
    keras.distribution.set_distribution(None)
    split = {
        v.path: [str(a) for a in v.value.sharding.spec]
        for v in [*distiller.trainable_variables, *teacher.variables]
        if not v.value.sharding.is_fully_replicated
    }
    return [float(loss) for loss in seen], split


def losses_of_family(name, distribution):
    """Losses of three steps on one batch, and the count of split variables."""
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    family = getattr(small_models, name)
    teacher, student = (make_model(family, seed) for seed in (5, 0))
    keras_laid.attach_gain_modulation(student)
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher, student
    )
    distiller.compile(keras.optimizers.SGD(0.003))
    inputs = make_inputs(student, batch=8)
    history = distiller.fit(
        inputs, inputs["token_ids"], batch_size=8, epochs=3, verbose=0
    ).history
    keras.distribution.set_distribution(None)
    split = sum(
        not variable.value.sharding.is_fully_replicated
        for variable in distiller.variables
    )
    return history["loss"], split


def most_bytes_while_loading(folder):
    """The most bytes that a device holds while loading, and the model's bytes.

    The last device stands for the host, into which weights are read.
    """
    host = jax.devices()[-1]
    most = collections.Counter()
    assign = keras.Variable._direct_assign

    def watching(self, value):
        held = collections.Counter()
        for array in jax.live_arrays():
            shape = array.sharding.shard_shape(array.shape)
            for device in array.sharding.device_set:
                held[device.id] += math.prod(shape) * array.dtype.itemsize
        for device, count in held.items():
            most[device] = max(most[device], count)
        return assign(self, value)

    keras.Variable._direct_assign = watching
    keras.distribution.set_distribution(keras_laid.ModelParallel(mesh(1, 8)))
    with jax.default_device(host):
        model = keras_hub.models.PaliGemmaBackbone.from_preset(folder)
    del most[host.id]
    whole = sum(v.value.nbytes for v in model.variables)
    split = sum(
        v.value.nbytes
        for v in model.variables
        if not v.value.sharding.is_fully_replicated
    )
    return {"most": max(most.values()), "whole": whole, "split": split}


if __name__ == "__main__":
    if sys.argv[1] == "losses":
        result = {
            name: losses(distribution)
            for name, distribution in {
                "one": None,
                "data": keras.distribution.DataParallel(),
                "model": keras_laid.ModelParallel(mesh(2, 4)),
            }.items()
        }
    elif sys.argv[1] == "family":
        result = {
            name: losses_of_family(sys.argv[2], distribution)
            for name, distribution in {
                "one": None,
                "model": keras_laid.ModelParallel(mesh(2, 4)),
            }.items()
        }
    else:
        result = most_bytes_while_loading(sys.argv[2])
    sys.stdout.write(json.dumps(result))
