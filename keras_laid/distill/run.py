"""Runs a recipe: trains, evaluates and saves."""

import dataclasses
import json
import pathlib
from typing import Any

import keras
import keras_hub

from keras_laid.backbones.gain_modulation import attach_gain_modulation
from keras_laid.backbones.gain_modulation import fold_gain_modulation
from keras_laid.backbones.multi_image_pali_gemma import several_images
from keras_laid.backbones.prompt_forms import prompt_form
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.distill.recipe import Recipe
from keras_laid.distillation.distance_weighting import DistanceWeighting
from keras_laid.distillation.distiller import (
    DistanceWeightedAttentionDistillation,
)
from keras_laid.distillation.group_optimizer import group_optimizer
from keras_laid.distillation.plots import plot_terms
from keras_laid.distillation.position_stretching import PositionStretching
from keras_laid.distillation.resumable_training import ResumableTraining
from keras_laid.haystacks.evaluation import evaluate_haystacks
from keras_laid.haystacks.example_haystacks import example_haystacks
from keras_laid.haystacks.examples import read_examples
from keras_laid.haystacks.long_prompts import LongPrompts
from keras_laid.haystacks.plots import plot_accuracy


def distill(recipe: Recipe) -> dict[str, dict[int, float]]:
    """Distils a pair of presets by a recipe.

    Writes to the recipe's folder `output`: the state of training, from which
    another call resumes; `losses.csv` and `terms.png`; the accuracy before and
    after, with plots, if the recipe has an `[evaluation]`; and `student`, a
    plain KerasHub preset.

    Args:
        recipe: `keras_laid.distill.recipe.Recipe`.

    Returns:
        A dictionary from `"teacher"`, `"before"` and `"after"` to accuracy by
        size; empty without an evaluation.

    Raises:
        ValueError: If the folder `output` is that of another recipe, or if the
            recipe, an example or a model does not fit; before training starts
            where this can be known.
    """
    output = pathlib.Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    check_same(recipe, output / "recipe.json")
    keras.utils.set_random_seed(recipe.seed)
    teacher, student = load(recipe, "teacher"), load(recipe, "student")
    data = training_data(recipe, student)
    accuracy: dict[str, dict[int, float]] = {}
    for name, model in (("teacher", teacher), ("before", student)):
        accuracy |= measured(recipe, name, model)
    history = train(recipe, teacher, student, data)
    if recipe.training.gains:
        fold_gain_modulation(student)
    student.save_to_preset(str(output / "student"))
    plot_terms(output / "terms.png", history, len(data))
    accuracy |= measured(recipe, "after", student)
    if accuracy:
        plot_accuracy(
            output / "accuracy.png",
            accuracy,
            trained_on=max(recipe.data.sizes),
            chance=0.0,
        )
        text = json.dumps({"accuracy": accuracy}, indent=2)
        (output / "results.json").write_text(text + "\n")
    return accuracy


def check_same(recipe: Recipe, path: pathlib.Path) -> None:
    """Keeps the recipe with its results, and refuses another one there."""
    values = dataclasses.asdict(recipe)
    if not path.is_file():
        path.write_text(json.dumps(values, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    changed = sorted(key for key in values if values[key] != before.get(key))
    if changed:
        raise ValueError(
            "A run must be resumed with its own recipe. Received: another "
            f"{changed} than in {path}. Change `output`, or change the recipe "
            "back."
        )


def load(recipe: Recipe, which: str) -> keras.Model:
    settings = {} if recipe.dtype is None else {"dtype": recipe.dtype}
    return keras_hub.models.CausalLM.from_preset(
        getattr(recipe, which), **settings
    )


def training_data(recipe: Recipe, student: keras.Model) -> LongPrompts:
    data = recipe.data
    stretching = None
    if data.window is not None:
        form = prompt_form(student.preprocessor, image_size(student))
        image_length = form.position_length
        if not image_length:  # PaliGemma's images are apart from the text.
            image_length = student.backbone.image_sequence_length
        stretching = PositionStretching(data.window, image_length)
    return LongPrompts(
        read_examples(data.examples, data.root),
        student.preprocessor,
        sizes=data.sizes,
        num_prompts=data.prompts,
        batch_size=data.batch_size,
        stretching=stretching,
        image_size=image_size(student),
        max_length=data.max_length,
        teacher_images=data.teacher_images,
        seed=recipe.seed,
    )


def image_size(model: keras.Model) -> tuple[int, int] | None:
    """Height and width that images need, in pixels; `None` for text."""
    if not prompt_form(model.preprocessor).takes_images:
        return None
    return prompts_for(model).image_size


def measured(
    recipe: Recipe, name: str, model: keras.Model
) -> dict[str, dict[int, float]]:
    """Accuracy by size under a name; nothing without an evaluation."""
    evaluation = recipe.evaluation
    if evaluation is None:
        return {}
    print(f"Accuracy of {name}:", flush=True)
    results = evaluate_haystacks(
        model,
        example_haystacks(
            read_examples(evaluation.examples, evaluation.root),
            evaluation.questions * len(evaluation.sizes),
            evaluation.sizes,
            model,
            seed=recipe.seed,
        ),
        through="generate",
        rule=evaluation.rule,
        max_answer_tokens=evaluation.max_answer_tokens,
        output=pathlib.Path(recipe.output) / name,
    )
    return {name: results.accuracy}


def train(
    recipe: Recipe,
    teacher: keras.Model,
    student: keras.Model,
    data: LongPrompts,
) -> dict[str, list[float]]:
    """Trains the student in place; returns the history of all epochs."""
    training, terms = recipe.training, recipe.terms
    output = pathlib.Path(recipe.output)
    if training.gains:
        attach_gain_modulation(student)
    distiller = DistanceWeightedAttentionDistillation(
        several_images(teacher),
        several_images(student),
        DistanceWeighting(terms.strength),
        retrieval_weight=terms.retrieval_weight,
        attention_weight=terms.attention_weight,
        logits_weight=terms.logits_weight,
        supervised_weight=terms.supervised_weight,
    )
    steps = training.epochs * len(data)
    distiller.compile(
        optimizer=group_optimizer(
            student=adamw(recipe, training.learning_rate, steps),
            mixer=adamw(recipe, 10 * training.learning_rate, steps),
            gains=adamw(recipe, 10 * training.learning_rate, steps),
        ),
        rematerialize=training.rematerialize,
        linear_memory=training.linear_memory,
    )
    resumable = ResumableTraining(output / "training", data)
    callbacks: list[Any] = [
        resumable,
        keras.callbacks.CSVLogger(str(output / "losses.csv"), append=True),
    ]
    if training.tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(str(output / "logs")))
    distiller.fit(data, epochs=training.epochs, callbacks=callbacks)
    names = resumable.history[0]
    return {name: [logs[name] for logs in resumable.history] for name in names}


def adamw(recipe: Recipe, learning_rate: float, steps: int) -> keras.Optimizer:
    warmup = max(1, round(recipe.training.warmup * steps))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=learning_rate, warmup_steps=warmup
    )
    return keras.optimizers.AdamW(
        schedule, weight_decay=recipe.training.weight_decay, clipnorm=1.0
    )
