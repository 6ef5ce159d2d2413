"""Properties of every model family, checked with small models."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import DistanceWeighting
from keras_laid import attach_gain_modulation
from keras_laid import fold_gain_modulation
from keras_laid import rotary_positions
from keras_laid.backbones import attention_layers
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import attention_mask
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.attention_capture import text_rows
from keras_laid.ops.attention import log_attention
from tests.backbones import small_models
from tests.backbones.small_models import EACH_CALLED
from tests.backbones.small_models import EACH_COMPILED
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import FEW_STEPS
from tests.support import NO_XLA
from tests.support import make_terms
from tests.support import to_numpy


def outputs_of(model, inputs=None):
    return to_numpy(model(make_inputs(model) if inputs is None else inputs))


def randomize(gains):
    rng = np.random.default_rng(3)
    for gain in gains:
        gain.log_gain.assign(rng.normal(size=gain.log_gain.shape))


@EACH_COMPILED
@pytest.mark.parametrize("per_head", [False, True])
def test_fresh_gains_change_no_bit(family, per_head):
    model = make_model(family)
    plain = outputs_of(model)
    gains = attach_gain_modulation(model, per_head=per_head)
    layers = attention_layers(model)
    assert len(gains) == sum(layer.kind == "global" for layer in layers)
    np.testing.assert_array_equal(outputs_of(model), plain)
    randomize(gains)
    assert np.abs(outputs_of(model) - plain).max() > 1e-3


@EACH_COMPILED
def test_each_frequency_of_the_logits_is_multiplied_by_its_gain(family):
    model = make_model(family)
    index = decoder.global_layers(model)[0]
    inputs = make_inputs(model)

    def logits():
        with captured_attention(model, [index]) as captured:
            model(inputs)
        return to_numpy(captured[index]._replace(soft_cap=None).logits())

    plain = logits()
    (gain,) = attach_gain_modulation(model, [index], max_gain=10.0)
    count = gain.log_gain.shape[0]
    assert count == attention_layers(model)[index].rotary_dim // 2
    # Logits are linear in the gains, one part for each frequency.
    changes = 0.0
    for frequency in range(count):
        one = np.zeros(count, "float32")
        one[frequency] = 1.0
        gain.log_gain.assign(one)
        gained = to_numpy(gain.gains())[frequency]
        part = (logits() - plain) / (gained - 1.0)
        assert np.abs(part).max() > 1e-3
        changes = changes + part
    gain.log_gain.assign(np.full(count, 0.5))
    gained = to_numpy(gain.gains())[0]
    expected = plain + (gained - 1.0) * changes
    np.testing.assert_allclose(logits(), expected, atol=2e-4)


@EACH_COMPILED
def test_folding_keeps_the_outputs(family):
    model = make_model(family)
    plain_class = type(model.backbone)
    randomize(attach_gain_modulation(model))
    gained = outputs_of(model)
    fold_gain_modulation(model)
    assert type(model.backbone) is plain_class
    folded = outputs_of(model)
    scale = np.abs(gained).max()
    np.testing.assert_allclose(folded, gained, atol=1e-4 * scale)


@EACH_COMPILED
def test_gains_of_heads_fold_into_kernels_alone(family):
    model = make_model(family)
    randomize(attach_gain_modulation(model, per_head=True))
    gained = outputs_of(model)
    layer = attention_layers(model)[decoder.global_layers(model)[0]]
    if layer.norm_offset is None:
        fold_gain_modulation(model)
    else:
        with pytest.raises(ValueError, match="scale of a norm.*num_heads=4"):
            fold_gain_modulation(model)
    np.testing.assert_allclose(outputs_of(model), gained, atol=1e-4)


@pytest.mark.extra_large_but_on("jax", "torch")
@EACH_CALLED
def test_models_with_gains_and_folded_ones_can_be_saved(family, tmp_path):
    backbone = make_model(family).backbone
    inputs = make_inputs(make_model(family))
    randomize(attach_gain_modulation(backbone))
    gained = to_numpy(backbone(inputs))
    backbone.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(loaded(inputs)), gained, atol=1e-5)
    fold_gain_modulation(loaded)
    loaded.save_to_preset(str(tmp_path / "preset"))
    again = type(loaded).from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(to_numpy(again(inputs)), gained, atol=1e-4)


@pytest.mark.parametrize(
    "family",
    [*small_models.families("torch"), small_models.mistral_sliding],
    ids=small_models.name_of,
)
def test_captured_attention_is_what_the_layer_computes(family):
    model = make_model(family)
    plain = outputs_of(model)
    inputs = make_inputs(model)
    layers = [
        layer
        for layer in attention_layers(model)
        if layer.kind == "global"
        # Gemma 4's windows end where an image does.
        or (layer.kind == "local" and family is not small_models.gemma_4)
    ]
    computed = {}
    for layer in layers:
        spy_on(layer, computed)
    with captured_attention(model, [each.index for each in layers]) as captured:
        np.testing.assert_array_equal(to_numpy(model(inputs)), plain)
    for layer in layers:
        attention = captured[layer.index]
        length = attention.key.shape[1]
        assert attention.query.shape[2] == layer.num_query_heads
        assert attention.key.shape[2] == layer.num_key_value_heads
        mask = attention_mask(model, inputs, length, np.arange(length))
        allowed = mask._replace(window=layer.window).allowed()
        maps = to_numpy(ops.exp(log_attention(attention, allowed)))
        value, output = computed[layer.index]
        value = np.repeat(value, maps.shape[1] // value.shape[2], axis=2)
        found = np.einsum("bhts,bshd->bthd", maps, value)
        rows = to_numpy(ops.any(allowed, axis=-1))[:, 0].astype(bool)
        np.testing.assert_allclose(found[rows], output[rows], atol=1e-5)


def spy_on(layer, computed):
    compute_attention = layer.layer._compute_attention

    def compute_and_keep(query, key, value, *args, **kwargs):
        output = compute_attention(query, key, value, *args, **kwargs)
        computed[layer.index] = to_numpy(value), to_numpy(output)
        return output

    vars(layer.layer)["_compute_attention"] = compute_and_keep


def generate(model, inputs, prompt):
    padding_mask = np.tile(np.arange(small_models.LENGTH) < prompt, (2, 1))
    prompts = dict(
        inputs,
        token_ids=inputs["token_ids"] * padding_mask,
        padding_mask=padding_mask,
    )
    prompts.pop("response_mask", None)
    return model.generate(prompts, stop_token_ids=None)["token_ids"]


@pytest.mark.extra_large_but_on("jax")
@EACH_COMPILED
def test_generation_with_a_cache_is_that_without(family):
    changes = {}
    if family is small_models.gemma_4:
        # KerasHub ignores this option with a cache.
        changes["use_vision_bidirectional_attention"] = False
    model = make_model(family, **changes)
    model.compile(sampler="greedy", **NO_XLA)
    inputs = make_inputs(model)
    prompt = 11  # After the images.
    randomize(attach_gain_modulation(model))
    tokens = generate(model, inputs, prompt)
    if family is not small_models.qwen_3_5:
        # KerasHub runs its linear layers over the padding of a prompt.
        inputs["padding_mask"] = np.ones_like(tokens)
        if "response_mask" in inputs:
            after = np.arange(small_models.LENGTH) >= prompt
            inputs["response_mask"] = np.tile(after, (2, 1)) * 1
        logits = outputs_of(model, dict(inputs, token_ids=tokens))
        np.testing.assert_array_equal(
            logits[:, prompt - 1 : -1].argmax(-1), tokens[:, prompt:]
        )
    fold_gain_modulation(model)
    np.testing.assert_array_equal(generate(model, inputs, prompt), tokens)


@EACH_COMPILED
def test_positions_given_take_the_place_of_the_models_own(family):
    model = make_model(family)
    randomize(attach_gain_modulation(model))  # Gains commute with rotation.
    inputs = make_inputs(model)
    plain = outputs_of(model, inputs)
    length = small_models.LENGTH
    if family in (small_models.pali_gemma, small_models.pali_gemma_2):
        length += model.backbone.image_sequence_length
    own = np.arange(length)
    with rotary_positions(model, own):
        np.testing.assert_allclose(outputs_of(model, inputs), plain, atol=1e-5)
    # Only differences between positions count.
    with rotary_positions(model, own + 7):
        np.testing.assert_allclose(outputs_of(model, inputs), plain, atol=2e-4)
    with rotary_positions(model, 3 * own):
        assert np.abs(outputs_of(model, inputs) - plain).max() > 1e-2
    if family is small_models.phi_3:
        with pytest.raises(ValueError, match="one set of positions"):
            with rotary_positions(model, np.tile(own, (2, 1))):
                pass
    else:
        with rotary_positions(model, np.stack([own, 3 * own])):
            mixed = outputs_of(model, inputs)
        np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)
        assert np.abs(mixed[1] - plain[1]).max() > 1e-2
    np.testing.assert_array_equal(outputs_of(model, inputs), plain)


@EACH_COMPILED
def test_one_step_reaches_every_weight(family):
    student = make_model(family)
    attach_gain_modulation(student)
    distiller = DistanceWeightedAttentionDistillation(
        teacher=make_model(family, seed=5, **small_models.LARGER),
        student=student,
        distance_weighting=DistanceWeighting(schedule="constant"),
        terms=make_terms(attention_weight=1.0, query_key_weight=1.0),
    )
    distiller.compile(keras.optimizers.SGD(3.0), **FEW_STEPS)
    inputs = make_inputs(student)
    before = [to_numpy(v) for v in distiller.trainable_variables]
    labels = np.random.default_rng(2).integers(0, 24, inputs["token_ids"].shape)
    distiller.fit(
        inputs, labels, sample_weight=inputs["padding_mask"], verbose=0
    )
    for variable, old in zip(
        distiller.trainable_variables, before, strict=True
    ):
        new = to_numpy(variable)
        assert np.isfinite(new).all(), variable.path
        assert (new != old).any(), variable.path
    names = [variable.path for variable in distiller.trainable_variables]
    assert any("log_gain" in name for name in names)
    assert any("mixer" in name for name in names)


@pytest.mark.parametrize(
    "teacher, student",
    [
        pytest.param(
            *(small_models.llama, small_models.qwen_3),
            marks=pytest.mark.extra_large_but_on("tensorflow", "torch"),
        ),
        pytest.param(
            *(small_models.qwen, small_models.phi_3),
            marks=pytest.mark.extra_large_but_on("torch"),
        ),
        pytest.param(
            *(small_models.mistral, small_models.gemma_2),
            marks=pytest.mark.extra_large_but_on("torch"),
        ),
    ],
)
def test_a_teacher_of_another_family(teacher, student):
    teacher = make_model(teacher, seed=5, **small_models.LARGER)
    student = make_model(student)
    distiller = DistanceWeightedAttentionDistillation(
        teacher,
        student,
        terms=make_terms(
            attention_weight=1.0,
            teacher_heads=[(1, 0), (1, 5)],
            num_segments=2,
        ),
        distance_weighting=DistanceWeighting(steps=1),
    )
    distiller.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    before = outputs_of(student)
    inputs = make_inputs(student)
    segments = np.repeat([1, 2, 0], [5, 5, small_models.LENGTH - 10])
    inputs["segments"] = np.tile(segments, (2, 1))
    logs = distiller.train_on_batch(
        inputs,
        inputs["token_ids"],
        inputs["padding_mask"],
        return_dict=True,
    )
    assert logs["attention"] > 0 and logs["retrieval"] > 0
    assert np.isfinite(logs["loss"])
    assert np.abs(outputs_of(student) - before).max() > 1e-3
    with pytest.raises(ValueError, match="needs models of one family"):
        DistanceWeightedAttentionDistillation(
            teacher, student, terms=make_terms(query_key_weight=0.1)
        )


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_multi_dimensional_positions():
    model = make_model(small_models.qwen_3_5)
    inputs = make_inputs(model)
    plain = outputs_of(model, inputs)
    own = np.tile(np.arange(small_models.LENGTH), (2, 4, 1))
    with rotary_positions(model, own):
        np.testing.assert_allclose(outputs_of(model, inputs), plain, atol=1e-5)
    for channel in (1, 2, 3):  # Time, height and width.
        positions = own.copy()
        positions[1, channel] *= 3
        with rotary_positions(model, positions):
            moved = outputs_of(model, inputs)
        np.testing.assert_allclose(moved[0], plain[0], atol=1e-5)
        assert np.abs(moved[1] - plain[1]).max() > 1e-3
    with pytest.raises(ValueError, match="M-RoPE.*Received.*layer 0"):
        with rotary_positions(make_model(small_models.llama), own):
            pass


def test_text_rows_are_all_but_images():
    model = make_model(small_models.gemma_3)
    rows = to_numpy(text_rows(make_inputs(model)))
    np.testing.assert_array_equal(
        rows, np.tile(small_models.IS_IMAGE == 0, (2, 1))
    )
    # Qwen 3.5's indices count through the tokens of the whole batch.
    inputs = {"token_ids": np.zeros((2, 4)), "vision_indices": [1, 2, 7]}
    rows = to_numpy(text_rows(inputs))
    np.testing.assert_array_equal(rows, [[1, 0, 0, 1], [1, 1, 1, 0]])
