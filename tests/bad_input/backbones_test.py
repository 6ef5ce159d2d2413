"""Wrong calls that read or change a KerasHub model, or plan for it.

Each refused call leaves the model unchanged.
"""

import types

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid.backbones import attention_layers
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.segments import segments_of
from keras_laid.backbones.without_heads import without_heads
from tests.backbones import small_models
from tests.bad_input.table import assert_refused
from tests.bad_input.table import refused
from tests.bad_input.table import unchanged
from tests.support import PALI_GEMMA_2
from tests.support import make_pali_gemma

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def given():
    """Models for the table: a plain one, and one with gains in layer 1."""
    plain = make_pali_gemma(PALI_GEMMA_2)
    gained = make_pali_gemma(PALI_GEMMA_2)
    keras_laid.attach_gain_modulation(gained, [1], per_head=True)
    gained.backbone.transformer_layers[1].attention.query_dense.enable_lora(2)
    return types.SimpleNamespace(
        plain=plain,
        gained=gained,
        several=MultiImagePaliGemmaCausalLM.from_causal_lm(plain),
        sliding=make_pali_gemma(PALI_GEMMA_2, num_layers=1),
    )


def yarn(model, **changes):
    arguments = dict(factor=2.0, original_length=64)
    with keras_laid.yarn(model, **arguments | changes):
        pass


def extend(model, **changes):
    arguments = dict(group_size=2, neighbor_window=4)
    with keras_laid.self_extend(model, **arguments | changes):
        pass


def linear(model, **changes):
    with keras_laid.linear_memory_attention(model, **changes):
        pass


def at(model, positions):
    with keras_laid.rotary_positions(model, positions):
        pass


def nested(outer, inner, model):
    """Calls `inner(model)` inside of the scope `outer(model)`."""
    with outer(model):
        inner(model)


def prompts(**changes):
    """Two prompts of two images and three tokens."""
    text = np.ones((2, 3), "int32")
    inputs = dict(
        images=np.zeros((2, 2, 16, 16, 3), "float32"),
        token_ids=text,
        padding_mask=text,
        response_mask=text,
    )
    return {k: v for k, v in (inputs | changes).items() if v is not None}


def run(model, scope=None, **changes):
    with keras_laid.rotary_positions(model, scope):
        return model(prompts(**changes))


def find(model, **changes):
    arguments = dict(data=[prompts()])
    return keras_laid.find_retrieval_heads(model, **arguments | changes)


def find_in(model, **changes):
    return find(model, data=[prompts(**changes)])


def silence(model, heads=((1, 2),)):
    with without_heads(model, heads):
        pass


def plan(model, **changes):
    arguments = dict(
        teacher=model, student=model, image_tokens=4, text_tokens=3
    )
    return keras_laid.plan(**arguments | changes)


ATTACH = keras_laid.attach_gain_modulation
FOLD = keras_laid.fold_gain_modulation
INTEGERS = [
    (yarn, "original_length", 0),
    (extend, "group_size", 0),
    (extend, "neighbor_window", -1),
    (plan, "image_tokens", -1),
    (plan, "text_tokens", 0),
    (plan, "batch_size", 0),
    (plan, "optimizer_slots", -1),
    (plan, "matched_layers", -1),
    (find, "batches", 0),
    (find, "num_segments", 0),
]
NUMBERS = [
    (yarn, "factor", (0.5, NAN, INFINITY)),
    (yarn, "beta_fast", (0.0, INFINITY)),
    (yarn, "beta_slow", (0.0, NAN)),
    (ATTACH, "max_gain", (1.0, NAN)),
    (plan, "memory", (-1.0, NAN)),
    (find, "threshold", (0.0, 1.5, NAN)),
]
MODELS = [
    ("yarn", yarn, "family must be known"),
    ("self_extend", extend, "family must be known"),
    ("linear memory", linear, "family must be known"),
    ("positions", lambda m: at(m, np.arange(3)), "family must be known"),
    ("attention_layers", attention_layers, "family must be known"),
    ("attach", ATTACH, "family must be known"),
    ("fold", FOLD, "family must be known"),
    ("retrieval heads", find, "family must be known"),
    ("without heads", silence, "family must be known"),
    ("several images", MultiImagePaliGemmaCausalLM, "must be a `keras_hub"),
]
ROWS = [
    *[
        refused(
            f"{name}={value!r}",
            lambda m, f=function, n=name, v=value: f(m.plain, **{n: v}),
            TypeError,
            f"`{name}` must be an integer",
            f"{name}={value!r}",
        )
        for function, name, _ in INTEGERS
        for value in ("4", 4.0, True)
    ],
    *[
        refused(
            f"{name}={value}",
            lambda m, f=function, n=name, v=value: f(m.plain, **{n: v}),
            ValueError,
            f"`{name}` must be at least",
            f"{name}={value}",
        )
        for function, name, value in INTEGERS
    ],
    *[
        refused(
            f"{name}={value!r}",
            lambda m, f=function, n=name, v=value: f(m.plain, **{n: v}),
            TypeError,
            f"`{name}` must be a number",
            f"{name}={value!r}",
        )
        for function, name, _ in NUMBERS
        for value in ("2", True, [2.0])
    ],
    *[
        refused(
            f"{name}={value}",
            lambda m, f=function, n=name, v=value: f(m.plain, **{n: v}),
            ValueError,
            f"`{name}` must be in ",
            f"{name}={value}",
        )
        for function, name, values in NUMBERS
        for value in values
    ],
    *[
        refused(
            f"{name} of {kind}",
            lambda m, f=function, make=make: f(make()),
            ValueError,
            rule,
            received,
        )
        for name, function, rule in MODELS
        for kind, make, received in (
            ("a layer", lambda: keras.layers.Dense(1), "Received: Dense"),
            ("a name", lambda: "pali_gemma_3b", "Received: str"),
            ("nothing", lambda: None, "Received: NoneType"),
        )
    ],
    *[
        refused(
            f"{name} of sliding windows alone",
            lambda m, f=function: f(m.sliding),
            ValueError,
            "must have a decoder layer with full attention",
        )
        for name, function in (
            ("yarn", yarn),
            ("self_extend", extend),
            ("attach", ATTACH),
            ("retrieval heads", find),
        )
    ],
    refused(
        "linear memory of an unknown implementation",
        lambda m: linear(m.plain, implementation="fast"),
        ValueError,
        "Unknown `implementation` for `attention_output`",
        "'fast'",
    ),
    *[
        refused(
            f"{name} twice",
            lambda m, outer=outer, inner=inner: nested(outer, inner, m.plain),
            ValueError,
            rule,
        )
        for name, outer, inner, rule in (
            (
                "yarn",
                lambda m: keras_laid.yarn(m, 2.0, 64),
                yarn,
                "cannot be nested",
            ),
            (
                "self_extend",
                lambda m: keras_laid.self_extend(m, 2, 4),
                extend,
                "must be the outermost scope",
            ),
            (
                "linear memory",
                keras_laid.linear_memory_attention,
                linear,
                "must be the outermost scope",
            ),
            (
                "linear memory in self_extend",
                lambda m: keras_laid.self_extend(m, 2, 4),
                linear,
                "must be the outermost scope",
            ),
            (
                "self_extend in a capture",
                lambda m: captured_attention(m, [1]),
                extend,
                "is being captured",
            ),
            (
                "positions",
                lambda m: keras_laid.rotary_positions(m, np.arange(5)),
                lambda m: at(m, np.arange(5)),
                "cannot be nested",
            ),
        )
    ],
    refused(
        "beta_slow above beta_fast",
        lambda m: yarn(m.plain, beta_slow=40.0),
        ValueError,
        "`beta_slow` must be less than `beta_fast`",
        "beta_slow=40.0",
    ),
    refused(
        "an unknown ramp",
        lambda m: yarn(m.plain, ramp=["index"]),
        ValueError,
        "`ramp` must be one of ['index', 'turns']",
    ),
    *[
        refused(
            f"positions {kind}",
            lambda m, positions=positions: at(m.plain, positions),
            error,
            rule,
        )
        for kind, positions, error, rule in (
            ("in a list", [0, 1, 2], ValueError, "Convert lists to arrays"),
            ("of one number", np.array(3), ValueError, "must be a tensor of"),
            ("of floats", np.ones(3), TypeError, "tensor of dtype int"),
            ("of M-RoPE", np.ones((1, 4, 3), int), ValueError, "with M-RoPE"),
        )
    ],
    refused(
        "positions of text alone",
        lambda m: run(m.several, np.arange(3)),
        ValueError,
        "`positions` must have shape (length) = (11,)",
        "(3,)",
    ),
    refused(
        "positions of another batch",
        lambda m: run(m.several, np.zeros((3, 11), "int32")),
        ValueError,
        "`positions` must have shape (batch, length) = (2, 11)",
        "(3, 11)",
    ),
    refused(
        "positions inside and out",
        lambda m: run(m.several, np.arange(11), positions=np.arange(11)),
        ValueError,
        "must be given positions once",
    ),
    *[
        refused(
            f"inputs without {name}",
            lambda m, name=name: run(m.several, **{name: None}),
            ValueError,
            "The model's inputs must have",
            f"without ['{name}']",
        )
        for name in ("images", "token_ids", "padding_mask", "response_mask")
    ],
    *[
        refused(
            f"{name} of fewer tokens",
            lambda m, name=name: run(
                m.several, **{name: np.ones((2, 2), "int32")}
            ),
            ValueError,
            f"`{name}` must have shape (batch, length) = (2, 3)",
            "(2, 2)",
        )
        for name in ("padding_mask", "response_mask")
    ],
    refused(
        "an array for inputs",
        lambda m: m.several(np.ones((2, 3), "int32")),
        TypeError,
        "`inputs` must be a dictionary",
    ),
    refused(
        "token ids of floats",
        lambda m: run(m.several, token_ids=np.ones((2, 3), "float32")),
        TypeError,
        "`token_ids` must be a tensor of dtype int",
    ),
    refused(
        "token ids of one prompt",
        lambda m: run(m.several, token_ids=np.ones(3, "int32")),
        ValueError,
        "`token_ids` must have shape (batch, length)",
    ),
    *[
        refused(
            f"images of shape {shape}",
            lambda m, shape=shape: run(m.several, images=np.zeros(shape)),
            ValueError,
            rule,
            str(shape),
        )
        for shape, rule in (
            ((2, 16, 16, 3), "`images` must have shape (batch, images, height"),
            ((3, 2, 16, 16, 3), "`images` must have shape"),
            ((2, 2, 8, 16, 3), "`images` must have shape"),
            ((2, 2, 16, 16, 1), "`images` must have shape"),
            ((2, 0, 16, 16, 3), "at least one image"),
        )
    ],
    refused(
        "a backbone for a task",
        lambda m: MultiImagePaliGemmaCausalLM.from_causal_lm(m.plain.backbone),
        TypeError,
        "`causal_lm` must be a `keras_hub.models.PaliGemmaCausalLM`",
        "Hand a backbone to the constructor",
    ),
    refused(
        "a name for a preprocessor",
        lambda m: MultiImagePaliGemmaCausalLM(m.plain.backbone, "tokenizer"),
        TypeError,
        "`preprocessor` must be a `keras_hub.models.PaliGemmaCausalLMPrepro",
        "str",
    ),
    refused(
        "gains in layers of an iterator",
        lambda m: ATTACH(m.plain, iter([1])),
        TypeError,
        "must be a sequence of integers",
        "layers=",
    ),
    *[
        refused(
            f"gains in layers {layers!r}",
            lambda m, layers=layers: ATTACH(m.plain, layers),
            error,
            rule,
            "layers=",
        )
        for layers, error, rule in (
            ([4], ValueError, "indices of the model's 4 decoder layers"),
            ([1, -5], ValueError, "indices of the model's 4 decoder layers"),
            ([1, 2], ValueError, "must be decoder layers with full attention"),
            ([], ValueError, "must name at least one decoder layer"),
            ([3, -1], ValueError, "must name each decoder layer once"),
            (1, TypeError, "must be a sequence of integers"),
            ("all", TypeError, "must be a sequence of integers"),
            ([1.0], TypeError, "must be a sequence of integers"),
            ([True], TypeError, "must be a sequence of integers"),
        )
    ],
    refused(
        "retrieval heads of a number for a switch",
        lambda m: find(m.several, ablate=1),
        TypeError,
        "`ablate` must be `True` or `False`",
        "ablate=1",
    ),
    *[
        refused(
            f"retrieval heads in rows {kinds!r}",
            lambda m, kinds=kinds: find(m.several, row_kinds=kinds),
            ValueError,
            "`row_kinds` must be a sequence of some of ('text', 'image')",
            f"row_kinds={kinds!r}",
            "Pass a tuple",
        )
        for kinds in ("text", ("text", "images"), None, 1, [["text"]])
    ],
    *[
        refused(
            f"retrieval heads in {name}",
            lambda m, data=data: find(m.several, data=data),
            error,
            rule,
            received,
        )
        for name, data, error, rule, received in (
            (
                "one batch",
                prompts(),
                TypeError,
                "`data` must be an iterable of batches",
                "dict. Pass one batch as `[batch]`",
            ),
            (
                "a number",
                3,
                TypeError,
                "`data` must be an iterable of batches",
                "data of type int",
            ),
            (
                "no batch",
                [],
                ValueError,
                "`data` must have one batch or more",
                "data of type list",
            ),
            (
                "arrays",
                [np.zeros((2, 3), "int32")],
                TypeError,
                "`inputs` must be a dictionary",
                "ndarray",
            ),
            (
                "batches with a weight for each example",
                [(prompts(), np.ones((2, 3)), np.ones(2))],
                ValueError,
                "`sample_weight` must have shape (batch, length) = (2, 3)",
                "(2,)",
            ),
        )
    ],
    *[
        refused(
            f"retrieval heads with {name}",
            lambda m, inputs=inputs: find_in(m.several, **inputs),
            error,
            rule,
            received,
        )
        for name, inputs, error, rule, received in (
            (
                "no images",
                {"images": None},
                ValueError,
                "The model's inputs must have",
                "without ['images']",
            ),
            (
                "one needle",
                {"needle": np.array([1])},
                ValueError,
                "`needle` must have shape (batch) = (2,)",
                "(1,)",
            ),
            (
                "needles for tokens",
                {"needle": np.ones((2, 3), "int32")},
                ValueError,
                "`needle` must have shape (batch) = (2,)",
                "(2, 3)",
            ),
            (
                "needles in floats",
                {"needle": np.array([0.0, 1.0])},
                TypeError,
                "`needle` must be a tensor of dtype int",
                "float64",
            ),
            (
                "needles in a list",
                {"needle": [0, 1]},
                TypeError,
                "`needle` must be a tensor",
                "list",
            ),
            (
                "segments of text alone",
                {"segments": np.ones((2, 3), "int32")},
                ValueError,
                "`segments` must have shape (batch, keys) = (2, 11)",
                "(2, 3)",
            ),
            (
                "segments in floats",
                {"segments": np.ones((2, 11))},
                TypeError,
                "`segments` must be a tensor of dtype int",
                "float64",
            ),
        )
    ],
    refused(
        "retrieval heads without needles in one example",
        lambda m: find(
            m.several, data=[{k: v[:1] for k, v in prompts().items()}]
        ),
        ValueError,
        "two examples or more must have the same number",
        "1 batches",
        "Pass more batches",
    ),
    refused(
        "a table of no heads",
        lambda m: find(m.several).table(0),
        ValueError,
        "`count` must be at least 1",
        "count=0",
    ),
    refused(
        "a table of rows without statistics",
        lambda m: find(m.several).table(rows="image"),
        ValueError,
        "`rows` must be one of ['text']",
        "'image'",
    ),
    refused(
        "segments of an unknown number",
        lambda m: segments_of(
            m.several, prompts(segments=np.ones((2, 11), "int32")), 11
        ),
        ValueError,
        "The number of segments must be known",
        "'segments'",
        "`num_segments`",
    ),
    *[
        refused(
            f"a model without heads {heads!r}",
            lambda m, heads=heads: silence(m.plain, heads),
            error,
            "`heads` must be pairs of integers (layer, query head)",
            received,
        )
        for heads, error, received in (
            (1, TypeError, "heads=1"),
            ((1, 2), TypeError, "heads=(1, 2)"),
            ([(1, 2, 3)], TypeError, "heads=[(1, 2, 3)]"),
            ([(1.0, 2)], TypeError, "heads=[(1.0, 2)]"),
            (["12"], TypeError, "heads=['12']"),
            ([(4, 0)], ValueError, "layer 4, head 0"),
            ([(-1, 0)], ValueError, "layer -1, head 0"),
            ([(0, 1), (1, 4)], ValueError, "layer 1, head 4"),
            ([(1, -1)], ValueError, "layer 1, head -1"),
        )
    ],
    refused(
        "a model without heads of a linear layer",
        lambda m: silence(small_models.qwen_3_5(), [(0, 0)]),
        ValueError,
        "of layers with attention maps",
        "layer 0, head 0",
    ),
    refused(
        "a number for a switch",
        lambda m: ATTACH(m.plain, per_head=1),
        TypeError,
        "`per_head` must be `True` or `False`",
        "per_head=1",
    ),
    refused(
        "a second attach",
        lambda m: ATTACH(m.gained, [3]),
        ValueError,
        "must have no gains yet",
        "in layers [1]",
        "fold_gain_modulation",
    ),
    refused(
        "a fold without an attach",
        lambda m: FOLD(m.plain),
        ValueError,
        "must have gains to fold",
        "Call `attach_gain_modulation` first",
    ),
    refused(
        "a fold into LoRA's factors",
        lambda m: FOLD(m.gained),
        ValueError,
        "LoRA's factors",
        "decoder layer 1, with lora_rank=2",
    ),
    *[
        refused(
            f"a mesh of {mesh!r}",
            lambda m, mesh=mesh: plan(m.plain, mesh_shape=mesh),
            error,
            rule,
            repr(mesh),
        )
        for mesh, error, rule in (
            (2, TypeError, "`mesh_shape` must be one or more integers"),
            ((1.0, 1), TypeError, "`mesh_shape` must be one or more integers"),
            ((1,), ValueError, "`mesh_shape` must be two integers"),
            ((1, 0), ValueError, "integers of at least 1"),
            ((3, 1), ValueError, "must be split evenly"),
        )
    ],
    refused(
        "weights in float64",
        lambda m: plan(m.plain, teacher_dtype="float64"),
        ValueError,
        "`teacher_dtype` must be the name of a dtype policy",
        "'float64'",
    ),
    refused(
        "a layer to plan for",
        lambda m: plan(m.plain, student=keras.layers.Dense(1)),
        TypeError,
        "must be a KerasHub model, the name or folder of a preset",
        "Dense",
    ),
    refused(
        "a number to plan for",
        lambda m: plan(m.plain, teacher=7),
        TypeError,
        "must be a KerasHub model",
        "int",
    ),
    refused(
        "a function that returns none",
        lambda m: plan(m.plain, teacher=lambda: None),
        ValueError,
        "family must be known",
        "NoneType",
    ),
]


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize(("call", "error", "words"), ROWS)
def test_refused(call, error, words, given):
    with unchanged(given.plain, given.gained, given.sliding):
        assert_refused(error, words, call, given)


def mesh(*shape):
    return keras.distribution.DeviceMesh(
        shape, ["batch", "model"][: len(shape)], ["cpu:0"] * np.prod(shape)
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        refused(
            "no mesh",
            lambda: keras_laid.ModelParallel(None),
            TypeError,
            "`device_mesh` must be a `keras.distribution.DeviceMesh`",
        ),
        refused(
            "a mesh of one axis",
            lambda: keras_laid.ModelParallel(mesh(1)),
            ValueError,
            "an axis of data and one of model",
            "(1,)",
        ),
        refused(
            "a dictionary for a map",
            lambda: keras_laid.ModelParallel(mesh(1, 1), {}),
            TypeError,
            "`layout_map` must be a `keras.distribution.LayoutMap`",
        ),
        refused(
            "a map of another mesh",
            lambda: keras_laid.ModelParallel(
                mesh(1, 1), keras.distribution.LayoutMap(mesh(1, 1))
            ),
            ValueError,
            "`layout_map` must be one of `device_mesh`",
        ),
    ],
)
def test_meshes_refused(call, error, words):
    if keras.backend.backend() != "jax":
        error, words = ValueError, ["only on JAX", "Set KERAS_BACKEND=jax"]
    assert_refused(error, words, call)
