"""The window extension study: the hidden labels, and the tables."""

import csv

import keras
import numpy as np
import pytest

import keras_laid
from benchmarks import rows
from benchmarks.window_extension import __main__ as runner
from benchmarks.window_extension import methods as study
from benchmarks.window_extension import retrieval_methods
from benchmarks.window_extension import tables
from benchmarks.window_extension.data import IGNORED
from benchmarks.window_extension.data import make_data
from benchmarks.window_extension.settings import Settings
from benchmarks.window_extension.settings import names_of_configs
from benchmarks.window_extension.settings import read_settings
from tests.support import make_preprocessor
from tests.support import to_numpy


def settings(**kwargs):
    defaults = dict(
        name="a", description="", methods=[], labelled=12, sizes=[1, 3]
    )
    return Settings(**defaults | dict(batch_size=8) | kwargs)


def data(uses_unlabelled=True, stretching=None, teacher_images=None, **kwargs):
    return make_data(
        settings(**kwargs),
        make_preprocessor(),
        uses_unlabelled,
        stretching,
        seed=0,
        teacher_images=teacher_images,
    )


def test_unlabelled_questions_do_not_tell_their_answers():
    with_answers = data(labelled=0, unlabelled=24)
    plain = with_answers.haystacks
    for index in range(len(with_answers)):
        x, y, weight = with_answers[index]
        _, answers, _ = plain[index]
        assert (y == IGNORED).all()
        assert (weight.sum(axis=1) == 1).all()
        response = x["response_mask"] > 0
        assert len(np.unique(x["token_ids"][response])) == 1
        # The hidden answers include both possible ones.
        first = weight.argmax(axis=1)
        assert len(np.unique(answers[np.arange(len(first)), first])) == 2


def test_half_of_a_batch_has_labels():
    joined = data(labelled=12, unlabelled=24)
    assert len(joined) == 6
    for index in range(len(joined)):
        x, y, weight = joined[index]
        labelled = (y != IGNORED).any(axis=1)
        assert labelled.tolist() == [True] * 4 + [False] * 4
        assert len(x["images"]) == len(weight) == len(y) == 8


def test_labelled_questions_in_a_batch():
    joined = data(labelled=12, unlabelled=24, labelled_in_batch=2)
    assert len(joined) == 4
    _, y, _ = joined[0]
    labelled = (y != IGNORED).any(axis=1)
    assert labelled.tolist() == [True] * 2 + [False] * 6


def test_without_a_teacher_only_labels_are_used():
    alone = data(uses_unlabelled=False, labelled=24, unlabelled=48)
    assert isinstance(alone, keras_laid.Haystacks)
    assert len(alone) == 3
    assert all((alone[index][1] != IGNORED).any() for index in range(3))


def test_without_labelled_questions_labels_alone_has_all_answers():
    arguments = dict(labelled=0, unlabelled=24)
    alone = data(uses_unlabelled=False, **arguments)
    assert isinstance(alone, keras_laid.Haystacks)
    hidden = data(**arguments)
    for index in range(3):
        x, y, _ = alone[index]
        assert (y != IGNORED).any()
        np.testing.assert_array_equal(x["images"], hidden[index][0]["images"])


def test_a_teacher_may_read_the_needle_alone():
    hidden = data(labelled=0, unlabelled=24, teacher_images=1)
    for index in range(len(hidden)):
        x, _, _ = hidden[index]
        rows = np.arange(len(x["needle"]))
        np.testing.assert_array_equal(
            x["teacher"]["images"], x["images"][rows, x["needle"]][:, None]
        )


def test_wrong_heads_do_not_retrieve():
    (matching, _) = study.METHODS["wrong_heads"].make_terms()
    drawn = set()
    for seed in range(5):
        keras.utils.set_random_seed(seed)
        heads = matching.named_heads(None)
        assert len({*heads}) == 3
        assert not {*heads} & {*retrieval_methods.RETRIEVING}
        drawn.add(heads)
    assert len(drawn) > 1


def test_targets_of_controls():
    shares = np.log([[[0.4, 0.1], [0.2, 0.1]]]).astype("float32")
    logs = {1: keras.ops.convert_to_tensor(shares)}
    x = {"needle": keras.ops.convert_to_tensor([1])}
    heads = ((1, 3),)

    def target(name):
        (matching, _) = study.METHODS[name].make_terms()
        return matching.teacher_retrieval(logs, heads, x)

    needle = target("true_needle")
    np.testing.assert_allclose(to_numpy(needle.shares), [[[0, 1], [0, 1]]])
    alike = target("retrieval_without_row_weights")
    np.testing.assert_allclose(to_numpy(alike.row_weight()), [[1, 1]])
    np.testing.assert_allclose(
        to_numpy(alike.shares), [[[0.8, 0.2], [2 / 3, 1 / 3]]], rtol=1e-5
    )


def test_variants_take_the_rate_of_what_they_vary():
    for name in names_of_configs():
        found = read_settings(name)
        known = {*found.methods, *found.ablation}
        assert {*found.tuned_methods.values()} <= known
        assert not {*found.tuned_methods} & {*found.tuned_methods.values()}


def test_stretched_positions_reach_both_halves():
    joined = data(
        stretching=keras_laid.PositionStretching(30, 4), unlabelled=24
    )
    x, _, _ = joined[0]
    assert len(x["positions"]) == 8
    before = x["positions"].copy()
    joined.on_epoch_end()
    assert (joined[0][0]["positions"] != before).any(axis=1).all()


@pytest.mark.parametrize("name", names_of_configs())
def test_configs_name_known_methods(name):
    found = read_settings(name)
    known = {*study.METHODS, *study.UNTRAINED}
    assert {*found.methods, *found.ablation} <= known


def test_methods_without_terms_of_the_teacher_have_none():
    has_teacher = {k: v.has_teacher for k, v in study.METHODS.items()}
    assert not has_teacher["sft_lora_stretched"]
    assert has_teacher["kd"] and has_teacher["without_kl"]


def test_a_prior_student_is_trained_once(tmp_path, monkeypatch):
    trained = []

    def train(method, prior, seed, learning_rate, student):
        trained.append(prior)
        bias = student.backbone.trainable_variables[-1]
        bias.assign(bias + 1.0)

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    config = settings(prior_steps=5, prior_sizes=[1, 9], steps=30)
    plain = study.prior_student(settings())
    students = [study.prior_student(config) for _ in range(2)]
    (prior,) = trained
    assert (prior.steps, prior.sizes, prior.labelled) == (5, [1, 9], 40)
    last, *others = (
        to_numpy(model.backbone.trainable_variables[-1])
        for model in (plain, *students)
    )
    for other in others:
        np.testing.assert_allclose(other, last + 1.0)


def test_after_steps_variables_have_their_values():
    model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1), "mean_absolute_error")
    model.build((None, 1))
    (kernel,) = model.weights
    kernel.assign([[0.0]])
    seen = {}

    def look(done, trained):
        assert trained is model
        seen[done] = to_numpy(kernel).item()

    # The gradient is -1 until the kernel is 10, so each step adds 0.1.
    model.fit(
        np.ones((12, 1)),
        np.full((12, 1), 10.0),
        batch_size=3,
        epochs=2,
        callbacks=[study.AfterSteps({2, 5}, look)],
        verbose=0,
    )
    assert seen == pytest.approx({2: 0.2, 5: 0.5})


def write_rows(path, accuracies, steps=9):
    """One row for each method and seed; accuracy falls linearly in log size."""
    for (method, seed), falls_by in accuracies.items():
        row = dict(config="a", method=method, seed=seed)
        row |= dict(split="test", steps=steps)
        row |= {
            f"accuracy_{size}": 1.0 - falls_by * np.log10(size)
            for size in tables.SIZES
        }
        rows.append_row(path, row)


def test_tables_have_means_intervals_and_ratios(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", tmp_path / "rows.csv")
    write_rows(
        tables.ROWS,
        {
            ("untouched", 0): 0.2,
            ("untouched", 1): 0.2,
            ("sft", 0): 0.1,
            ("sft", 1): 0.2,
        },
    )
    by_method = tables.read_runs()["a"]
    table = tables.make_table(by_method, ["untouched", "sft", "never_run"])
    _, _, untouched, sft = table.split("\n")
    assert untouched.startswith("| untouched | 2 | 1.000 ± 0.000 |")
    assert untouched.endswith("| 1.0 (1.0 to 1.0) |")
    # Accuracies at 10 images are 0.9 and 0.8. With one degree of freedom,
    # t is 12.7.
    assert "| 0.850 ± 0.635 |" in sft
    # Windows of 10 ** 0.75 and 10 ** 0.375: ratios of 10 ** 0.375 and 1.
    assert f"| {10 ** (0.375 / 2):.1f} (" in sft


def test_accuracy_over_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", tmp_path / "rows.csv")
    write_rows(tables.ROWS, {("sft", 0): 0.0, ("sft", 1): 0.0, ("kd", 0): 0.1})
    write_rows(tables.ROWS, {("sft", 0): 0.1, ("kd", 0): 0.2}, steps=4)
    write_rows(tables.ROWS, {("never_ended", 0): 0.2}, steps=4)
    last = tables.read_runs()["a"]
    assert last.keys() == {"sft", "kd"}
    assert last["sft"][0][100] == 1.0 and len(last["sft"]) == 2
    config = settings(
        methods=["kd", "sft", "never_ended"], steps=9, measured_at=[4]
    )
    header, _, *lines = tables.make_steps_table(config).split("\n")
    assert header == "| images | method | 4 | 9 | steps to 0.9 |"
    assert len(lines) == 2 * len(tables.STEPS_SIZES)
    assert lines[-2:] == [
        "| 100 | kd | 0.600 | 0.800 | never |",
        "| 100 | sft | 0.800 | 1.000 ± 0.000 | 9 |",
    ]


def test_steps_until_an_accuracy_is_reached():
    by_steps = {
        100: {0: {5: 0.8}, 1: {5: 0.92}, 2: {5: 0.5}},
        200: {0: {5: 0.9}, 1: {5: 0.7}, 2: {5: 0.6}},
    }
    assert tables.steps_until(by_steps, 5) == "100 to 200 (2 of 3 seeds)"
    by_steps[200][2] = {5: 0.95}
    assert tables.steps_until(by_steps, 5) == "100 to 200"
    del by_steps[100][0], by_steps[100][1]
    assert tables.steps_until(by_steps, 5) == "200"


def test_sizes_that_were_not_measured_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", tmp_path / "rows.csv")
    row = dict(config="a", method="kd", seed=0, split="test", steps=4)
    row |= {f"accuracy_{size}": "" for size in tables.SIZES}
    rows.append_row(tables.ROWS, row | {"accuracy_5": 0.75})
    assert tables.read_steps()["a", "kd", 4] == {0: {5: 0.75}}
    config = settings(measured_sizes=[5])
    assert tables.sizes_over_steps(config) == [5]


def test_rows_done_are_known(tmp_path):
    path = tmp_path / "rows.csv"
    row = dict(method="kd", seed=3, learning_rate=7e-4)
    assert not rows.is_done(path, row, ("method", "seed"))
    rows.append_row(path, row)
    rows.append_row(path, row | dict(seed=4))
    assert rows.is_done(path, row, tuple(row))
    assert not rows.is_done(path, row | dict(seed=5), ("method", "seed"))
    with path.open() as file:
        assert [r["seed"] for r in csv.DictReader(file)] == ["3", "4"]


def test_learning_rates_are_chosen_by_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PATH", tmp_path / "rows.csv")
    row = dict(config="short_200", method="kd", split="validation")
    for rate, accuracy in ((7e-4, 0.8), (1.5e-3, 0.9)):
        sizes = {f"accuracy_{size}": accuracy for size in tables.SIZES}
        rows.append_row(runner.PATH, row | dict(learning_rate=rate) | sizes)
    assert runner.best_learning_rate(read_settings("short_200"), "kd") == 1.5e-3
    later = settings(tuned_as="short_200")
    assert runner.best_learning_rate(later, "kd") == 1.5e-3
    with pytest.raises(ValueError, match="must have been tried"):
        runner.best_learning_rate(settings(), "kd")
