import csv
import dataclasses
import functools
import inspect
import json

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
import pytest

import keras_laid
from keras_laid import Digits
from keras_laid import HaystackEvaluation
from keras_laid import draw_haystacks
from keras_laid import evaluate_haystacks
from keras_laid.backbones.image_prompts import ImagePrompts
from keras_laid.backbones.prompt_forms import prompt_form
from keras_laid.haystacks import Haystack
from keras_laid.haystacks import HaystackResults
from keras_laid.haystacks import plots
from keras_laid.haystacks.asking import Asking
from keras_laid.haystacks.asking import check_asking
from tests.backbones import small_models
from tests.haystacks.families import PREPROCESSORS
from tests.haystacks.families import make_pair
from tests.support import NO_XLA
from tests.support import make_coco
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import make_preprocessor
from tests.support import to_numpy


def digits(num_questions=24, sizes=(1, 3), seed=0, **kwargs):
    return list(
        draw_haystacks(
            Digits("test"), num_questions, sizes, seed=seed, **kwargs
        )
    )


def evaluate(model, haystacks, **kwargs):
    return evaluate_haystacks(model, haystacks, verbose=False, **kwargs)


def knower(haystacks, answer):
    """Makes a function that looks up each haystack by its images."""
    known = {h.images.tobytes(): h for h in haystacks}

    def function(images, prompts):
        return [answer(known[np.asarray(i).tobytes()]) for i in images]

    return function


def opposite(answer):
    return "no" if answer == "yes" else "yes"


@pytest.fixture(scope="module")
def student():
    return keras_hub.models.PaliGemmaCausalLM.from_preset(
        keras_laid.presets.STUDENT
    )


# Correct answers.


@pytest.mark.extra_large_but_on("torch")
def test_logits_and_words_agree(student):
    haystacks = digits(32, sizes=(2, 5))
    logits, words = (
        evaluate(student, haystacks, through=through)
        for through in ("logits", "generate")
    )
    assert [r["answer"].strip() for r in logits.records] == [
        r["answer"].strip() for r in words.records
    ]
    assert logits.accuracy == words.accuracy
    assert 0.8 < logits.accuracy[2] <= 1.0
    assert 0.9 < logits.compliance[5] <= 1.0
    # A model that says yes or no says the more likely of the two.
    choice = evaluate(student, haystacks, through="choice")
    for one, other in zip(logits.records, choice.records, strict=True):
        assert not one["complied"] or one["answer"] == other["answer"]


@pytest.mark.extra_large_but_on("torch")
def test_an_untrained_model_answers_neither_yes_nor_no():
    # The model may say any token of the vocabulary, so chance is not 0.5.
    model = make_pali_gemma(None, make_preprocessor())
    haystacks = digits(20)
    strict = evaluate(model, haystacks, tokens_per_batch=128)
    assert max(strict.accuracy.values()) < 0.3
    assert max(strict.compliance.values()) < 0.3
    choice = evaluate(model, haystacks, through="choice")
    assert {r["answer"] for r in choice.records} <= {"yes", "no"}
    assert min(choice.accuracy.values()) > max(strict.accuracy.values())
    for record in choice.records:
        assert record["right"] == (record["answer"] == record["expected"])
    assert choice.compliance is None


def test_yes_or_no_is_right_for_the_official_rule_alone():
    haystacks = digits()

    def both(images, prompts):
        return ["Yes or no."] * len(prompts)

    strict = evaluate(both, haystacks, through="generate")
    assert set(strict.accuracy.values()) == {0.0}
    assert set(strict.compliance.values()) == {0.0}
    official = evaluate(both, haystacks, through="generate", rule="official")
    assert set(official.accuracy.values()) == {1.0}
    assert set(official.compliance.values()) == {1.0}


def test_prompts_by_name_and_of_ones_own():
    asked = []

    def function(images, prompts):
        asked.extend(prompts)
        return ["yes"] * len(prompts)

    haystack = digits(1)[0]
    for prompt in ("question", "official", "{images}answer en {question}\n"):
        evaluate(function, [haystack], through="generate", prompt=prompt)
    assert asked == [
        haystack.question,
        "You are given a set of images. Please answer the following question "
        f"in Yes or No: {haystack.question}",
        f"answer en {haystack.question}\n",
    ]


@pytest.mark.extra_large_but_on("tensorflow", "torch")
def test_logits_are_those_that_training_reads(student):
    haystacks = digits(6, sizes=(4,))
    images = np.stack([h.images for h in haystacks])
    texts = [h.question for h in haystacks]
    found = ImagePrompts(student).first_logits(images, texts)
    model = keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm(student)
    x, _, weight = model.preprocessor(
        {
            "images": images,
            "prompts": texts,
            "responses": [h.answer for h in haystacks],
        }
    )
    first = np.argmax(to_numpy(weight) > 0, axis=1)
    expected = to_numpy(model(x))[np.arange(6), first]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_long_prompt_is_not_cut(student):
    # The preset's preprocessor has room for 16 tokens. The difference is last.
    prompts = ImagePrompts(student)
    images = np.stack([digits(1)[0].images] * 2)
    texts = ["and what " * 40 + question for question in ("a six", "a two")]
    one, other = prompts.first_logits(images, texts)
    assert np.abs(one - other).max() > 1e-3
    assert student.preprocessor.sequence_length == 16


def test_examples_of_the_dataset_are_haystacks():
    haystack = digits(1)[0]
    example = {
        "id": b"0",
        "question": haystack.question.encode(),  # As tfds gives strings.
        "answer": haystack.answer.encode(),
        "anchor": haystack.anchor.encode(),
        "target": haystack.target,
        "needles": np.array(haystack.needles),
        "images": haystack.images,
    }
    assert Haystack.from_example(example) == haystack


# Statistics.


def test_positions_and_sizes():
    haystacks = digits(400, sizes=(1, 2, 5, 12))

    def first_half(haystack):
        middle = (haystack.needles[0] + 0.5) / len(haystack.images)
        right = middle < 0.5
        return haystack.answer if right else opposite(haystack.answer)

    results = evaluate(
        knower(haystacks, first_half), haystacks, through="generate"
    )
    assert results.questions == {1: 100, 2: 100, 5: 100, 12: 100}
    positions = results.by_position(bins=4)
    assert [len(parts) for parts in positions.values()] == [1, 2, 4, 4]
    assert [p.accuracy for p in positions[2]] == [1.0, 0.0]
    assert [p.accuracy for p in positions[12]] == [1.0, 1.0, 0.0, 0.0]
    for size, parts in positions.items():
        assert sum(part.questions for part in parts) == 100
        assert parts[0].low == 0.0 and parts[-1].high == 1.0
        right = sum((p.accuracy or 0) * p.questions for p in parts)
        assert right / 100 == pytest.approx(results.accuracy[size])
    in_first_part = sum(
        h.needles[0] < 3 for h in haystacks if len(h.images) == 12
    )
    assert positions[12][0].questions == in_first_part


def test_an_image_is_in_the_part_that_its_middle_is_in():
    haystacks = digits(40, sizes=(5,))
    results = evaluate(
        knower(haystacks, lambda h: h.answer), haystacks, through="generate"
    )
    middles = np.array([(h.needles[0] + 0.5) / 5 for h in haystacks])
    for part in results.by_position(bins=4)[5]:
        inside = (part.low <= middles) & (middles < part.high)
        assert part.questions == inside.sum()


def test_several_needles_count_once_each():
    haystacks = digits(30, sizes=(6,), needles=(2,))
    results = evaluate(
        knower(haystacks, lambda h: h.answer), haystacks, through="generate"
    )
    parts = results.by_position(bins=3)[6]
    assert sum(part.questions for part in parts) == 60
    assert results.questions == {6: 30}


@pytest.mark.extra_large_but_on("torch")
def test_order_does_not_matter(student):
    haystacks = digits(40, sizes=(1, 3))
    shuffled = [haystacks[i] for i in np.random.default_rng(0).permutation(40)]
    one, other = evaluate(student, haystacks), evaluate(student, shuffled)
    assert one.accuracy == other.accuracy
    assert one.by_position() == other.by_position()


def fake_results(right, size=1):
    records = tuple(
        dict(index=i, size=size, needles=[0], right=bool(r), complied=True)
        for i, r in enumerate(right)
    )
    return HaystackResults(records, {"through": "logits"})


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        results = fake_results(rng.random(100) < 0.8)
        low, high = results.intervals(0.9, resamples=400)[1]
        covered += low <= 0.8 <= high
    assert 0.84 < covered / 400 < 0.96


def test_intervals_follow_confidence_and_seed():
    results = fake_results(np.arange(100) % 4 > 0)
    narrow, wide = (results.intervals(c)[1] for c in (0.5, 0.99))
    assert wide[0] < narrow[0] < 0.75 < narrow[1] < wide[1]
    assert results.intervals(seed=1) == results.intervals(seed=1)
    # A normal distribution's interval, up to the resolution of 100 questions.
    low, high = results.intervals()[1]
    assert high - low == pytest.approx(2 * 1.96 * 0.0433, abs=0.021)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: r.intervals(1.0), "`confidence` must be in"),
        (lambda r: r.intervals(resamples=0), "`resamples` must be"),
        (lambda r: r.by_position(0), "`bins` must be"),
    ],
)
def test_results_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(fake_results([True]))


# Files and resumed runs.


class Interrupted(Exception):
    pass


def test_goes_on_after_an_interruption(tmp_path):
    haystacks = digits(60, sizes=(1, 4))
    asked = []

    def function(images, prompts):
        if stop and len(asked) >= 20:
            raise Interrupted
        asked.extend(prompts)
        return [("yes", "no")[len(p) % 2] for p in prompts]

    def run(output):
        return evaluate(
            function,
            haystacks,
            through="generate",
            tokens_per_batch=10 * 1056,  # 36 questions of 1 image, 10 of 4.
            output=output,
        )

    stop = False
    whole = run(tmp_path / "whole")
    asked.clear()
    stop = True
    with pytest.raises(Interrupted):
        run(tmp_path / "cut")
    path = tmp_path / "cut" / "answers.jsonl"
    answered = len(path.read_text().splitlines())
    assert 0 < answered < 60
    assert not (tmp_path / "cut" / "results.csv").exists()
    with path.open("a") as file:
        file.write('{"index": 59, "size"')  # Cut off by the crash.
    stop = False
    asked.clear()
    resumed = run(tmp_path / "cut")
    assert len(asked) == 60 - answered
    assert resumed == whole
    asked.clear()
    assert run(tmp_path / "cut") == whole
    assert not asked
    for name in ("results.csv", "results.json"):
        one, other = (tmp_path / run / name for run in ("whole", "cut"))
        assert one.read_text() == other.read_text()


def test_files(tmp_path):
    haystacks = digits(40, sizes=(1, 4))
    # One question of each size gets another answer than yes or no.
    wrong = {len(h.images): id(h) for h in haystacks}.values()
    results = evaluate(
        knower(haystacks, lambda h: "?" if id(h) in wrong else h.answer),
        haystacks,
        through="generate",
        output=tmp_path,
    )
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["size"] for row in rows] == ["1", "4"]
    assert [float(row["accuracy"]) for row in rows] == [0.95, 0.95]
    assert [int(row["questions"]) for row in rows] == [20, 20]
    intervals = {
        int(r["size"]): (float(r["low"]), float(r["high"])) for r in rows
    }
    assert intervals == results.intervals()
    assert all(low < high for low, high in intervals.values())
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"]["rule"] == "strict"
    assert len(content["positions"]["4"]) == 4
    for name in ("accuracy.png", "positions.png"):
        assert (tmp_path / name).stat().st_size > 5000
    record = json.loads((tmp_path / "answers.jsonl").read_text().split("\n")[0])
    assert record == results.records[record["index"]]
    assert keras_laid.effective_window(results.accuracy).censored == "above"


def test_integers_of_numpy_are_written(tmp_path):
    haystack = digits()[0]
    haystack = dataclasses.replace(
        haystack, needles=tuple(map(np.int64, haystack.needles))
    )
    arguments = dict(
        through="generate", max_answer_tokens=np.int64(4), output=tmp_path
    )
    function = knower([haystack], lambda h: "yes")
    one = evaluate(function, [haystack], **arguments)
    assert evaluate(function, [haystack], **arguments) == one


def test_a_cell_of_the_picture_stands_where_the_needle_was(monkeypatch):
    figures = []
    monkeypatch.setattr(
        plots, "finish", lambda figure, _: figures.append(figure)
    )
    haystacks = digits(40, sizes=(1, 4))
    # Answers are right if the needle is in the first half of the images.
    results = evaluate(
        knower(
            haystacks,
            lambda h: (
                h.answer
                if 2 * h.needles[0] < len(h.images)
                else opposite(h.answer)
            ),
        ),
        haystacks,
        through="generate",
    )
    plots.plot_positions("nowhere.png", results)
    axes = figures[0].axes[0]
    assert axes.get_xlim() == (0, 1)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert dict(zip(labels, axes.get_xticks(), strict=True)) == {
        "first image": 0,
        "middle": 0.5,
        "last image": 1,
    }
    for mesh in axes.collections:
        np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 0], 0.0)
        np.testing.assert_allclose(mesh.get_coordinates()[:, -1, 0], 1.0)
        assert mesh.get_clim() == (0, 1)
    np.testing.assert_allclose(figures[0].axes[1].get_yticks(), [0, 0.5, 1])
    row_texts = [text for text in axes.texts if text.get_position()[1] == 1]
    assert len(row_texts) == 4
    for text in row_texts:
        first_half = text.get_position()[0] < 0.5
        assert text.get_text() == ("1.00" if first_half else "0.00")
    plt.close(figures[0])


def begin(tmp_path, haystacks):
    function = knower(haystacks, lambda h: "yes")
    evaluate(function, haystacks, through="generate", output=tmp_path)
    return function


def test_refuses_answers_to_other_questions(tmp_path):
    haystacks = digits()
    function = begin(tmp_path, haystacks)
    arguments = dict(through="generate", output=tmp_path)
    for others in (
        digits(seed=1),
        haystacks[1:],
        # The same questions about other drawings.
        list(draw_haystacks(Digits("validation"), 24, (1, 3), seed=0)),
    ):
        with pytest.raises(ValueError, match="resumed with the same haystacks"):
            evaluate(function, others, **arguments)
    with pytest.raises(ValueError, match="has 4 more. Pass all"):
        evaluate(function, haystacks[:20], **arguments)


def test_refuses_answers_to_another_way_of_asking(tmp_path):
    haystacks = digits()
    function = begin(tmp_path, haystacks)
    for change in (
        dict(prompt="official"),
        dict(rule="official"),
        dict(max_answer_tokens=9),
    ):
        with pytest.raises(ValueError, match="resumed with the same settings"):
            evaluate(
                function,
                haystacks,
                through="generate",
                output=tmp_path,
                **change,
            )


def test_refuses_answers_of_other_weights(tmp_path):
    haystacks = digits(4)
    preprocessor = make_preprocessor()
    model = make_pali_gemma(None, preprocessor)
    one = evaluate(model, haystacks, output=tmp_path)
    assert evaluate(model, haystacks, output=tmp_path) == one
    kernel = model.backbone.transformer_layers[-1].trainable_variables[0]
    kernel.assign(kernel + 0.01)
    with pytest.raises(ValueError, match="Received: model=.*weights"):
        evaluate(model, haystacks, output=tmp_path)


def test_refuses_answers_in_another_state(tmp_path):
    """Scopes, scaling of images, and one number in the embedding table."""
    haystacks = digits(4)
    model = make_pali_gemma(None, make_preprocessor())
    one = evaluate(model, haystacks, output=tmp_path)

    def again():
        return evaluate(model, haystacks, output=tmp_path)

    refused = functools.partial(
        pytest.raises, ValueError, match="Received: model="
    )
    for scope in (
        keras_laid.yarn(model, factor=8.0, original_length=10),
        keras_laid.self_extend(model, group_size=2, neighbor_window=4),
        keras_laid.rotary_positions(model, np.arange(36)),
    ):
        with scope, refused():
            again()
    converter = model.preprocessor.image_converter
    scale, converter.scale = converter.scale, 1 / 255
    with refused():
        again()
    converter.scale = scale
    assert again() == one
    table = model.backbone.token_embedding.embeddings
    values = to_numpy(table).copy()
    values[7, 3] += 0.01
    table.assign(values)
    with refused():
        again()


def test_refuses_answers_about_other_photographs(tmp_path):
    make_coco(tmp_path / "one")
    make_coco(tmp_path / "other")
    coco = keras_laid.haystacks.Coco(tmp_path / "one", "train")
    haystacks = list(draw_haystacks(coco, 2, (1,)))
    model = make_pali_gemma(None, make_preprocessor())
    arguments = dict(output=tmp_path / "output", verbose=False)
    one = evaluate_haystacks(
        model, haystacks, root=tmp_path / "one", **arguments
    )
    with pytest.raises(ValueError, match="Received: root="):
        evaluate_haystacks(
            model, haystacks, root=tmp_path / "other", **arguments
        )
    root = tmp_path / "other" / ".." / "one"
    assert evaluate_haystacks(model, haystacks, root=root, **arguments) == one


def test_refuses_a_broken_record(tmp_path):
    haystacks = digits()
    function = begin(tmp_path, haystacks)
    path = tmp_path / "answers.jsonl"
    path.write_text("not JSON\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 of .*Delete the line"):
        evaluate(function, haystacks, through="generate", output=tmp_path)


# Refused calls.


def yes(images, prompts):
    return ["yes"] * len(prompts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(through="telepathy"), "`through` must be one of"),
        (dict(rule="lenient", through="generate"), "`rule` must be one of"),
        (dict(rule="official"), "Only the strict rule is defined for logits"),
        (dict(prompt="Well?"), "`prompt` must be one of"),
        (dict(through="logits"), "A function answers in words"),
        (dict(through="generate", max_answer_tokens=0), "must be at least 1"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(yes, digits(), **arguments)


def test_refuses_models_and_haystacks_it_cannot_ask():
    haystacks = digits(4)
    with pytest.raises(ValueError, match="one of .*PaliGemmaCausalLM.*Gemma3"):
        evaluate(keras.Sequential(), haystacks)
    with pytest.raises(ValueError, match="must have a preprocessor"):
        evaluate(make_pali_gemma(), haystacks)
    model = make_pali_gemma(None, make_preprocessor())
    with pytest.raises(ValueError, match="stand before all text"):
        evaluate(model, haystacks, prompt="{question}{images}")
    with pytest.raises(ValueError, match="must have the size that the model"):
        evaluate(model, draw_haystacks(Digits("test", 32), 4, (1,)))
    with pytest.raises(ValueError, match="at least one haystack"):
        evaluate(model, iter(()))
    paths = Haystack("Q?", "yes", "a", "b", (0,), ["val2017/1.jpg"])
    with pytest.raises(ValueError, match="`root` must be given"):
        evaluate(model, [paths])
    with pytest.raises(ValueError, match="one answer a prompt"):
        evaluate(lambda images, prompts: [], haystacks, through="generate")


# During training.


class Wrapper(keras.Model):
    """A model in training with a student, as distillers have."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def call(self, inputs):
        return self.student(inputs)


def compiled(model):
    model.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **NO_XLA,
    )
    return model


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("itself", marks=pytest.mark.extra_large_but_on("torch")),
        pytest.param("student", marks=pytest.mark.extra_large_but_on("jax")),
        pytest.param(
            "distiller", marks=pytest.mark.extra_large_but_on("torch")
        ),
    ],
)
def test_callback_sees_current_weights(kind, tmp_path, capsys):
    preprocessor = make_preprocessor()
    student = make_multi_image(None, preprocessor)
    # One epoch is enough to change the model's answers.
    data = make_haystacks(preprocessor, num_questions=32)
    if kind == "distiller":
        model = keras_laid.DistanceWeightedAttentionDistillation(
            teacher=make_multi_image(None, preprocessor, seed=1),
            student=student,
            retrieval_weight=0.0,
        )
        model.compile(keras.optimizers.SGD(0.5), **NO_XLA)
    else:
        model = compiled(student if kind == "itself" else Wrapper(student))
    haystacks = digits(16)
    evaluation = HaystackEvaluation(haystacks, every=2)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(evaluation.results)

    log = tmp_path / "log.csv"
    history = model.fit(
        data,
        epochs=3,
        verbose=0,
        callbacks=[evaluation, Watch(), keras.callbacks.CSVLogger(log)],
    )
    after = evaluate(student, haystacks)
    # Epochs 1 and 3 are evaluated, and weights had changed in between.
    assert seen[0] is seen[1] and seen[1] is not seen[2]
    assert seen[2].records == after.records
    assert [r["answer"] for r in seen[0].records] != [
        r["answer"]
        for r in evaluate(
            make_pali_gemma(None, preprocessor), haystacks
        ).records
    ]
    for size, accuracy in after.accuracy.items():
        found = history.history[f"haystack_accuracy_{size}"]
        assert len(found) == 2 and found[1] == accuracy
    assert "effective_window" in history.history
    assert "haystack_accuracy_3" in log.read_text().split("\n")[0]
    assert capsys.readouterr().out.count("haystack accuracy by images") == 2


def test_callback_reports_the_window_and_reads_a_function(student, capsys):
    evaluation = HaystackEvaluation(
        lambda: draw_haystacks(Digits("test"), 32, (1, 2)),
        model=student,
        verbose=False,
    )
    evaluation.set_model(keras.Sequential())
    evaluation.on_train_begin()
    logs = {}
    evaluation.on_epoch_end(0, logs)
    assert logs["effective_window"] == pytest.approx(
        keras_laid.effective_window(evaluation.results.accuracy).window
    )
    assert logs["haystack_accuracy_1"] > 0.8
    printed = capsys.readouterr()
    assert printed.out == "" and "haystacks:" not in printed.err


def test_callback_finds_no_window_below_chance(student):
    haystacks = digits(64, sizes=(10,))
    records = evaluate(student, haystacks).records
    failed = [
        haystack
        for haystack, record in zip(haystacks, records, strict=True)
        if not record["right"]
    ]
    evaluation = HaystackEvaluation(failed, model=student, verbose=False)
    evaluation.set_model(keras.Sequential())
    evaluation.on_train_begin()
    logs = {}
    evaluation.on_epoch_end(0, logs)
    assert logs == {"haystack_accuracy_10": 0.0, "effective_window": 0.0}


def test_a_batch_has_a_question_however_long():
    haystacks = digits(6)
    asked = []

    def model(images, prompts):
        asked.append(len(images))
        return ["yes"] * len(images)

    evaluate(model, haystacks, through="generate", tokens_per_batch=1)
    assert asked == [1] * 6


def test_callback_refuses():
    with pytest.raises(ValueError, match="readable in every epoch"):
        HaystackEvaluation(draw_haystacks(Digits("test"), 4, (1,)))
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        HaystackEvaluation([], every=0)


# Other families.


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize(
    "family",
    [small_models.gemma_3, small_models.gemma_4],
    ids=small_models.name_of,
)
def test_images_among_text_both_ways(family):
    preprocessor = PREPROCESSORS[family]()
    preprocessor.max_images_per_prompt = 2
    _, model = make_pair(family, preprocessor)
    model.preprocessor = preprocessor
    # More images than its own preprocessor takes.
    haystacks = digits(12, sizes=(1, 3, 5))
    prompt = "{images}{question}"
    logits = evaluate(model, haystacks, prompt=prompt)
    words = evaluate(model, haystacks, through="generate", max_answer_tokens=1)
    assert logits.questions == words.questions == {1: 4, 3: 4, 5: 4}
    for one, other in zip(logits.records, words.records, strict=True):
        special = one["answer"].startswith("<")  # Generated text drops them.
        said = "" if special else one["answer"].strip()
        # With a cache, tokens of an image do not see each other in KerasHub's
        # Gemma 4.
        if family is small_models.gemma_3:
            assert said == other["answer"].strip()
    assert model.preprocessor.max_images_per_prompt == 2
    # All images are seen: without one, the model says something else.
    prompts = ImagePrompts(model)
    images = np.stack([h.images for h in haystacks if len(h.images) == 5])
    texts = [prompts.fill("{question}", 5, question="is there?")] * len(images)
    seen = prompts.first_logits(images, texts)
    preprocessor = prompt_form(preprocessor).with_images(5)
    inputs = preprocessor.generate_preprocess(
        {"images": images, "prompts": texts}, sequence_length=96
    )
    last = to_numpy(inputs["padding_mask"]).sum(axis=1).astype(int) - 1
    whole = to_numpy(model({n: to_numpy(x) for n, x in inputs.items()}))
    expected = whole[np.arange(len(last)), last]
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)
    for place in range(5):
        blank = images.copy()
        blank[:, place] = 128
        assert np.abs(prompts.first_logits(blank, texts) - seen).max() > 1e-6
    # Gray images: haystacks of one size differ in their questions only.
    one_question = [
        dataclasses.replace(each, question="Is there?") for each in haystacks
    ]
    gray = evaluate(model, one_question, shown="none").records
    assert len({(record["size"], record["answer"]) for record in gray}) == 3
    # Every spelling of an answer that is a single token.
    for word in ("yes", "no"):
        texts = {prompts.text(t).strip() for t in prompts.first_tokens(word)}
        assert texts == {word, word.capitalize()}


@pytest.mark.parametrize("taker", [Asking, check_asking])
def test_defaults_are_those_of_evaluate_haystacks(taker):
    defaults = inspect.signature(evaluate_haystacks).parameters
    for name, parameter in inspect.signature(taker).parameters.items():
        assert parameter.default == defaults[name].default, name
