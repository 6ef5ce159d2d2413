"""Gradients of a student in any number format, against those of float32."""

import keras
import numpy as np
import pytest

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import DistanceWeighting
from keras_laid import attach_gain_modulation
from tests.backbones import small_models
from tests.backbones.small_models import LENGTH
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import cosine
from tests.support import gradients_of
from tests.support import has_gpu
from tests.support import make_terms
from tests.support import quantize
from tests.support import to_numpy

# Dtype, quantisation, whether LoRA is enabled, and the least cosine.
FORMATS = {
    "bfloat16": ("bfloat16", None, False, 0.95),
    "mixed_float16": ("mixed_float16", None, False, 0.95),
    # Float8 gradients have two bits after the point.
    "float8": ("float32", "float8", False, 0.7),
    "LoRA": ("float32", None, True, 0.999),
    "int8 and LoRA": ("float32", "int8", True, 0.95),
    "int4 and LoRA": ("float32", "int4", True, 0.8),
}
# On CPUs, JAX lacks the float16 products in the attention of other families.
FLOAT16_ON_JAX = (
    small_models.pali_gemma,
    small_models.pali_gemma_2,
    small_models.gemma_2,
    small_models.gemma_3,
    small_models.gemma_4,
)


def make_distiller(
    family, dtype="float32", quantization=None, lora=False, **kwargs
):
    """A distiller of gains, and of all weights or low-rank adapters."""
    student = make_model(family, dtype=dtype)
    for variable in student.backbone.trainable_variables:
        if len(variable.shape) > 1:
            # Else int4's rounding would change where sharp attention looks.
            variable.assign(variable / 3)
    if quantization:
        quantize(student, quantization)
    if lora:
        student.backbone.enable_lora(2)
        rng = np.random.default_rng(3)
        for a, _, _ in adapters(student):
            a.assign(rng.normal(size=a.shape) / 4)
    attach_gain_modulation(student)
    return DistanceWeightedAttentionDistillation(
        teacher=make_model(family, seed=5, **small_models.LARGER),
        student=student,
        distance_weighting=DistanceWeighting(schedule="constant"),
        terms=make_terms(
            attention_weight=1.0,
            query_key_weight=0.01,
            teacher_heads=[(-1, 0)],
            num_segments=2,
        ),
        **kwargs,
    )


def formats_of(family):
    """Names in `FORMATS` that a family supports on this backend."""
    left_out = set()
    if (
        family is not small_models.gemma_2
        or keras.backend.backend() == "tensorflow"
    ):
        # Keras's own float8 layers raise in an eager step of TensorFlow.
        left_out.add("float8")
    if family is small_models.gemma_4:
        # KerasHub's blocks multiply by the integers without their scale.
        left_out |= {"int8 and LoRA", "int4 and LoRA"}
    if family is small_models.qwen_3_5:
        # Gradients of KerasHub's linear attention are not finite in float16
        # where its inputs are small.
        left_out.add("mixed_float16")
    on_jax = keras.backend.backend() == "jax" and not has_gpu()
    if on_jax and family not in FLOAT16_ON_JAX:
        left_out.add("mixed_float16")
    return [name for name in FORMATS if name not in left_out]


def adapters(student):
    """LoRA's two factors and the path of the kernel, for each layer."""
    for layer in student.backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            a, b = layer.lora_kernel_a, layer.lora_kernel_b
            yield a, b, a.path.replace("lora_kernel_a", "kernel")


def make_batch(student):
    inputs = make_inputs(student)
    if not {"images", "pixel_values"} & {*inputs}:
        segments = np.repeat([1, 2, 0], [5, 5, LENGTH - 10])
        inputs["segments"] = np.tile(segments, (2, 1))
    return inputs, inputs["token_ids"], inputs["padding_mask"]


def gradients_in(family, *form, **kwargs):
    """Gradients of the student by path, and the student."""
    distiller = make_distiller(family, *form)
    student = distiller.student
    # At the default loss scale, 2 ** 15, the first steps would only lower it.
    found = gradients_of(distiller, make_batch(student), scale=2.0**8, **kwargs)
    trained = {each.path for each in student.trainable_variables}
    return {k: found[k] for k in found if k in trained}, student


def for_adapters(gradients, student):
    """Gradients of the factors `b`, by the chain rule from those of kernels.

    The gradient of the factor `a` is 0 at first, because `b` is 0.
    """
    found = {k: v for k, v in gradients.items() if k.endswith("log_gain")}
    for a, b, kernel in adapters(student):
        a = to_numpy(a).reshape(-1, 2)
        gradient = gradients[kernel].reshape(len(a), -1)
        found[b.path] = (a.T @ gradient).reshape(b.shape)
    return found


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_int8_and_low_rank_adapters():
    check(small_models.llama, ["int8 and LoRA"])


@pytest.mark.extra_large
@small_models.EACH
def test_gradients_are_those_of_float32(family):
    check(family, formats_of(family))


def check(family, names):
    exact, _ = gradients_in(family)
    table = {}
    for name in names:
        *form, least = FORMATS[name]
        found, student = gradients_in(family, *form)
        expected = exact
        if form[2]:
            expected = for_adapters(exact, student)
        found = {path: found[path] for path in expected}
        table[name] = cosine(found, expected), least
    for name, (found, least) in table.items():
        assert found >= least, (name, table)


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize("family", small_models.FEW, ids=small_models.name_of)
def test_int4_gradients_are_derivatives_of_the_loss(family):
    # Slopes are those of the loss with rounded weights, as gradients are.
    distiller = make_distiller(family, *FORMATS["int4 and LoRA"][:3])
    batch = make_batch(distiller.student)
    gradients = gradients_of(distiller, batch, scale=2.0**8)
    factors = [b for _, b, _ in adapters(distiller.student)]
    norm = np.sqrt(sum((gradients[b.path] ** 2).sum() for b in factors))
    step = 1e-2
    losses = []
    for sign in (1, -1):
        for b in factors:  # They are 0 at first.
            b.assign(sign * step / norm * gradients[b.path])
        logs = distiller.test_on_batch(*batch, return_dict=True)
        losses.append(float(logs["loss"]))
    slope = (losses[0] - losses[1]) / (2 * step)
    np.testing.assert_allclose(slope, norm, rtol=0.01)


@pytest.mark.extra_large
def test_int8_in_less_memory():
    form = FORMATS["int8 and LoRA"][:3]
    expected, _ = gradients_in(small_models.llama, *form)
    for name in ("rematerialize", "linear_memory"):
        found, _ = gradients_in(small_models.llama, *form, **{name: True})
        assert cosine(found, expected) > 0.9999, name
