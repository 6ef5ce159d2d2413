"""Trains the embedded teacher and students from random weights.

    KERAS_BACKEND=jax python -m benchmarks.make_presets

Writes `digits_student`, `digits_single_image` and `digits_teacher` in
`keras_laid/presets`. Each stage saves its weights in `runs/make_presets/`. When
the script is started again, it resumes after the last finished stage, and
within a stage after the last epoch. `benchmarks.preset_scores` and
`benchmarks.report` add the scores to the model cards.
"""

import argparse
import dataclasses
import io
import pathlib

import keras
import keras_hub
import sentencepiece

from keras_laid.backbones.multi_image_pali_gemma import (
    MultiImagePaliGemmaCausalLM,
)
from keras_laid.distillation.position_stretching import PositionStretching
from keras_laid.haystacks.dataset import Haystacks
from keras_laid.haystacks.digits import NAMES
from keras_laid.haystacks.digits import Digits
from keras_laid.haystacks.drawing import draw_haystacks
from keras_laid.haystacks.evaluation import evaluate_haystacks
from keras_laid.haystacks.questions import article
from keras_laid.haystacks.questions import question

CAPTION_PROMPT = "What is in the image?"
EPOCHS = 10  # Of each stage, which can be resumed after each of them.


# An answer is only one bit about a haystack. Without the first two tasks, which
# say more, the questions could not be learned: models first name what an image
# shows, then what the needle shows besides the anchor.


class Captions(Haystacks):
    """Names both things that the needle shows."""

    def text(self, anchor, target, beside):
        one, other = sorted((anchor, beside), key=NAMES.index)
        return CAPTION_PROMPT, f"{article(one)} and {article(other)}"


class Retrieval(Haystacks):
    """Names what the needle shows besides the anchor."""

    def text(self, anchor, target, beside):
        prompt = f"For the image with {article(anchor)}, what is there?"
        return prompt, article(beside)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Supervised training on haystacks of some sizes."""

    task: type
    sizes: tuple  # Numbers of images.
    steps: int
    batch_size: int
    learning_rate: float  # Falls to a tenth along a cosine.
    window: int | None = None  # Images that positions are stretched over.
    augment: bool = True  # Whether digits are moved and dimmed.
    average: bool = False  # Whether weights are averaged over steps.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Size of a PaliGemma and how it is trained."""

    hidden_dim: int
    num_query_heads: int
    intermediate_dim: int  # KerasHub gates: the inner width is half of it.
    stages: tuple


RECIPES = {
    "digits_student": Recipe(
        hidden_dim=64,
        num_query_heads=2,
        intermediate_dim=256,
        stages=(
            Stage(Captions, (1,), 800, 64, 1e-3),
            Stage(Retrieval, (1, 2, 3, 5), 1500, 64, 1e-3),
            Stage(Haystacks, (1, 2, 3, 5), 2500, 64, 1e-3),
        ),
    ),
    "digits_single_image": Recipe(
        hidden_dim=64,
        num_query_heads=2,
        intermediate_dim=256,
        stages=(
            Stage(Captions, (1,), 800, 64, 1e-3),
            Stage(Haystacks, (1,), 2000, 64, 1e-3),
        ),
    ),
    "digits_teacher": Recipe(
        hidden_dim=128,
        num_query_heads=4,
        intermediate_dim=256,
        stages=(
            Stage(Captions, (1,), 800, 64, 1e-3),
            Stage(Retrieval, (1, 2, 5, 10), 1200, 48, 1e-3, window=150),
            Stage(Haystacks, (1, 5, 10, 20), 800, 32, 1e-3, window=150),
            Stage(Haystacks, (1, 20, 50, 100), 1500, 16, 7e-4, window=150),
            Stage(Haystacks, (1, 20, 50, 100), 1000, 16, 7e-4, 150, False),
            Stage(Haystacks, (20, 50, 100), 2000, 16, 7e-4, 150, average=True),
            Stage(Haystacks, (20, 50, 100), 2500, 16, 5e-4, 150, average=True),
        ),
    ),
}


CONSTANTS = {
    "digits_single_image": "SINGLE_IMAGE_STUDENT",
    "digits_student": "STUDENT",
    "digits_teacher": "TEACHER",
}


def sentence_piece(sentences, **kwargs):
    """The bytes of a SentencePiece model; `kwargs` go to its trainer."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=proto,
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


def make_preprocessor():
    """With a real SentencePiece vocabulary, trained on the questions."""
    sentences = [question(a, b) for a in NAMES for b in NAMES if a != b]
    sentences += ["yes", "no", "and what", CAPTION_PROMPT] * 50
    proto = sentence_piece(sentences, model_type="bpe", vocab_size=128)
    return keras_hub.models.PaliGemmaCausalLMPreprocessor(
        keras_hub.models.PaliGemmaTokenizer(proto=proto),
        keras_hub.layers.PaliGemmaImageConverter(scale=1 / 127.5, offset=-1.0),
        sequence_length=16,
    )


def make_model(recipe, preprocessor):
    backbone = keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        image_size=16,
        num_layers=4,
        num_query_heads=recipe.num_query_heads,
        num_key_value_heads=1,
        hidden_dim=recipe.hidden_dim,
        intermediate_dim=recipe.intermediate_dim,
        head_dim=32,
        vit_patch_size=8,
        vit_num_heads=4,
        vit_hidden_dim=64,
        vit_num_layers=1,
        vit_intermediate_dim=128,
    )
    return keras_hub.models.PaliGemmaCausalLM(
        backbone=backbone, preprocessor=preprocessor
    )


def make_data(stage, image_length, preprocessor, seed):
    return stage.task(
        Digits("train", augment=stage.augment),
        preprocessor,
        num_questions=stage.steps * stage.batch_size,
        sizes=stage.sizes,
        batch_size=stage.batch_size,
        stretching=stage.window
        and PositionStretching(stage.window, image_length),
        seed=seed,
    )


def train(model, stage, data, backup):
    steps = stage.steps // EPOCHS
    schedule = keras.optimizers.schedules.CosineDecay(
        stage.learning_rate / 10,
        stage.steps,
        alpha=0.1,
        warmup_target=stage.learning_rate,
        warmup_steps=steps,
    )
    model.compile(
        keras.optimizers.AdamW(
            schedule,
            weight_decay=0.01,
            clipnorm=1.0,
            use_ema=stage.average,
            ema_momentum=0.995,
        ),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=["sparse_categorical_accuracy"],
    )
    model.fit(
        data,
        epochs=EPOCHS,
        steps_per_epoch=steps,
        verbose=2,
        callbacks=[keras.callbacks.BackupAndRestore(backup)],
    )


def make(name, recipe, preprocessor, runs, presets, seed):
    keras.utils.set_random_seed(seed)
    pali_gemma = make_model(recipe, preprocessor)
    model = MultiImagePaliGemmaCausalLM(pali_gemma.backbone)
    print(f"{name}: {model.backbone.count_params():,} parameters")
    for number, stage in enumerate(recipe.stages):
        weights = runs / f"{name}_{number}.weights.h5"
        if weights.exists():
            pali_gemma.backbone.load_weights(weights)
            continue
        print(f"{name}, stage {number}: {stage}")
        image_length = model.backbone.image_sequence_length
        data = make_data(stage, image_length, preprocessor, seed + number)
        train(model, stage, data, str(runs / f"{name}_{number}"))
        pali_gemma.backbone.save_weights(weights)
        sizes = (1, 5, 10, 20, 50, 100, 150)
        accuracy = measure(pali_gemma, "validation", sizes, 256, seed=0)
        print(f"{name}, stage {number}, validation: {accuracy}")
    pali_gemma.save_to_preset(str(presets / name))
    card = write_card(name, pali_gemma.backbone, recipe, seed)
    (presets / name / "README.md").write_text(card)


def measure(model, split, sizes, num_questions, seed):
    """Accuracy by size, from `num_questions` questions at each size."""
    haystacks = draw_haystacks(
        Digits(split), num_questions * len(sizes), sizes, seed=seed
    )
    return evaluate_haystacks(model, haystacks).accuracy


def write_card(name, backbone, recipe, seed):
    """The model card, with the recipe and a place for the scores."""
    stages = "\n".join(
        f"| {stage.task.__name__} | {', '.join(map(str, stage.sizes))} "
        f"| {stage.steps:,} x {stage.batch_size} | {stage.learning_rate:g} "
        f"| {stage.window or 'own'} | {'yes' if stage.augment else 'no'} "
        f"| {'averaged' if stage.average else 'last'} |"
        for stage in recipe.stages
    )
    return f"""# {name}

A tiny PaliGemma that answers "For the image with a seven, is there a three?"
about rows of images, each with two handwritten digits. It exists to try
keras_laid in minutes; it knows nothing else.

`keras_hub.models.PaliGemmaCausalLM.from_preset(keras_laid.presets.\
{CONSTANTS[name]})`

{backbone.count_params():,} parameters: {backbone.num_layers} decoder layers of
width {backbone.hidden_dim}, {backbone.num_query_heads} query heads and one key
head of 32; one vision layer of width 64; images of 16 x 16 pixels in 4 tokens.

## How it was made
`KERAS_BACKEND=jax python -m benchmarks.make_presets --names {name}`, from
random weights, seed {seed}, AdamW with cosine decay to a tenth:

| task | images | steps x batch | rate | positions over | augmented | weights |
| --- | --- | --- | --- | --- | --- | --- |
{stages}

`Captions` names both digits of an image, `Retrieval` names the digit beside the
one in the prompt, and `Haystacks` answers the question. Drawings: 80% of
scikit-learn's digits (UCI "Optical Recognition of Handwritten Digits",
E. Alpaydin and C. Kaynak, CC BY 4.0).

## What it scores
Accuracy on 1,024 questions at each size, with drawings that were never trained
on (chance is 0.5):

<!-- {name} -->
<!-- /{name} -->
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+", default=list(RECIPES))
    parser.add_argument(
        "--runs", type=pathlib.Path, default="runs/make_presets"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default="keras_laid/presets"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs = pathlib.Path(args.runs)
    runs.mkdir(parents=True, exist_ok=True)
    preprocessor = make_preprocessor()
    for name in args.names:
        make(
            name,
            RECIPES[name],
            preprocessor,
            runs,
            pathlib.Path(args.output),
            args.seed,
        )


if __name__ == "__main__":
    main()
