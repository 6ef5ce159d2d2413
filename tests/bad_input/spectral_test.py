"""Wrong calls of `keras_laid.spectral`."""

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest

from keras_laid import distillation
from keras_laid import haystacks
from keras_laid import spectral
from keras_laid.backbones.head_statistics import HeadStatistics
from keras_laid.backbones.retrieval_heads import RetrievalHeads
from tests.backbones import small_models
from tests.bad_input.files_support import INF
from tests.bad_input.files_support import NAN
from tests.bad_input.files_support import wrong
from tests.support import make_multi_image

SIGNAL = np.arange(16.0) % 5
HEADS = np.ones((2, 1, 4))


def share(cutoff):
    return lambda: spectral.low_frequency_share(SIGNAL, cutoff)


def agreement(bands, one=SIGNAL, other=SIGNAL):
    return lambda: spectral.signal_agreement(one, other, bands)


def heads(small, large, **kwargs):
    return lambda: spectral.classify_heads({1: small, 4: large}, **kwargs)


def mean(*values, **kwargs):
    return lambda: spectral.mean_with_interval(values, **kwargs)


BANDS = r"`bands` must be two or more increasing numbers in \[0, 0.5\]"

NUMBERS = [
    wrong(
        "a signal with NaN",
        lambda: spectral.power_spectrum([NAN, 1.0, 2.0]),
        "`signal` must be finite. Received: 1 of 3 values",
    ),
    wrong(
        "a signal with infinity",
        lambda: spectral.power_spectrum([INF, 1.0]),
        "`signal` must be finite",
    ),
    wrong(
        "a signal with none",
        lambda: spectral.power_spectrum([None, 1.0]),
        "`signal` must be finite",
    ),
    wrong(
        "a signal of no distance",
        lambda: spectral.power_spectrum(np.zeros((2, 0))),
        r"two distances or more. Received: signal.shape=\(2, 0\)",
    ),
    wrong(
        "a cutoff in words",
        share("0.1"),
        "`cutoff` must be a number. Received: cutoff='0.1'",
        TypeError,
    ),
    wrong("no cutoff", share(None), "Received: cutoff=None", TypeError),
    wrong("a cutoff of NaN", share(NAN), "Received: cutoff=nan"),
    wrong("a negative cutoff", share(-0.1), r"must be in \(0, 0.5\]"),
    wrong("no bands", agreement(()), rf"{BANDS}. Received: bands=\(\)"),
    wrong("the edge of a band", agreement((0.5,)), BANDS),
    wrong("a band of one number", agreement(0.5), BANDS),
    wrong("a band from below 0", agreement((-1.0, 0.5)), BANDS),
    wrong("a band to above 0.5", agreement((0.0, 2.0)), BANDS),
    wrong("bands that fall", agreement((0.0, 0.3, 0.1)), BANDS),
    wrong("a band from NaN", agreement((NAN, 0.5)), BANDS),
    wrong("a band in words", agreement(("0", "0.5")), BANDS),
    wrong(
        "a number against a signal",
        agreement((0.0, 0.5), one=3.0),
        r"as many distances as each other. Received: signals of shapes \(\)",
    ),
    wrong(
        "a signal with NaN against one without",
        agreement((0.0, 0.5), other=SIGNAL * NAN),
        "`signal` must be finite",
    ),
    wrong("means of empty examples", mean([], []), "two examples or more"),
    wrong(
        "means with a confidence in words",
        mean(1.0, 2.0, confidence="0.95"),
        "`confidence` must be a number",
        TypeError,
    ),
    wrong(
        "means with a confidence of NaN",
        mean(1.0, 2.0, confidence=NAN),
        r"`confidence` must be in \(0, 1\). Received: confidence=nan",
    ),
    wrong(
        "means with a negative seed", mean(1.0, 2.0, seed=-1), "`seed` must be"
    ),
    wrong(
        "activations in a list",
        lambda: spectral.classify_heads([HEADS, HEADS]),
        "`activations` must be a dictionary from haystack size",
        TypeError,
    ),
    wrong(
        "activations at size 0",
        lambda: spectral.classify_heads({0: HEADS, 4: HEADS}),
        r"numbers above 0. Received: \[0, 4\]",
    ),
    wrong(
        "activations at sizes in words",
        lambda: spectral.classify_heads({"1": HEADS, "4": HEADS}),
        r"Received: \['1', '4'\]",
    ),
    wrong(
        "activations of other heads",
        heads(HEADS, np.ones((2, 1, 3))),
        r"of the same layers and heads. Received: shapes \[\(2, 1, 4\), \(2",
    ),
    wrong("activations as numbers", heads(1.0, 2.0), "layers and heads"),
    wrong("activations of NaN", heads(HEADS, HEADS * NAN), "must be finite"),
    wrong(
        "activations of no example",
        heads(HEADS, np.ones((0, 1, 4))),
        "of one example or more",
    ),
    wrong(
        "heads that keep none",
        heads(HEADS, HEADS, keep=None),
        "`keep` must be a number",
        TypeError,
    ),
]


@pytest.mark.parametrize("call, words, error", NUMBERS)
def test_numbers_are_refused(call, words, error):
    with pytest.raises(error, match=words):
        call()


@pytest.fixture(scope="module")
def model():
    return make_multi_image()


def make_inputs(**changes):
    inputs = {
        "images": np.zeros((2, 3, 16, 16, 3), "float32"),
        "token_ids": np.ones((2, 5), "int32"),
        "padding_mask": np.ones((2, 5), "int32"),
        "response_mask": np.zeros((2, 5), "int32"),
    }
    return {**inputs, **changes}


def mass(edges=(0, 9), inputs=None, **kwargs):
    def call(model):
        batch = make_inputs() if inputs is None else inputs
        return spectral.attention_mass(model, batch, edges, **kwargs)

    return call


EDGES = r"`edges` must be two or more increasing numbers in \[0, inf\)"
UNANSWERED = make_inputs(response_mask=np.ones((2, 5), "int32"))
WITHOUT_MASK = {
    name: x for name, x in make_inputs().items() if name != "response_mask"
}

OF_MODELS = [
    wrong("no edges", mass(()), EDGES),
    wrong("one edge", mass((0,)), EDGES),
    wrong("edges that fall", mass((5, 0)), rf"{EDGES}. Received: .*\(5, 0\)"),
    wrong("edges that stay", mass((0, 3, 3)), EDGES),
    wrong("an edge of NaN", mass((0, NAN, 5)), EDGES),
    wrong("an edge below 0", mass((-3, 3)), EDGES),
    wrong("edges in words", mass("09"), EDGES),
    wrong(
        "one layer",
        mass(layers=0),
        "`layers` must be a sequence of integers. Received: layers=0",
        TypeError,
    ),
    wrong("half a layer", mass(layers=(0.5,)), r"\(0.5,\)", TypeError),
    wrong("a layer of true", mass(layers=(True,)), r"\(True,\)", TypeError),
    wrong(
        "a whole batch as inputs",
        mass(inputs=(make_inputs(), 0, 0)),
        "`inputs` must be a dictionary.*Received: tuple.*the first element",
        TypeError,
    ),
    wrong(
        "inputs without a mask",
        mass(inputs=WITHOUT_MASK),
        r"`inputs` must have .*without \['response_mask'\]",
    ),
    wrong(
        "inputs without a prompt",
        mass(inputs=UNANSWERED),
        "Each example must have a prompt",
    ),
    wrong(
        "a signal of inputs without a prompt",
        lambda model: spectral.attention_by_distance(model, UNANSWERED),
        "Each example must have a prompt",
    ),
    wrong(
        "a signal of a list",
        lambda model: spectral.attention_by_distance(model, [make_inputs()]),
        "`inputs` must be a dictionary.*Received: list",
        TypeError,
    ),
    wrong(
        "shares of nothing",
        lambda model: spectral.frequency_shares(model, {}),
        r"`inputs` must have .*Received: \[\]",
    ),
    wrong(
        "activations of no size",
        lambda model: spectral.head_activations(model, {}),
        r"one or more numbers above 0. Received: \[\]",
    ),
    wrong(
        "activations of one batch",
        lambda model: spectral.head_activations(model, [make_inputs()]),
        "`inputs_by_size` must be a dictionary",
        TypeError,
    ),
    wrong(
        "activations beyond none",
        lambda model: spectral.head_activations(model, {}, beyond=None),
        "`beyond` must be a number",
        TypeError,
    ),
    wrong(
        "a signal of another family",
        lambda model: spectral.attention_by_distance(
            keras.Sequential(), make_inputs()
        ),
        "The model must be a `keras_hub.models.PaliGemmaCausalLM`.*Sequential",
    ),
    wrong(
        "wavelengths of layer 2 of 2",
        lambda model: spectral.rotary_wavelengths(model, 2),
        "`layer` must be an index of the model's 2 decoder layers.*layer=2",
    ),
    wrong(
        "wavelengths of no layer",
        lambda model: spectral.rotary_wavelengths(model, None),
        "Received: layer=None",
    ),
    wrong(
        "wavelengths of a linear layer",
        lambda model: spectral.rotary_wavelengths(small_models.qwen_3_5(), 0),
        "must have one set of rotary frequencies.*layer=0 of a 'qwen3_5",
    ),
    wrong(
        "wavelengths that depend on the length",
        lambda model: spectral.rotary_wavelengths(small_models.phi_3()),
        "must have one set of rotary frequencies.*layer=-1 of a 'phi3",
    ),
    wrong(
        "wavelengths of a name",
        lambda model: spectral.rotary_wavelengths("pali_gemma"),
        "The model's family must be known.*Received",
    ),
    wrong(
        "gains of nothing",
        lambda model: spectral.rotary_gains(None),
        "The model's family must be known",
    ),
]


@pytest.mark.parametrize("call, words, error", OF_MODELS)
def test_calls_with_models_are_refused(model, call, words, error):
    with pytest.raises(error, match=words):
        call(model)


PLOTS = {
    "accuracy": lambda path: haystacks.plot_accuracy(path, {}),
    "masses": lambda path: spectral.plot_attention_mass(path, {}, (0, 4), 4),
    "powers": lambda path: spectral.plot_spectra(path, SIGNAL, {}),
    "values": lambda path: spectral.plot_intervals(path, {}, "share"),
    "shares": lambda path: spectral.plot_frequency_shares(path, SIGNAL, {}),
    "agreements": lambda path: spectral.plot_band_agreement(path, (0, 0.5), {}),
    "activations": lambda path: spectral.plot_head_activations(path, {}, {}),
    "mixtures": lambda path: spectral.plot_head_mixtures(path, {}),
    "gains": lambda path: spectral.plot_gains(path, SIGNAL, {}),
    "found": lambda path: spectral.plot_retrieval_heads(path, {}),
    "history": lambda path: distillation.plot_terms(
        path, {"accuracy": [1.0]}, 9
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_pictures_of_nothing_are_refused(tmp_path, name):
    path = tmp_path / "picture.png"
    path.write_bytes(b"kept")
    with pytest.raises(ValueError, match=f"`{name}` must"):
        PLOTS[name](path)
    assert path.read_bytes() == b"kept"
    assert not plt.get_fignums()


VALUES = np.ones((2, 3))
FOUND = RetrievalHeads(
    ((0, 1),),
    VALUES,
    0.5,
    {"text": HeadStatistics(VALUES, VALUES, VALUES, VALUES * NAN)},
)
OF_HEADS = [
    wrong(
        "heads that were not found",
        {"found": {"teacher": FOUND, "student": None}, "value": "score"},
        r"`found\['student'\]` must be what.*Received.*NoneType. Leave it out",
        TypeError,
    ),
    wrong(
        "heads by their weight",
        {"value": "weight"},
        "`value` must be one of .*'needle'.*Received: value='weight'",
    ),
    wrong("heads by several values", {"value": ["mass"]}, "`value` must be"),
    wrong(
        "heads in rows without statistics",
        {"rows": "image", "value": "mass"},
        r"`rows` must be one of \['text'\]. Received: rows='image'",
    ),
    wrong(
        "heads by unknown needles",
        {},
        r"`found\['teacher'\]` must have some numbers.*Received: "
        "value='needle'.*Pass another",
    ),
]


@pytest.mark.parametrize("changes, words, error", OF_HEADS)
def test_pictures_of_heads_are_refused(tmp_path, changes, words, error):
    path = tmp_path / "picture.png"
    arguments = {"found": {"teacher": FOUND}} | changes
    with pytest.raises(error, match=words):
        spectral.plot_retrieval_heads(path, **arguments)
    assert not path.exists()
    assert not plt.get_fignums()
