"""
Title: Distil a long window into a small Gemma 3
Author: The keras_laid authors
Date created: 2026/11/23
Last modified: 2026/11/29
Description: Several images through Gemma 3's own preprocessor, from presets.
Accelerator: None
"""

"""
## Introduction

Gemma 3 takes several images by itself: its preprocessor puts their tokens among
those of the text. Five of six decoder layers see only a sliding window. The
sixth sees everything: a large Gemma 3 can teach a small one the attention of
this layer.

Without arguments, this guide first makes and trains a tiny teacher and a tiny
student, and saves them as presets. It also takes real presets:

```shell
KERAS_BACKEND=jax python guides/distill_gemma3.py \\
    --teacher gemma3_instruct_12b --student gemma3_instruct_4b
```

## Setup

Making the tiny presets needs `sentencepiece`:
`pip install "keras-laid[jax,guides]"`.
"""

import argparse
import io
import json
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")  # Or "tensorflow" or "torch".

import keras
import keras_hub
import numpy as np

import keras_laid

parser = argparse.ArgumentParser()
parser.add_argument("--teacher", help="a preset; default: a tiny one")
parser.add_argument("--student", help="a preset; default: a tiny one")
parser.add_argument("--images", type=int, default=4, help="to train on")
parser.add_argument("--window", type=int, default=20, help="in images")
parser.add_argument("--tiny-steps", type=int, default=1500)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--output", default="runs/distill_gemma3")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--quick", action="store_true", help="a check in a minute, not a result"
)
args = parser.parse_args()

sizes = (1, 2, 4, 8, 12, 20)
teacher_sizes, student_sizes = (1, 2, 4, 8, 12), (1, 2)
test_questions = 128
if args.quick:
    args.images, args.tiny_steps, args.steps = 2, 2, 2
    sizes, teacher_sizes, student_sizes, test_questions = (2,), (2,), (2,), 16

output = pathlib.Path(args.output)
output.mkdir(parents=True, exist_ok=True)
settings, arguments = output / "settings.json", json.dumps(vars(args))
if settings.exists() and settings.read_text() != arguments:
    # The presets and the half-trained student there are of another run.
    parser.error(f"{output} holds a run with other arguments: pass --output")
settings.write_text(arguments)
keras.utils.set_random_seed(args.seed)

"""
## The data

An image source has `names` and `render`. This one draws two coloured squares on
a grid, which tiny models learn in minutes; the guide on PaliGemma has real
handwritten digits. Even so, a model must find the right image to answer "For
the image with a red square, is there a blue square?"

`Haystacks` puts a placeholder for each image into the prompt, and calls Gemma
3's own preprocessor. `PositionStretching` spreads the images over the positions
of a longer window; the tokens that mark where an image starts and ends go with
it.
"""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (230, 220, 50),
    "purple": (150, 50, 190),
    "white": (240, 240, 240),
    "brown": (130, 80, 30),
    "pink": (250, 150, 190),
}


class Squares(keras_laid.haystacks.PairSource):
    """Two squares on a 2 x 2 grid, each of one colour."""

    def __init__(self, image_size):
        self.image_size = image_size
        self.names = [f"{colour} square" for colour in COLOURS]

    def render(self, pairs, rng):
        """Draws an image for each pair of names, of shape `(images, 2)`."""
        count = len(pairs)
        cells = np.zeros((count, 4, 3))
        places = np.argsort(rng.random((count, 4)), axis=1)[:, :2]
        colours = np.array(list(COLOURS.values()))[pairs]
        cells[np.arange(count)[:, None], places] = colours
        zoom = self.image_size // 2
        images = cells.reshape(count, 2, 2, 3)
        images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
        noise = rng.normal(scale=12.0, size=images.shape)
        return np.clip(images + noise, 0, 255).astype("uint8")


def make_questions(preprocessor, steps, sizes, stretching=None):
    """Batches of questions for Gemma 3; each has one size."""
    side, _ = preprocessor.image_converter.image_size
    return keras_laid.Haystacks(
        Squares(side),
        preprocessor,
        num_questions=32 * steps,
        sizes=sizes,
        stretching=stretching,
        seed=args.seed,
    )


"""
## The teacher and the student

The tiny presets are an ordinary `Gemma3Backbone`, with its vision encoder, and
an ordinary tokenizer. Both are trained on one and two images, then the teacher
on up to twelve.
"""


def make_tokenizer():
    names = Squares(16).names
    sentences = [
        f"For the image with a {a}, is there a {b}?"
        for a in names
        for b in names
    ]
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, *100 * ["yes", "no"]]),
        model_writer=proto,
        model_type="bpe",
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=[
            "<start_of_image>",
            "<end_of_image>",
            "<img>",
            "<start_of_turn>",
            "<end_of_turn>",
            "\n\n",
        ],
        minloglevel=2,
    )
    return keras_hub.models.Gemma3Tokenizer(proto=proto.getvalue())


class WithLogits(keras.Model):
    """A backbone and its logits, which reads only the backbone's inputs."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def call(self, inputs):
        own = {name: inputs[name] for name in self.backbone.input}
        return self.backbone.token_embedding(self.backbone(own), reverse=True)


def make_tiny(name, width, *stages):
    """Trains a tiny Gemma 3 and saves it; returns the preset's folder."""
    folder = output / name
    if (folder / "config.json").exists():
        return str(folder)
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(
        tokenizer=make_tokenizer(),
        image_converter=keras_hub.layers.Gemma3ImageConverter(
            image_size=(16, 16), scale=1 / 127.5, offset=-1.0
        ),
        num_vision_tokens_per_image=4,
    )
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        image_size=16,
        num_layers=6,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=width,
        intermediate_dim=2 * width,
        head_dim=32,
        use_query_key_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=16,
        vision_encoder=keras_hub.models.Gemma3VisionEncoder(
            image_size=16,
            patch_size=8,
            pool_size=1,
            num_layers=1,
            num_heads=2,
            hidden_dim=64,
            intermediate_dim=128,
            output_dim=width,
        ),
    )
    # `fit` of a KerasHub task would preprocess the data, which is done already.
    model = WithLogits(backbone)
    for stage in stages:
        model.compile(
            optimizer=adamw(1e-3, args.tiny_steps),
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            ),
        )
        print(f"A tiny {name}, on {stage} images:", flush=True)
        model.fit(make_questions(preprocessor, args.tiny_steps, stage))
    keras_hub.models.Gemma3CausalLM(
        backbone=backbone, preprocessor=preprocessor
    ).save_to_preset(str(folder))
    return str(folder)


def adamw(learning_rate, steps):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps,
        warmup_target=learning_rate,
        warmup_steps=max(1, steps // 20),
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0)


if not (args.teacher and args.student):
    import sentencepiece
teacher, student = (
    keras_hub.models.Gemma3CausalLM.from_preset(preset)
    for preset in (
        args.teacher or make_tiny("teacher", 128, student_sizes, teacher_sizes),
        args.student or make_tiny("student", 64, student_sizes),
    )
)
preprocessor = student.preprocessor


def measure(name, model):
    print(f"Accuracy of the {name}:", flush=True)
    side, _ = preprocessor.image_converter.image_size
    haystacks = keras_laid.draw_haystacks(
        Squares(side),
        test_questions * len(sizes),
        sizes,
        seed=args.seed + 1,
    )
    return keras_laid.evaluate_haystacks(model, haystacks).accuracy


accuracy = {
    "teacher": measure("teacher", teacher),
    "before": measure("student before", student),
}

"""
## Training

Nothing here is specific to Gemma 3: the distiller finds the layers with full
attention, captures their queries and keys after rotation, and describes the
mask (causal, except within an image) without ever storing it. A killed run that
is started again resumes after its last full epoch of a hundred steps. A new run
needs a new `--output`.
"""

keras_laid.attach_gain_modulation(student)
distiller = keras_laid.DistanceWeightedAttentionDistillation(
    teacher=teacher,
    student=student,
    distance_weighting=keras_laid.DistanceWeighting(strength=4.0),
)
distiller.compile(
    optimizer=keras_laid.group_optimizer(
        student=adamw(args.learning_rate, args.steps),
        gains=adamw(10 * args.learning_rate, args.steps),
    )
)
image_length = preprocessor.num_vision_tokens_per_image + 4
stretching = keras_laid.PositionStretching(args.window, image_length)
training_sizes = sorted({*student_sizes, args.images})
steps_per_epoch = min(100, args.steps)
questions = make_questions(
    preprocessor, steps_per_epoch, training_sizes, stretching
)
resumable = keras_laid.ResumableTraining(output / "training", questions)
distiller.fit(
    questions,
    epochs=args.steps // steps_per_epoch,
    shuffle=False,
    callbacks=[resumable],
)

"""
## The result

Gemma 3 normalizes queries and keys before it rotates them, so the gains are
folded into the scales of the norms. The result is a plain KerasHub preset.
"""

keras_laid.fold_gain_modulation(student)
student.save_to_preset(str(output / "student_long"))
reloaded = keras_hub.models.Gemma3CausalLM.from_preset(
    str(output / "student_long")
)
accuracy["after"] = measure("student after", reloaded)

windows = {}
if not args.quick:  # A model that guesses has no window.
    windows = {
        name: keras_laid.effective_window(by_size).window
        for name, by_size in accuracy.items()
    }
keras_laid.haystacks.plot_accuracy(
    output / "accuracy.png", accuracy, windows, trained_on=args.images
)
results = {
    "accuracy": accuracy,
    "effective_window": windows,
    "history": resumable.history,
    "settings": vars(args),
}
(output / "results.json").write_text(json.dumps(results, indent=2))

print(f"\nThe plot, results.json and the presets are in {output}/\n")
print("accuracy  " + "".join(f"{size:>7}" for size in sizes) + "   images")
for name, by_size in accuracy.items():
    print(f"{name:<10}" + "".join(f"{by_size[size]:7.2f}" for size in sizes))
