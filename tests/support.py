"""Shared by tests: small models, gradients, and closeness across dtypes."""

import gc
import inspect
import io
import json

import keras
import keras_hub
import numpy as np
import sentencepiece
from keras import ops
from PIL import Image

from keras_laid import Digits
from keras_laid import Haystacks
from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid.backbones import attention_layers
from keras_laid.distillation import AttentionMatching
from keras_laid.distillation import NextTokens
from keras_laid.distillation import RetrievalMatching
from keras_laid.haystacks.dataset import question
from keras_laid.haystacks.digits import NAMES

PALI_GEMMA = dict(
    image_size=16,
    num_layers=2,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=16,
    intermediate_dim=24,
    head_dim=8,
    vit_patch_size=8,
    vit_num_heads=2,
    vit_hidden_dim=8,
    vit_num_layers=1,
    vit_intermediate_dim=8,
)
# Every feature of PaliGemma 2: soft caps, sliding windows, more norms.
PALI_GEMMA_2 = dict(
    PALI_GEMMA,
    num_layers=4,
    num_query_heads=4,
    num_key_value_heads=2,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    attention_logit_soft_cap=50,
    final_logit_soft_cap=30,
    use_sliding_window_attention=True,
    sliding_window_size=6,
)


# For `compile`. TensorFlow takes longer to trace a step than to take it, and
# XLA still longer to compile it.
FEW_STEPS = dict(run_eagerly=keras.backend.backend() == "tensorflow")
NO_XLA = dict(jit_compile=keras.backend.backend() == "jax")


class Batches(keras.utils.PyDataset):
    """The same batches in every epoch."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def make_terms(
    retrieval_weight=1.0,
    attention_weight=0.0,
    query_key_weight=0.0,
    logits_weight=1.0,
    supervised_weight=1.0,
    **settings,
):
    """All terms of the loss; each setting goes to the term that takes it."""
    terms = []
    for kind, *weights in (
        (RetrievalMatching, retrieval_weight),
        (AttentionMatching, attention_weight, query_key_weight),
        (NextTokens, logits_weight, supervised_weight),
    ):
        names = {*inspect.signature(kind).parameters} & {*settings}
        terms.append(kind(*weights, **{n: settings.pop(n) for n in names}))
    assert not settings, settings
    return terms


def sentence_piece(sentences, **kwargs):
    """The bytes of a SentencePiece model; `kwargs` go to its trainer."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=proto,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        minloglevel=2,
        **kwargs,
    )
    return proto.getvalue()


def make_preprocessor(**kwargs):
    """A preprocessor; `kwargs` go to the trainer of its tokenizer."""
    sentences = [question(a, b) for a in NAMES for b in NAMES] + ["yes", "no"]
    proto = sentence_piece(
        sentences, model_type="word", character_coverage=1.0, **kwargs
    )
    return keras_hub.models.PaliGemmaCausalLMPreprocessor(
        keras_hub.models.PaliGemmaTokenizer(proto=proto),
        keras_hub.layers.PaliGemmaImageConverter(scale=1 / 127.5, offset=-1.0),
        sequence_length=14,
    )


def make_pali_gemma(config=None, preprocessor=None, seed=0, **kwargs):
    """A `PaliGemmaCausalLM` with the same weights on every backend."""
    config = dict(config or PALI_GEMMA, **kwargs)
    if preprocessor is not None:
        config["vocabulary_size"] = preprocessor.tokenizer.vocabulary_size()
    config.setdefault("vocabulary_size", 40)
    backbone = keras_hub.models.PaliGemmaBackbone(**config)
    rng = np.random.default_rng(seed)
    for variable in backbone.trainable_variables:
        if len(variable.shape) > 1:
            fan_in = np.prod(variable.shape[:-1])
            scale = 1.5 / np.sqrt(min(fan_in, 64))
            variable.assign(scale * rng.standard_normal(variable.shape))
    return keras_hub.models.PaliGemmaCausalLM(
        backbone=backbone, preprocessor=preprocessor
    )


def make_multi_image(config=None, preprocessor=None, seed=0, **kwargs):
    return MultiImagePaliGemmaCausalLM.from_causal_lm(
        make_pali_gemma(config, preprocessor, seed, **kwargs)
    )


def attention_of(model):
    """The Keras layers that compute the attention, first to last."""
    return [layer.layer for layer in attention_layers(model)]


def make_haystacks(preprocessor, num_questions=8, sizes=(2, 3), **kwargs):
    kwargs.setdefault("batch_size", 4)
    return Haystacks(
        Digits("train"), preprocessor, num_questions, sizes, **kwargs
    )


def quantize(model, mode):
    """`model.quantize(mode)`, for which Keras collects garbage many times."""
    gc.freeze()  # Skips the objects that other tests have left.
    model.quantize(mode)


def has_gpu():
    """Whether the backend has a GPU that this library has kernels for."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "gpu"
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.is_available()
    return False


def to_numpy(x):
    """A tensor as a float32 array; NumPy arrays are returned as they are."""
    if not isinstance(x, np.ndarray):
        x = ops.convert_to_numpy(ops.cast(x, "float32"))
    return x


def called_inside(function, dtype):
    """Calls a function inside the call of a layer with a dtype policy."""

    class Outer(keras.layers.Layer):
        def call(self, x):
            return function()

    return Outer(dtype=dtype)(np.zeros((1, 1), "float32"))


def value_and_grads(function, *arrays):
    """`function(*arrays)`, a scalar, and its gradient for each array."""
    if keras.backend.backend() == "jax":
        import jax

        argnums = tuple(range(len(arrays)))
        return jax.jit(jax.value_and_grad(function, argnums))(*arrays)
    if keras.backend.backend() == "torch":
        arrays = [a.detach().clone().requires_grad_() for a in arrays]
        value = function(*arrays)
        value.backward()
        return value.detach(), tuple(a.grad for a in arrays)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(arrays)
        value = function(*arrays)
    return value, tuple(tape.gradient(value, arrays))


class GradientRecorder(keras.optimizers.Optimizer):
    """Keeps the gradients of a step, in float32, and moves no variable."""

    def __init__(self):
        super().__init__(learning_rate=0.0)

    def build(self, variables):
        super().build(variables)
        self.gradients = [
            self.add_variable(
                each.shape, dtype="float32", name=f"gradient_{number}"
            )
            for number, each in enumerate(variables)
        ]

    def update_step(self, gradient, variable, learning_rate):
        kept = self.gradients[self._get_variable_index(variable)]
        self.assign(kept, ops.cast(gradient, "float32"))


def gradients_of(distiller, batch, scale=None, **kwargs):
    """Gradients of one step by path; `scale` replaces the loss scale."""
    recorder = optimizer = GradientRecorder()
    if scale is not None:
        optimizer = keras.optimizers.LossScaleOptimizer(recorder, scale)
    distiller.compile(optimizer, **FEW_STEPS, **kwargs)
    distiller.train_on_batch(*batch)
    gradients = map(to_numpy, recorder.gradients)
    paths = [each.path for each in distiller.trainable_variables]
    return dict(zip(paths, gradients, strict=True))


def cosine(some, others):
    """Cosine similarity of two dictionaries of arrays with the same names."""
    one, other = (
        np.concatenate([each[name].ravel() for name in sorted(each)])
        for each in (some, others)
    )
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


# The largest relative change of a number by one rounding.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def assert_as_good_as(fast, plain, exact, name, factor=2.0, terms=0.0):
    """Bounds the error of `fast` by `factor` times the error of `plain`.

    `fast` and `plain` have the same dtype, and `exact` has a wider one, so the
    bound follows the dtype. Where the error of `plain` is near 0, a floor
    remains: a share of the largest number, or of `terms`, the size of the
    summed numbers. Few numbers in `plain` may be exact by luck, so its error
    counts as one rounding of the largest number or more.
    """
    dtype = keras.backend.standardize_dtype(plain.dtype)
    fast, plain, exact = (
        to_numpy(x).astype("float64") for x in (fast, plain, exact)
    )
    assert np.isfinite(fast).all(), f"{name}: not finite"
    largest = np.abs(exact).max()
    plain_error = np.abs(plain - exact).max()
    plain_error = max(plain_error, ROUNDING.get(dtype, 0.0) * largest)
    # Float32 sums over hundreds of terms differ with their order.
    allowed = factor * plain_error + 2e-6 * max(largest, terms)
    found = np.abs(fast - exact).max()
    assert found <= allowed, f"{name}: {found:.3g} > {allowed:.3g}"


# Objects in ten photographs. A question file asks about the last training one.
COCO = {
    "train2017": [{"dog", "cat"}, {"dog"}, {"bus"}, {"cat", "bus"}],
    "val2017": [{"dog", "cat"}] * 2 + [{"dog"}] * 2 + [{"bus"}, {"cat", "bus"}],
}


def coco_entry(**changes):
    """An entry of a question file about the photographs of `make_coco`."""
    entry = {
        "conversations": [
            {
                "from": "human",
                "value": "For the image with a cat, is there a bus?",
            },
            {"from": "gpt", "value": "yes"},
        ],
        "id": "VKJ5QTnAcX",
        "pos_image": ["train2017/000000000003.jpg"],
        "neg_image": [],
        "needle": "a cat",
        "target": "a bus",
    }
    return {**entry, **changes}


def make_coco(root):
    """Writes a COCO 2017 root of ten small JPEGs, with a question file."""
    rng = np.random.default_rng(0)
    ids = {"dog": 18, "cat": 17, "bus": 6}
    for folder in ("annotations", "questions/single_needle", *COCO):
        (root / folder).mkdir(parents=True)
    for folder, shown in COCO.items():
        data = {
            "info": {"year": 2017},
            "categories": [
                {"supercategory": "thing", "id": number, "name": name}
                for name, number in ids.items()
            ],
            "images": [
                {"id": i, "file_name": f"{i:012}.jpg", "height": 24}
                for i in range(len(shown))
            ],
            "annotations": [
                {"image_id": i, "category_id": ids[name], "iscrowd": 0}
                for i, names in enumerate(shown)
                for name in sorted(names)
            ],
        }
        path = root / "annotations" / f"instances_{folder}.json"
        path.write_text(json.dumps(data))
        for image in data["images"]:
            pixels = rng.integers(256, size=(24, 32, 3)).astype("uint8")
            path = root / folder / image["file_name"]
            Image.fromarray(pixels).save(path)
    path = root / "questions/single_needle/visual_haystack_oracle.json"
    path.write_text(json.dumps([coco_entry()]))
