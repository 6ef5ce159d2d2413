"""The memory plan, against real variables and sums computed by hand."""

import keras
import keras_hub
import numpy as np
import pytest

import keras_laid
from keras_laid.devices import memory_plan
from tests.backbones import small_models
from tests.support import PALI_GEMMA
from tests.support import make_terms

SHAPE = PALI_GEMMA | dict(vocabulary_size=40, num_query_heads=8)
ARGUMENTS = dict(image_tokens=8, text_tokens=14, batch_size=2)


def build():
    return keras_hub.models.PaliGemmaBackbone(**SHAPE)


def plan(teacher=build, student=build, **kwargs):
    return keras_laid.plan(teacher, student, **ARGUMENTS | kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_weights_are_those_of_the_built_model(dtype):
    parts = plan(teacher_dtype=dtype, student_dtype=dtype).parts
    variables = keras_hub.models.PaliGemmaBackbone(
        **SHAPE, dtype=dtype
    ).variables
    size = 2 if dtype == "bfloat16" else 4
    expected = size * sum(np.prod(v.shape) for v in variables)
    assert parts["teacher: weights"] == expected
    assert parts["student: weights"] == expected
    assert parts["student: gradients"] == expected
    assert parts["student: optimizer"] == 2 * expected


def test_live_models_and_presets_are_the_same(tmp_path):
    dtype = dict(teacher_dtype="float32", student_dtype="float32")
    expected = plan(**dtype)
    model = build()
    assert plan(model, model).parts == expected.parts
    model.save_to_preset(str(tmp_path))
    assert plan(str(tmp_path), model, **dtype).parts == expected.parts


def test_a_function_may_make_a_task():
    compile_task = keras_hub.models.CausalLM.compile

    def task():
        return keras_hub.models.PaliGemmaCausalLM(
            backbone=build(), preprocessor=None
        )

    assert plan(task, task).parts == plan().parts
    assert keras_hub.models.CausalLM.compile is compile_task


def test_frozen_weights_have_no_gradient():
    model = build()
    model.trainable = False
    model.token_embedding.trainable = True
    parts = plan(model, model).parts
    assert parts["student: gradients"] == 4 * 40 * SHAPE["hidden_dim"]


def test_activations_by_hand():
    parts = plan(teacher_dtype="float32", student_dtype="float32").parts
    decoder, vision = 2 * 16 * (8 + 14), 1 * 8 * 8  # Layers, width, tokens.
    assert parts["student: what blocks are given"] == 2 * 4 * (decoder + vision)
    heads = (8 + 1) * 8
    # Half of Gemma's `intermediate_dim` belongs to the gate.
    inside = 22 * (2 * 16 + 2 * heads + 3 * 24 // 2)
    assert parts["one block at work"] == 2 * 2 * 4 * inside
    assert parts["queries and keys that are matched"] == 2 * 22 * 2 * heads * 4
    half = plan(batch_size=4, mesh_shape=(2, 2), student_dtype="float32").parts
    assert half["student: what blocks are given"] == 2 * 4 * (decoder + vision)


@pytest.mark.extra_large_but_on("torch")
@small_models.EACH
def test_every_family(family):
    text = "pali" not in family.__name__ and "gemma_" not in family.__name__
    found = plan(family, family, image_tokens=0 if text else 8)
    assert found.student_parameters == family().count_params()
    assert all(size > 0 for size in found.parts.values())


def test_nothing_is_allocated():
    wide = SHAPE | dict(hidden_dim=2**16, intermediate_dim=2**21)

    def teacher():
        return keras_hub.models.PaliGemmaBackbone(**wide)

    found = plan(teacher, mesh_shape=(1, 8), memory=80e9)
    assert found.teacher_parameters > 4e11  # 0.8 TB in bfloat16.
    assert not found.fits
    before = keras.config.dtype_policy().name
    assert before == "float32"


def test_the_table():
    text = str(plan(mesh_shape=(1, 2), memory=1e9))
    assert "1 x 2 devices" in text and text.endswith("fits in 1 GB")
    assert "total" in text
    assert memory_plan.MemoryPlan.__repr__ is memory_plan.MemoryPlan.__str__


@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Only JAX reports a compiled program's memory.",
)
def test_total_is_near_what_a_compiled_step_takes():
    import jax

    images, text = 31, 16
    shape = SHAPE | dict(
        vocabulary_size=4096, num_layers=4, hidden_dim=256, head_dim=64
    )
    shape |= dict(intermediate_dim=4096, num_query_heads=2)
    backbones = [keras_hub.models.PaliGemmaBackbone(**shape) for _ in range(2)]
    planned = keras_laid.plan(
        *backbones, image_tokens=4 * images, text_tokens=text, batch_size=4
    )
    models = [keras_laid.MultiImagePaliGemmaCausalLM(b) for b in backbones]
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        *models,
        terms=make_terms(teacher_heads=[(2, 0)]),
        distance_weighting=keras_laid.DistanceWeighting(steps=1),
    )
    distiller.compile(keras.optimizers.AdamW(1e-4), rematerialize=True)
    distiller.optimizer.build(distiller.trainable_variables)
    inputs = dict.fromkeys(
        ("token_ids", "padding_mask", "response_mask"),
        np.ones((4, text), "int32"),
    )
    inputs["images"] = np.zeros((4, images, 16, 16, 3), "float32")
    labels = inputs["token_ids"]
    state = [
        [variable.value for variable in variables]
        for variables in (
            distiller.trainable_variables,
            distiller.non_trainable_variables,
            distiller.optimizer.variables,
            distiller.metrics_variables,
        )
    ]
    step = jax.jit(distiller.train_step, donate_argnums=0)
    memory = step.lower(state, (inputs, labels)).compile().memory_analysis()
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert 0.7 * taken < planned.total < 1.3 * taken
