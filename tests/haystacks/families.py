"""Small preprocessors of several families, and models for them."""

import keras_hub

import keras_laid
from tests.backbones import small_models
from tests.support import make_preprocessor
from tests.support import sentence_piece

GEMMA_3_TOKENS = [
    "<start_of_image>",
    "<end_of_image>",
    "<img>",
    "<start_of_turn>",
    "<end_of_turn>",
    "\n\n",
]
GEMMA_4_TOKENS = ["<|image>", "<|image|>", "<image|>"]
QWEN_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
COLOURS = ["red", "green", "blue", "white", "black", "pink", "grey", "brown"]


def train_tokenizer(symbols):
    sentences = [f"Is there a {c} page among these? yes no" for c in COLOURS]
    sentences += ["Yes", "No"]
    return sentence_piece(
        sentences * 20,
        model_type="bpe",
        vocab_size=95,
        user_defined_symbols=symbols,
    )


def gemma_3():
    return keras_hub.models.Gemma3CausalLMPreprocessor(
        tokenizer=keras_hub.models.Gemma3Tokenizer(
            proto=train_tokenizer(GEMMA_3_TOKENS)
        ),
        image_converter=keras_hub.layers.Gemma3ImageConverter(
            image_size=(16, 16), scale=1 / 127.5, offset=-1.0
        ),
        num_vision_tokens_per_image=4,
    )


def gemma_4():
    return keras_hub.models.Gemma4CausalLMPreprocessor(
        tokenizer=keras_hub.models.Gemma4Tokenizer(
            proto=train_tokenizer(GEMMA_4_TOKENS), has_video_tokens=False
        ),
        image_converter=keras_hub.layers.Gemma4ImageConverter(
            patch_size=4,
            max_soft_tokens=4,
            pooling_kernel_size=2,
            scale=1 / 255,
        ),
        num_vision_tokens_per_image=4,
        audio_input_feat_size=0,
    )


def qwen_3_5_images():
    """Words of a byte-level vocabulary, merged letter by letter."""
    words = f"Is there a page among these? yes no Yes No {' '.join(COLOURS)}"
    words = [word for each in words.split() for word in (each, f"Ġ{each}")]
    merges = [f"{w[:i]} {w[i]}" for w in words for i in range(1, len(w))]
    tokens = [chr(letter) for letter in range(33, 127)] + ["Ġ", "Ċ"]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens = ["<|endoftext|>", *dict.fromkeys(tokens), *QWEN_TOKENS]
    return keras_hub.models.Qwen3_5CausalLMPreprocessor(
        tokenizer=keras_hub.models.Qwen3_5Tokenizer(
            vocabulary={token: i for i, token in enumerate(tokens)},
            merges=list(dict.fromkeys(merges)),
        ),
        image_converter=keras_hub.layers.Qwen3_5ImageConverter(
            patch_size=4,
            min_pixels=16 * 16,
            max_pixels=64 * 64,
            scale=1 / 127.5,
            offset=-1.0,
        ),
    )


def llama():
    class Tokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
        def __init__(self, **kwargs):
            self._add_special_token("<bos>", "start_token")
            self._add_special_token("<eos>", "end_token")
            self._add_special_token("<pad>", "pad_token")
            super().__init__(**kwargs)

    return keras_hub.models.CausalLMPreprocessor(
        tokenizer=Tokenizer(proto=train_tokenizer(["\n\n"]))
    )


def pali_gemma():
    return keras_hub.models.PaliGemmaCausalLMPreprocessor(
        tokenizer=make_preprocessor().tokenizer,
        image_converter=keras_hub.layers.PaliGemmaImageConverter(
            image_size=(16, 16), scale=1 / 127.5, offset=-1.0
        ),
    )


PREPROCESSORS = {
    small_models.pali_gemma: pali_gemma,
    small_models.gemma_3: gemma_3,
    small_models.gemma_4: gemma_4,
    small_models.qwen_3_5_images: qwen_3_5_images,
    small_models.llama: llama,
}


def make_pair(family, preprocessor):
    vocabulary = preprocessor.tokenizer.vocabulary_size()
    models = [
        small_models.make_model(family, seed, vocabulary_size=vocabulary)
        for seed in (5, 0)
    ]
    if family is small_models.pali_gemma:
        several = keras_laid.MultiImagePaliGemmaCausalLM
        models = [several(model.backbone) for model in models]
    return models
