import numpy as np

from keras_laid import distillation
from keras_laid import haystacks
from keras_laid import spectral
from keras_laid.distillation import plots
from tests.support import attention_of
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor


def make_batch():
    return make_haystacks(make_preprocessor(), sizes=(3,))[0][0]


def test_shares_add_up_to_one():
    model = make_multi_image(vocabulary_size=60)
    edges = [0, 4, 8, 100]
    mass = spectral.attention_mass(model, make_batch(), edges, layers=(0, -1))
    np.testing.assert_allclose(mass.sum(), 1.0, rtol=1e-5)
    assert (mass > 0).all()


def test_uniform_attention_is_spread_evenly():
    model = make_multi_image(vocabulary_size=60)
    layer = attention_of(model)[-1]
    layer.query_dense.kernel.assign(0.0 * layer.query_dense.kernel)
    batch = make_batch()
    prompt = (batch["padding_mask"] - batch["response_mask"])[0].astype(bool)
    keys = np.r_[np.ones(12, bool), prompt]
    rows = 12 + np.flatnonzero(prompt)
    distance = np.abs(rows[:, None] - np.flatnonzero(keys))
    edges = [0, 3, 10, 99]
    expected = [
        ((distance >= near) & (distance < far)).mean()
        for near, far in zip(edges, edges[1:], strict=False)
    ]
    found = spectral.attention_mass(model, batch, edges)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_plots_are_drawn(tmp_path):
    accuracy = {"before": {1: 0.9, 10: 0.6}, "after": {1: 0.9, 10: 0.9}}
    haystacks.plot_accuracy(
        tmp_path / "a.png", accuracy, {"before": 3.0}, trained_on=4
    )
    losses = dict.fromkeys(("retrieval", "loss", "kl", "val_loss"), [2.0, 1.0])
    distillation.plot_terms(tmp_path / "t.png", losses, 5)
    spectral.plot_attention_mass(
        tmp_path / "m.png", {"before": np.array([0.7, 0.3])}, [0, 4, 8], 4
    )
    for name in "atm":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_term_has_a_panel(monkeypatch):
    figures = []
    monkeypatch.setattr(
        plots, "finish", lambda figure, _: figures.append(figure)
    )
    names = ("retrieval", "mine", "progress", "loss", "kl", "val_loss")
    plots.plot_terms("nowhere.png", dict.fromkeys(names, [2.0, 1.0]), 5)
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles == ["loss", "mine", "retrieval"]
