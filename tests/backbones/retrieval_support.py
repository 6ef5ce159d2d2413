"""Retrieval heads in plain NumPy, float64, one example and row at a time."""

from typing import NamedTuple

import numpy as np
from keras_hub.models import Gemma3Backbone
from keras_hub.models import PaliGemmaBackbone

from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid import attach_gain_modulation
from keras_laid import rotary_positions
from keras_laid.backbones import attention_layers
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import captured_attention
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import to_numpy

STATISTICS = ("mass", "sharpness", "selectivity", "needle")
# A prompt without images: four segments with text around them.
TEXT_SEGMENTS = np.array([0, 1, 1, 2, 2, 2, 0, 3, 3, 4, 0, 0, 0, 0, 0, 0])


def prompts(family, model, batches=4):
    """Batches of two prompts with several segments each."""
    return [
        with_segments(family, make_inputs(model, seed=i))
        for i in range(batches)
    ]


def with_segments(family, inputs):
    """Inputs with segments: images of the model, or numbered tokens."""
    batch = len(inputs["token_ids"])
    if family in (small_models.pali_gemma, small_models.pali_gemma_2):
        # A single image: its tokens and the first text token make segments.
        numbers = [1, 1, 2, 2, 3] + [0] * (small_models.LENGTH - 1)
        return dict(inputs, segments=np.tile(numbers, (batch, 1)))
    if "vision_mask" in inputs:
        return inputs
    rolled = [np.roll(TEXT_SEGMENTS, index % 2) for index in range(batch)]
    return dict(inputs, segments=np.stack(rolled))


def numbers_of(inputs, length):
    """The segment of each of `length` keys, counted from 1."""
    if "segments" in inputs:
        return np.asarray(inputs["segments"])
    if "vision_mask" in inputs:
        runs = np.cumsum(np.diff(inputs["vision_mask"], prepend=0) > 0, axis=1)
        return runs * inputs["vision_mask"]
    batch, images = inputs["images"].shape[:2]
    text_numbers = np.zeros(inputs["token_ids"].shape[1], "int64")
    tokens = (length - len(text_numbers)) // images
    image_numbers = np.repeat(np.arange(images) + 1, tokens)
    return np.tile(np.concatenate([image_numbers, text_numbers]), (batch, 1))


def allowed_keys(model, inputs, length):
    """Boolean array of shape `(batch, rows, keys)`."""
    present = np.asarray(inputs["padding_mask"]).astype(bool)
    causal = np.tril(np.ones((length, length), bool))
    backbone = decoder.backbone_of(model)
    if isinstance(backbone, PaliGemmaBackbone):
        images = np.ones((len(present), length - present.shape[1]), bool)
        response = np.asarray(inputs["response_mask"]).astype(bool)
        prompt = np.concatenate([images, present & ~response], axis=1)
        response = np.concatenate([~images, response], axis=1)
        return prompt[:, None] | (response[:, None] & causal)
    if isinstance(backbone, Gemma3Backbone) and "vision_mask" in inputs:
        numbers = numbers_of(inputs, length)
        same = numbers[:, :, None] == numbers[:, None]
        causal = causal | (same & (numbers[:, None] > 0))
    return present[:, None] & causal


def maps_of(attention, allowed):
    """Attention maps of shape `(batch, heads, rows, keys)`."""
    query, key = (
        to_numpy(each).astype("float64")
        for each in (attention.query, attention.key)
    )
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = np.einsum("bihd,bjhd->bhij", query, key) * attention.scale
    if attention.soft_cap:
        logits = attention.soft_cap * np.tanh(logits / attention.soft_cap)
    logits = np.where(allowed[:, None], logits, -np.inf)
    largest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0.0))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


def capture(model, inputs):
    """Dictionary from each layer with full attention to its maps."""
    layers = decoder.global_layers(model)
    names = decoder.input_names(model)
    with (
        rotary_positions(model, inputs.get("positions")),
        captured_attention(model, layers) as captured,
    ):
        model({name: inputs[name] for name in names})
    length = captured[layers[0]].key.shape[1]
    allowed = allowed_keys(model, inputs, length)
    maps = {layer: maps_of(captured[layer], allowed) for layer in layers}
    return maps, allowed


def rows_of_kind(inputs, allowed, kind, sample_weight=None):
    """For each example, a list of the rows that count."""
    batch, length, _ = allowed.shape
    numbers = numbers_of(inputs, length)
    text_length = inputs["token_ids"].shape[1]
    first = length - text_length
    found = []
    for b in range(batch):
        seen_by_some = allowed[b].any(axis=0)
        segments = np.flatnonzero((numbers[b] > 0) & seen_by_some)
        # The last token of the last segment sees all, and is part of one.
        by_all = allowed[b][seen_by_some].all(axis=0)
        is_last = (numbers[b] > 0) & ~by_all
        rows = []
        for i in range(length):
            is_image = i < first or bool(
                "vision_mask" in inputs and inputs["vision_mask"][b][i]
            )
            if not seen_by_some[i] or is_image != (kind == "image"):
                continue
            if kind == "text":
                if is_last[i] or not allowed[b, i, segments].all():
                    continue
                marked = sample_weight is None or sample_weight[b, i - first :]
                if not np.any(marked):
                    continue
            rows.append(i)
        found.append(rows)
    return found


def sharpest(maps, numbers, rows):
    """Mass, sharpness and shares of segments in the row that retrieves most."""
    best = None
    count = numbers.max()
    for i in rows:
        shares = np.array(
            [maps[i, numbers == g].sum() for g in range(1, count + 1)]
        )
        mass = shares.sum()
        among = shares[shares > 0] / mass
        entropy = -(among * np.log(among)).sum()
        sharpness = 1 - entropy / np.log(len(among)) if len(among) > 1 else 0.0
        if best is None or mass * sharpness > best[0] * best[1]:
            best = (mass, sharpness, shares / mass)
    return best


class Example(NamedTuple):
    """Attention maps of one layer for one example, with segments and needle.

    Attributes:
        maps: Array of shape `(heads, rows, keys)`.
        numbers: Integer array of shape `(keys,)`, segments counted from 1.
        rows: List of integers, the rows that count.
        needle: Integer, the segment with the needle counted from 0, or `None`.
    """

    maps: np.ndarray
    numbers: np.ndarray
    rows: list
    needle: int | None


def examples(model, batches, kind="text", weights=None):
    """Dictionary from each layer with full attention to all `Example`s."""
    found = {}
    for inputs, weight in zip(
        batches, weights or [None] * len(batches), strict=True
    ):
        maps, allowed = capture(model, inputs)
        numbers = numbers_of(inputs, allowed.shape[1])
        rows = rows_of_kind(inputs, allowed, kind, weight)
        needle = inputs.get("needle", [None] * len(rows))
        for layer, layer_maps in maps.items():
            found.setdefault(layer, []).extend(
                map(Example, layer_maps, numbers, rows, needle)
            )
    return found


def statistics(examples):
    """`HeadStatistics` of one layer; examples without rows do not count."""
    used = [each for each in examples if each.rows and each.numbers.max() > 1]
    found = {name: [] for name in STATISTICS}
    for head in range(len(used[0].maps)):
        best = [
            sharpest(each.maps[head], each.numbers, each.rows) for each in used
        ]
        found["mass"].append(np.mean([mass for mass, _, _ in best]))
        found["sharpness"].append(np.mean([sharp for _, sharp, _ in best]))
        shares = [shares for _, _, shares in best]
        found["selectivity"].append(mutual_information(shares))
        scores = []
        for each, (mass, _, by_segment) in zip(used, best, strict=True):
            if each.needle is None or not 0 <= each.needle < len(by_segment):
                continue
            others = np.delete(by_segment, each.needle)
            scores.append(mass * (by_segment[each.needle] - others.mean()))
        found["needle"].append(np.mean(scores) if scores else np.nan)
    return {name: np.array(values) for name, values in found.items()}


def mutual_information(shares):
    """Mutual information of example and segment, as a share of its bound.

    Examples are compared only if they have equally many segments.
    """
    total = compared = 0
    for size in {len(each) for each in shares}:
        alike = [each for each in shares if len(each) == size]
        if len(alike) < 2:
            continue
        mean = np.mean(alike, axis=0)
        divergences = [
            sum(p * np.log(p / m) for p, m in zip(each, mean, strict=True) if p)
            for each in alike
        ]
        total += np.sum(divergences) / np.log(size)
        compared += len(alike)
    return total / compared if compared else np.nan


def plant(model, layer, head, gain=6.0):
    """Makes one head look sharply, whatever norm follows its projection."""
    (modulation,) = attach_gain_modulation(
        model, [layer], per_head=True, max_gain=gain
    )
    log_gain = np.zeros(modulation.log_gain.shape, "float32")
    log_gain[head] = 20.0
    modulation.log_gain.assign(log_gain)
    assert len(log_gain) == attention_layers(model)[layer].num_query_heads


def assert_statistics(found, examples, atol=1e-4):
    """Asserts statistics as in NumPy, and NaN in layers without examples."""
    expected = {layer: statistics(each) for layer, each in examples.items()}
    for name in STATISTICS:
        for layer, values in enumerate(getattr(found, name)):
            if layer not in expected:
                assert np.isnan(values).all(), (name, layer)
                continue
            np.testing.assert_allclose(
                values, expected[layer][name], atol=atol, err_msg=name
            )


def image_prompts(model, images=3, batches=2):
    """Batches of two prompts of several images, for PaliGemma."""
    found = []
    for seed in range(batches):
        rng = np.random.default_rng(seed)
        pixels = rng.normal(size=(2, images, 16, 16, 3)).astype("float32")
        inputs = make_inputs(model, seed=seed)
        found.append(dict(inputs, images=pixels))
    return found


def several_images():
    model = make_model(small_models.pali_gemma)
    return MultiImagePaliGemmaCausalLM.from_causal_lm(model)


def several_texts(batches=4):
    model = make_model(small_models.llama)
    return model, prompts(small_models.llama, model, batches)


def weights(batches, marked=(8, 13)):
    """Sample weights of each batch, with one marked token per example."""
    found = np.zeros((len(batches), 2, small_models.LENGTH), "float32")
    found[:, [0, 1], marked] = 0.5
    return list(found)
