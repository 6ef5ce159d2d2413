"""Wrong calls of distillers, stored teachers and resumable training.

Each refused call leaves models and files unchanged.
"""

import json
import types

import keras
import numpy as np
import pytest

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import ResumableTraining
from keras_laid import StoredTeacher
from keras_laid import find_retrieval_heads
from keras_laid import store_teacher
from keras_laid import yarn
from keras_laid.distillation import AttentionMatching
from keras_laid.distillation import HiddenStates
from keras_laid.distillation import NextTokens
from keras_laid.distillation import RetrievalMatching
from keras_laid.distillation.terms import Term
from tests.bad_input.table import assert_refused
from tests.bad_input.table import refused
from tests.bad_input.table import unchanged
from tests.support import Batches
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import make_preprocessor

NAN, INFINITY = float("nan"), float("inf")
# Keras wraps type errors while it builds a model on JAX.
WRAPPED = (TypeError, RuntimeError)


@pytest.fixture(scope="module")
def given():
    preprocessor = make_preprocessor()
    teacher = make_multi_image(None, preprocessor, seed=1)
    student = make_multi_image(None, preprocessor)
    distiller = DistanceWeightedAttentionDistillation(teacher, student)
    distiller.compile("sgd")
    distiller.total_steps.assign(1)  # As `fit` does before its first step.
    data = make_haystacks(preprocessor, num_questions=2, batch_size=2)
    return types.SimpleNamespace(
        preprocessor=preprocessor,
        teacher=teacher,
        student=student,
        distiller=distiller,
        data=data,
        batch=data[0],
    )


@pytest.fixture(scope="module")
def written(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    store(given, folder)
    return folder


def store(g, path, **changes):
    arguments = dict(teacher=g.teacher, data=g.data, folder=path)
    arguments |= dict(layers=(-1,), top_k=4)
    return store_teacher(**arguments | changes)


def make(g, **changes):
    models = dict(teacher=g.teacher, student=g.student)
    return DistanceWeightedAttentionDistillation(**models | changes)


def compiled(g, **changes):
    g.distiller.compile(**dict(optimizer="sgd") | changes)


def fit(g, x=None, y=None, sample_weight=None, through="fit"):
    """Runs the batch with some parts replaced, through a method."""
    batch = [
        own if other is None else other
        for own, other in zip(g.batch, (x, y, sample_weight), strict=True)
    ]
    getattr(g.distiller, through)(Batches(tuple(batch)), verbose=0)


def fit_arrays(g, x=None, y=None, **kwargs):
    """Runs the batch with some parts replaced, as arrays."""
    x, y = x or g.batch[0], g.batch[1] if y is None else y
    weights = {} if kwargs else {"sample_weight": marks(g)}
    g.distiller.fit(x, y, verbose=0, **kwargs, **weights)


def evaluate(g, y):
    g.distiller.evaluate(g.batch[0], y, sample_weight=marks(g), verbose=0)


def train_on_batch(g, y=None, **kwargs):
    y = g.batch[1] if y is None else y
    g.distiller.train_on_batch(g.batch[0], y, **kwargs)


def test_on_batch(g, y):
    g.distiller.test_on_batch(g.batch[0], y, marks(g))


test_on_batch.__test__ = False


def marks(g):
    return np.ones_like(g.batch[2])


def size_of(g):
    return g.student.backbone.vocabulary_size


def replaced(g, part, token):
    """Token ids or labels of the batch, with one replaced in the first row."""
    tokens = np.array((g.batch[0]["token_ids"], g.batch[1])[part])
    tokens[0, 12] = token
    return tokens


def inputs(g, **changes):
    changed = g.batch[0] | changes
    return {k: v for k, v in changed.items() if v is not None}


def other_tokenizer(g):
    preprocessor = make_preprocessor()
    tokenizer = preprocessor.tokenizer
    tokens = tokenizer.get_vocabulary()[::-1]
    tokenizer.get_vocabulary = lambda: tokens
    return make_multi_image(None, preprocessor)


CONSTRUCTOR = [
    *[
        refused(
            f"{kind} for a {name}",
            lambda g, name=name, model=model: make(g, **{name: model(g)}),
            ValueError,
            f"`{name}` must be a task with logits",
        )
        for name in ("teacher", "student")
        for kind, model in (
            ("layer", lambda g: keras.layers.Dense(1)),
            ("backbone", lambda g: g.teacher.backbone),
            ("path", lambda g: "runs/teacher"),
            ("class", lambda g: None),
        )
    ],
    refused(
        "a student that is the teacher",
        lambda g: make(g, student=g.teacher),
        ValueError,
        "must be two models",
        "Load the preset once for each",
    ),
    refused(
        "a student that shares the teacher's weights",
        lambda g: make(g, student=type(g.teacher)(g.teacher.backbone)),
        ValueError,
        "must not share weights",
        "shared variables",
    ),
    refused(
        "another tokenizer",
        lambda g: make(g, teacher=other_tokenizer(g)),
        ValueError,
        "the same tokenizer",
        "presets of one family",
    ),
    refused(
        "images of another size",
        lambda g: make(
            g, teacher=make_multi_image(None, g.preprocessor, image_size=32)
        ),
        ValueError,
        "turn an image into the same tokens",
        "'image_size': 32",
    ),
    refused(
        "a teacher of one image",
        lambda g: make(g, teacher=make_pali_gemma(None, g.preprocessor)),
        ValueError,
        "several images in a prompt, or both one",
    ),
    refused(
        "another vocabulary",
        lambda g: make(g, teacher=make_multi_image(vocabulary_size=50)),
        ValueError,
        "needs one vocabulary",
        'Pass `NextTokens(vocabulary="shared")`',
    ),
    refused(
        "queries of another head dim",
        lambda g: make(
            g,
            teacher=make_multi_image(None, g.preprocessor, head_dim=4),
            terms=[AttentionMatching(query_key_weight=1.0)],
        ),
        ValueError,
        "equal head dims",
        "teacher head_dim=4",
    ),
    *[
        refused(
            f"{name}={value!r}",
            lambda g, name=name, value=value: make(g, **{name: value}),
            error,
            f"`{name}` must be",
            f"{name}={value!r}",
        )
        for name, values in (
            ("retrieval_weight", (-1.0, "auto")),
            ("attention_weight", (-1.0, NAN, INFINITY, "1", True)),
            ("logits_weight", (NAN, [1.0])),
            ("supervised_weight", (-0.5, False)),
        )
        for value in values
        for error in [ValueError if isinstance(value, float) else TypeError]
    ],
    refused(
        "no term at all",
        lambda g: make(
            g, retrieval_weight=0, logits_weight=0, supervised_weight=0
        ),
        ValueError,
        "At least one term must have a weight",
    ),
    *[
        refused(
            f"layer_map={layer_map!r}",
            lambda g, layer_map=layer_map: make(
                g, terms=[AttentionMatching(layer_map=layer_map)]
            ),
            ValueError,
            "`layer_map` must",
        )
        for layer_map in (
            "first",
            None,
            0,
            [],
            [0, 1],
            [(0,)],
            [(0, 1, 1)],
            [(0.0, 1)],
            [("0", 1)],
            [(True, 1)],
            {0: 1},
            [(0, 2)],
            [(-3, 1)],
            [(0, 0), (-2, 1)],
        )
    ],
    *[
        refused(
            f"terms={kinds}",
            lambda g, terms=terms: make(g, terms=terms()),
            error,
            words,
        )
        for kinds, terms, error, words in (
            ("class", lambda: [HiddenStates], TypeError, "must be a list of"),
            ("one", lambda: HiddenStates(1.0), TypeError, "must be a list of"),
            (
                "same name",
                lambda: [HiddenStates(1.0), HiddenStates(0.5)],
                ValueError,
                "a name of its own",
            ),
            (
                "taken name",
                lambda: [Term(progress=1.0)],
                ValueError,
                "a name of its own",
            ),
            (
                "another's name",
                lambda: [NextTokens(), Term(logits=1.0)],
                ValueError,
                "a name of its own",
            ),
            (
                "no weight",
                lambda: [NextTokens(0.0, 0.0), HiddenStates(0.0)],
                ValueError,
                "At least one term must have a weight greater than 0",
            ),
            (
                "none",
                list,
                ValueError,
                "At least one term must have a weight greater than 0",
            ),
            (
                "no such layer",
                lambda: [HiddenStates(1.0, [(0, 9)])],
                ValueError,
                "`layer_map` must name teacher layers",
            ),
        )
    ],
    refused(
        "weights beside terms",
        lambda g: make(g, terms=[NextTokens()], retrieval_weight=1.0),
        ValueError,
        "Weights must be left out where `terms` are given",
        "{'retrieval_weight': 1.0}",
    ),
    *[
        refused(
            f"{kind.__name__}({name}={value!r})",
            lambda g, kind=kind, name=name, value=value: kind(**{name: value}),
            error,
            f"`{name}` must be",
            f"{name}={value!r}",
        )
        for kind, name, values in (
            (RetrievalMatching, "weight", (-1.0, "auto", None)),
            (AttentionMatching, "weight", (NAN, True)),
            (AttentionMatching, "query_key_weight", (-1.0, "0")),
            (AttentionMatching, "mixer_sharpness", (NAN, "sharp", True)),
            (NextTokens, "logits_weight", (-1.0, None)),
            (NextTokens, "supervised_weight", (INFINITY, [1.0])),
            (NextTokens, "beta", (-0.1, 1.5, NAN, "1", None)),
            (NextTokens, "temperature", (0.0, NAN, INFINITY, "1", None)),
            (HiddenStates, "weight", (-1.0, None)),
        )
        for value in values
        for error in [ValueError if isinstance(value, float) else TypeError]
    ],
    *[
        refused(
            f"{kind.__name__}({name}={value!r})",
            lambda g, kind=kind, name=name, value=value: kind(**{name: value}),
            ValueError,
            f"`{name}` must be one of",
            f"{name}={value!r}",
        )
        for kind, name, value in (
            (AttentionMatching, "rows", "question"),
            (AttentionMatching, "rows", None),
            (HiddenStates, "rows", "question"),
            (NextTokens, "vocabulary", ["same"]),
        )
    ],
    refused(
        "a number for a weighting",
        lambda g: make(g, distance_weighting=4.0),
        TypeError,
        "`distance_weighting` must be a `keras_laid.DistanceWeighting`",
        "float",
    ),
    *[
        refused(
            f"teacher_heads={heads!r}",
            lambda g, heads=heads: RetrievalMatching(teacher_heads=heads),
            ValueError,
            '`teacher_heads` must be "auto" or pairs of indices (layer, head)',
        )
        for heads in ("best", None, [], [1, 2], [(0,)], [(0.0, 1)])
    ],
    *[
        refused(
            f"teacher_heads={heads!r} of a pair",
            lambda g, heads=heads: make(
                g, terms=[RetrievalMatching(teacher_heads=heads)]
            ),
            ValueError,
            "`teacher_heads` must name",
            received,
        )
        for heads, received in (
            ([(2, 0)], "teacher layer 2"),
            ([(0, 0), (-3, 0)], "teacher layer -3"),
            ([(0, 9)], "head 9"),
            ([(0, -1)], "head -1"),
        )
    ],
    *[
        refused(
            f"student_layers={layers!r}",
            lambda g, layers=layers: make(
                g, terms=[RetrievalMatching(student_layers=layers)]
            ),
            error,
            "`student_layers` must",
        )
        for layers, error in (
            ("matched", TypeError),
            ([0.5], TypeError),
            ([], ValueError),
            ([2], ValueError),
            ([0, -2], ValueError),
        )
    ],
    refused(
        "pooling='mean'",
        lambda g: RetrievalMatching(pooling="mean"),
        ValueError,
        "`pooling` must be one of",
        "pooling='mean'",
    ),
    *[
        refused(
            f"num_segments={count!r}",
            lambda g, count=count: RetrievalMatching(num_segments=count),
            error,
            "`num_segments` must be",
        )
        for count, error in ((0, ValueError), (2.0, TypeError))
    ],
    refused(
        "an unknown implementation",
        lambda g: AttentionMatching(implementation="fast"),
        ValueError,
        "Expected one of",
        "implementation='fast'",
    ),
]
COMPILE = [
    refused(
        "a loss that no term takes",
        lambda g: make(g, terms=[RetrievalMatching()]).compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ),
        ValueError,
        "`loss` needs a term that takes it",
    ),
    refused(
        "rematerialize='no'",
        lambda g: compiled(g, rematerialize="no"),
        TypeError,
        "`rematerialize` must be `True` or `False`",
        "rematerialize='no'",
    ),
    refused(
        "linear_memory=1",
        lambda g: compiled(g, linear_memory=1),
        TypeError,
        "`linear_memory` must be `True`, `False` or the name",
        "linear_memory=1",
    ),
    refused(
        "linear_memory='fast'",
        lambda g: compiled(g, linear_memory="fast"),
        ValueError,
        "Unknown `implementation` for `attention_output`. Expected one of",
        "'fast'",
    ),
    refused(
        "no optimizer",
        lambda g: compiled(g, optimizer=None),
        ValueError,
        "`optimizer` and `loss` must not be `None`",
    ),
    refused(
        "no loss",
        lambda g: compiled(g, loss=None),
        ValueError,
        "`optimizer` and `loss` must not be `None`",
        "`supervised_weight=0`",
    ),
    refused(
        "the name of a loss",
        lambda g: compiled(g, loss="sparse_categorical_crossentropy"),
        ValueError,
        "names stand for losses of probabilities",
        "loss='sparse_categorical_crossentropy'",
        "from_logits=True",
    ),
    *[
        refused(
            f"{loss} for a loss",
            lambda g, loss=loss: compiled(g, loss=loss),
            TypeError,
            '`loss` must be "auto", a `keras.losses.Loss` or a function',
            f"loss={loss!r:.80}",
        )
        for loss in (1.0, keras.losses.MeanSquaredError)
    ],
    refused(
        "a loss without a reduction",
        lambda g: compiled(
            g, loss=keras.losses.SparseCategoricalCrossentropy(reduction=None)
        ),
        ValueError,
        "`loss` must have a reduction",
        "reduction=None",
    ),
    refused(
        "weights of losses",
        lambda g: compiled(g, loss_weights=[1.0]),
        ValueError,
        "`loss_weights` must be left out",
        "`attention_weight`",
    ),
]
BATCHES = [
    refused(
        "an array for inputs",
        lambda g: fit(g, x=g.batch[1]),
        WRAPPED,
        "`inputs` must be a dictionary",
    ),
    *[
        refused(
            f"inputs without {name}, through {through}",
            lambda g, name=name, through=through: fit(
                g, inputs(g, **{name: None}), through=through
            ),
            ValueError,
            "The model's inputs must have",
            f"without ['{name}']",
        )
        for name in ("token_ids", "response_mask", "images")
        for through in ("fit", "evaluate")
    ],
    refused(
        "a mask of fewer tokens",
        lambda g: fit(
            g, inputs(g, padding_mask=g.batch[0]["padding_mask"][:, 1:])
        ),
        ValueError,
        "`padding_mask` must have shape (batch, length) = ",
    ),
    refused(
        "positions of fewer tokens",
        lambda g: fit(g, inputs(g, positions=np.zeros((2, 3), "int32"))),
        ValueError,
        "`positions` must have shape (batch, length) = ",
        ", 3)",
    ),
    refused(
        "positions of floats",
        lambda g: fit(g, inputs(g, positions=np.zeros((2, 22), "float32"))),
        WRAPPED,
        "`positions` must be a tensor of dtype int",
    ),
    refused(
        "one image without its axis",
        lambda g: fit(g, inputs(g, images=g.batch[0]["images"][:, 0])),
        ValueError,
        "`images` must have shape (batch, images, height, width, channels)",
    ),
    refused(
        "labels of fewer tokens",
        lambda g: fit(g, y=g.batch[1][:, 1:]),
        ValueError,
        "`y` must have shape (batch, length)",
        ", 13)",
    ),
    refused(
        "labels of floats",
        lambda g: fit(g, y=g.batch[1].astype("float32")),
        TypeError,
        "`labels` must be a tensor of dtype int",
    ),
    refused(
        "one-hot labels",
        lambda g: fit(g, y=np.eye(2, dtype="int32")[g.batch[1] % 2]),
        ValueError,
        "`y` must have shape",
        ", 14, 2)",
    ),
    *[
        refused(
            f"weights of examples, through {through}",
            lambda g, through=through: fit(
                g, sample_weight=g.batch[2][:, 0], through=through
            ),
            ValueError,
            "`sample_weight` must have shape (batch, length)",
            "sample_weight.shape=(",
        )
        for through in ("fit", "evaluate")
    ],
    *[
        refused(
            f"class weights alone, through {through.__name__}",
            lambda g, through=through: through(g, class_weight={0: 1.0}),
            ValueError,
            "`class_weight` must be left out",
            "class_weight={0: 1.0}",
            "`sample_weight` of shape (batch, length)",
        )
        for through in (fit_arrays, train_on_batch)
    ],
    *[
        refused(
            f"labels beyond the vocabulary, through {through.__name__}",
            lambda g, through=through: through(g, y=replaced(g, 1, size_of(g))),
            ValueError,
            "`labels` must be less than",
            "the size of the vocabulary",
            "labels[0, 12]=",
            "a sample weight of 0",
        )
        for through in (fit_arrays, evaluate, train_on_batch, test_on_batch)
    ],
    refused(
        "labels beyond the vocabulary, among the first batches",
        lambda g: g.distiller.find_heads(
            [(g.batch[0], replaced(g, 1, 10**6), marks(g))]
        ),
        ValueError,
        "`labels` must be less than",
        "labels[0, 12]=1000000",
    ),
    refused(
        "a token beyond the vocabulary, in a search for heads",
        lambda g: find_retrieval_heads(
            g.teacher, [(inputs(g, token_ids=replaced(g, 0, 10**6)),)], 1
        ),
        ValueError,
        "`token_ids` must be less than",
        "token_ids[0, 12]=1000000",
    ),
    *[
        refused(
            f"token {token}",
            lambda g, token=token: fit_arrays(
                g, x=inputs(g, token_ids=replaced(g, 0, token))
            ),
            ValueError,
            "`token_ids` must be less than",
            "and at least 0",
            f"token_ids[0, 12]={token}",
        )
        for token in (-1, 10**6)
    ],
    refused(
        "no labels",
        lambda g: g.distiller.fit(Batches((g.batch[0],)), verbose=0),
        ValueError,
        "Data must be batches `(x, y)`",
        "without `y`",
    ),
    refused(
        "a prediction without images",
        lambda g: g.distiller.predict(
            Batches((inputs(g, images=None),)), verbose=0
        ),
        ValueError,
        "The model's inputs must have",
        "without ['images']",
    ),
]


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize(
    ("call", "error", "words"), [*CONSTRUCTOR, *COMPILE, *BATCHES]
)
def test_refused(call, error, words, given):
    distiller = given.distiller
    before = distiller.optimizer, distiller.supervised_loss
    with unchanged(given.teacher, given.student, given.distiller):
        assert_refused(error, words, call, given)
    after = distiller.optimizer, distiller.supervised_loss
    assert all(one is other for one, other in zip(before, after, strict=True))


STORE = [
    *[
        refused(
            f"{name}={value!r}",
            lambda g, folder, name=name, value=value: store(
                g, folder, **{name: value}
            ),
            error,
            f"`{name}` must be",
        )
        for name, value, error in (
            ("teacher", "preset", ValueError),
            ("data", None, TypeError),
            ("data", [1], TypeError),
            ("folder", None, TypeError),
            ("folder", 7, TypeError),
            ("layers", 1, TypeError),
            ("layers", [1.0], TypeError),
            ("layers", [True], TypeError),
            ("layers", (9,), ValueError),
            ("rows", "images", ValueError),
            ("dtype", "int8", ValueError),
            ("top_k", -1, ValueError),
            ("top_k", 10**6, ValueError),
            ("top_k", 4.0, TypeError),
            ("top_k", True, TypeError),
            ("vocabulary_size", 0, ValueError),
            ("vocabulary_size", 10**6, ValueError),
            ("epochs", 0, ValueError),
            ("epochs", 1.5, TypeError),
            ("batches_per_shard", 0, ValueError),
            ("batches_per_shard", "2", TypeError),
            ("temperature", 0.0, ValueError),
            ("temperature", NAN, ValueError),
            ("temperature", INFINITY, ValueError),
            ("temperature", "1", TypeError),
        )
    ],
    refused(
        "no data",
        lambda g, folder: store(g, folder, data=Batches()),
        ValueError,
        "`data` must have at least one batch",
    ),
    refused(
        "a backbone for a teacher",
        lambda g, folder: store(g, folder, teacher=g.teacher.backbone),
        ValueError,
        "`teacher` must be a task with logits",
    ),
    refused(
        "nothing to store",
        lambda g, folder: store(
            g, folder, retrieval_heads=(), layers=(), top_k=0
        ),
        ValueError,
        "There must be something to store",
    ),
    refused(
        "epochs of data without any",
        lambda g, folder: store(g, folder, data=Batches(g.batch), epochs=2),
        ValueError,
        "data without an attribute `epoch`",
    ),
]


def test_a_store_is_of_tokens_that_the_teacher_has(given, tmp_path):
    x = inputs(given, token_ids=replaced(given, 0, 10**6))
    data = Batches((x, *given.batch[1:]))
    with pytest.raises(ValueError, match="`token_ids` must be less than"):
        store(given, tmp_path, data=data, retrieval_heads=())


@pytest.mark.parametrize(("call", "error", "words"), STORE)
def test_stores_refused(call, error, words, given, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with unchanged(given.teacher, folder=tmp_path):
        assert_refused(error, words, call, given, tmp_path / "store")


CUT = "must be as `keras_laid.store_teacher` or"
FOREIGN = [
    ("teacher.json", b'{"settings": {"lay', CUT),
    ("teacher.json", b"{}", CUT),
    ("teacher.json", b"[1]", CUT),
    ("teacher.json", b"\xff\xfe\x00", CUT),
    ("teacher.json", None, "without 'teacher.json'"),
    ("teacher.array_record-00000-of-00001.json", b"{", CUT),
    ("teacher.array_record-00000-of-00001.json", b'{"sha256": "1"}', CUT),
    ("teacher.array_record-00000-of-00001.json", None, "must be complete"),
    ("teacher.array_record-00000-of-00001", None, "must be complete"),
    ("teacher.array_record-00000-of-00001", b"cut", "must be what was written"),
]


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    FOREIGN,
    ids=[f"{name} with {content}" for name, content, _ in FOREIGN],
)
def test_foreign_stores_are_refused(
    name, content, rule, given, written, tmp_path
):
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with unchanged(folder=tmp_path):
        assert_refused(
            ValueError,
            [rule],
            lambda: StoredTeacher(tmp_path).targets_for(given.data)[0],
        )


def test_a_cut_store_is_not_gone_on_with(given, written, tmp_path):
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "teacher.json").write_bytes(b"{")
    with unchanged(given.teacher, folder=tmp_path):
        assert_refused(ValueError, [CUT], store, given, tmp_path)


def store_in_yarn(given, folder):
    with yarn(given.teacher, factor=4.0, original_length=8):
        store(given, folder)


STORED = [
    refused(
        "no folder",
        lambda g, folder: StoredTeacher(None),
        TypeError,
        "`folder` must be a path",
        "NoneType",
    ),
    refused(
        "an empty folder",
        lambda g, folder: StoredTeacher(folder / "none"),
        ValueError,
        "`folder` must be one that `keras_laid.store_teacher` or",
    ),
    refused(
        "other settings",
        lambda g, folder: store(g, folder, top_k=3),
        ValueError,
        "resumed with its own settings",
        "other ['top_k']",
        "Pass another folder",
    ),
    refused(
        "another teacher",
        lambda g, folder: store(g, folder, teacher=g.student),
        ValueError,
        "'teacher']",
    ),
    refused(
        "the same teacher in a scope",
        store_in_yarn,
        ValueError,
        "'teacher']",
    ),
    refused(
        "a list of batches",
        lambda g, folder: StoredTeacher(folder).targets_for([g.batch]),
        TypeError,
        "`data` must be a `keras.utils.PyDataset`",
        "list",
    ),
    refused(
        "a batch that it has not seen",
        lambda g, folder: StoredTeacher(folder).targets_for(
            Batches((g.batch[0], g.batch[1], 1 - g.batch[2]))
        )[0],
        ValueError,
        "bit for bit",
    ),
    *[
        refused(
            f"a sample weight of {number}",
            lambda g, folder, number=number: StoredTeacher(folder).targets_for(
                Batches((g.batch[0], g.batch[1], number * g.batch[2]))
            )[0],
            ValueError,
            "`sample_weight` must be 0 or more",
            f"{number}",
        )
        for number in (-1.0, NAN)
    ],
    refused(
        "arrays in place of inputs",
        lambda g, folder: StoredTeacher(folder).targets_for(
            Batches((g.batch[1], g.batch[1]))
        )[0],
        ValueError,
        "with a dictionary `x`",
    ),
    refused(
        "hidden states of a store",
        lambda g, folder: make(
            g, teacher=StoredTeacher(folder), terms=[HiddenStates(1.0)]
        ),
        ValueError,
        "needs a teacher in memory",
    ),
    refused(
        "a store for a student",
        lambda g, folder: make(g, student=StoredTeacher(folder)),
        ValueError,
        "`student` must be a task with logits",
    ),
    *[
        refused(
            f"a store without {name}={value!r}",
            lambda g, folder, kind=kind, name=name, value=value: make(
                g, teacher=StoredTeacher(folder), terms=[kind(**{name: value})]
            ),
            ValueError,
            "must have what the losses need",
            f"wanted: {wanted}",
        )
        for kind, name, value, wanted in (
            (AttentionMatching, "rows", "all", "all"),
            (NextTokens, "temperature", 2.0, "2.0"),
            (AttentionMatching, "layer_map", [(0, 0)], "[0]"),
        )
    ],
]


@pytest.mark.parametrize(("call", "error", "words"), STORED)
def test_stored_teachers_refused(call, error, words, given, written):
    with unchanged(given.teacher, given.student, folder=written):
        assert_refused(error, words, call, given, written)


def resumed(g, folder):
    g.distiller.fit(
        g.data, verbose=0, callbacks=[ResumableTraining(folder, g.data)]
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        refused(
            "no folder to resume from",
            lambda g, folder: ResumableTraining(None),
            TypeError,
            "`folder` must be a path",
        ),
        refused(
            "data without epochs",
            lambda g, folder: ResumableTraining(folder, Batches(g.batch)),
            ValueError,
            "`data` must have an attribute `epoch`",
            "Batches",
        ),
        *[
            refused(
                f"a state of {content!r}",
                lambda g, folder, content=content: resume_from(
                    g, folder, content
                ),
                ValueError,
                "must hold only states of this training",
                "epoch_1",
            )
            for content in (None, "{", "{}", "[]")
        ],
    ],
)
def test_resumed_training_refused(call, error, words, given, tmp_path):
    with unchanged(given.teacher, given.student):
        assert_refused(error, words, call, given, tmp_path)


def resume_from(g, folder, content):
    (folder / "epoch_1").mkdir()
    if content is not None:
        (folder / "epoch_1" / "training.json").write_text(content)
    before = json.dumps(sorted(map(str, folder.rglob("*"))))
    try:
        resumed(g, folder)
    finally:
        assert json.dumps(sorted(map(str, folder.rglob("*")))) == before
