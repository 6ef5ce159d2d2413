"""The distiller's whole training step, compiled from shapes alone."""

import concurrent.futures
import time
from typing import Any
from typing import NamedTuple

import jax
import keras
import numpy as np

import keras_laid
from keras_laid import distillation
from keras_laid.devices.memory_plan import uncompiled


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
        step: The `jax.stages.Compiled`.
        layouts: List of pairs, the path of each variable that a step changes
            or reads, and its `jax.sharding.NamedSharding`. A teacher and a
            student may have the same paths.
        seconds: Dictionary from `"lower"` and `"compile"` to floats.
    """

    step: Any
    layouts: list[tuple[str, Any]]
    seconds: dict[str, float]


def compile_step(pair, tokens, devices, mesh_shape):
    """Compiles a training step of a pair of models; no weight is made.

    Args:
        pair: A `pairs.Pair`.
        tokens: Integer, the tokens of a prompt.
        devices: List of devices, or of their descriptions.
        mesh_shape: Tuple of two integers, over how many devices a batch is
            split, with one prompt each, and over how many the models.

    Returns:
        A `Compiled`.
    """
    mesh = keras.distribution.DeviceMesh(
        mesh_shape, ["batch", "model"], np.array(devices)
    )
    distribution = keras_laid.ModelParallel(mesh)
    seconds = {}

    def timed(name, function, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        seconds[name] = time.perf_counter() - started
        return result

    # Keras would initialize the variables of this thread later.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        distiller = thread.submit(make_distiller, pair, distribution).result()
    groups = (
        distiller.trainable_variables,
        distiller.non_trainable_variables,
        distiller.optimizer.variables,
        distiller.metrics_variables,
    )
    layouts = [
        [layout_of(variable, distribution) for variable in group]
        for group in groups
    ]
    state = tuple(
        [
            jax.ShapeDtypeStruct(
                tuple(variable.shape), variable.dtype, sharding=layout
            )
            for variable, layout in zip(group, of_group, strict=True)
        ]
        for group, of_group in zip(groups, layouts, strict=True)
    )
    split = jax.sharding.NamedSharding(
        mesh.backend_mesh, jax.sharding.PartitionSpec("batch")
    )
    data = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=split
        ),
        pair.batch(tokens, mesh_shape[0]),
    )
    step = jax.jit(
        distiller.train_step,
        donate_argnums=0,
        out_shardings=(None, tuple(layouts)),
    )
    lowered = timed("lower", step.lower, state, data)
    compiled = timed("compile", lowered.compile)
    laid_out = [
        (variable.path, layout)
        for group, of_group in zip(groups, layouts, strict=True)
        for variable, layout in zip(group, of_group, strict=True)
    ]
    return Compiled(compiled, laid_out, seconds)


def make_distiller(pair, distribution):
    """A distiller whose variables have no values, ready to be compiled."""
    # The few numbers of its own that an optimizer begins with have values.
    optimizer = keras.optimizers.AdamW(1e-5)
    keras.distribution.set_distribution(distribution)
    with keras.StatelessScope(initialize_variables=False), uncompiled():
        keras.config.set_dtype_policy("bfloat16")
        teacher = pair.teacher()
        keras.config.set_dtype_policy("mixed_bfloat16")
        student = pair.student()
        terms = [
            distillation.NextTokens(supervised_weight=0.0),
            distillation.RetrievalMatching(
                teacher_heads=pair.heads, num_segments=pair.segments
            ),
        ]
        distiller = keras_laid.DistanceWeightedAttentionDistillation(
            teacher,
            student,
            keras_laid.DistanceWeighting(steps=1000),
            terms=terms,
        )
        distiller.compile(optimizer, rematerialize=True, linear_memory=True)
        for variable in distiller.variables:
            variable._initialize_layout()
        # The optimizer's variables are laid out as those they belong to.
        optimizer.build(distiller.trainable_variables)
    return distiller


def layout_of(variable, distribution):
    """How a variable lies on the devices, as Keras will lay it out."""
    layout = getattr(variable, "_layout", None)
    if layout is None:
        layout = distribution.get_variable_layout(variable)
    return getattr(layout, "backend_layout", layout)
