"""
Title: Distil a long window into a small PaliGemma
Author: The keras_laid authors
Date created: 2026/11/22
Last modified: 2026/11/29
Description: Teach a small vision-language model to find one image among many.
Accelerator: None
"""

"""
## Introduction

A small vision-language model that was trained on single images answers
questions about one image well. Among five images it guesses. A larger model of
the same family still finds the right one among a hundred. This guide teaches
the small model to look where the large one looks, from short prompts without
labels, and returns a plain KerasHub preset that costs nothing extra to serve.

Without arguments it runs in minutes on two CPU cores, with the tiny teacher and
student that come with keras_laid. `--compare` also trains a student on the
teacher's logits alone, with the same data and steps. The same file takes real
presets:

```shell
KERAS_BACKEND=jax python guides/distill_paligemma.py \\
    --teacher pali_gemma2_mix_10b_224 --student pali_gemma2_mix_3b_224
```

## Setup
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("KERAS_BACKEND", "jax")  # Or "tensorflow" or "torch".

import keras
import keras_hub
import numpy as np

import keras_laid
from keras_laid import distillation
from keras_laid import spectral

parser = argparse.ArgumentParser()
parser.add_argument("--teacher", default=keras_laid.presets.TEACHER)
parser.add_argument(
    "--student", default=keras_laid.presets.SINGLE_IMAGE_STUDENT
)
parser.add_argument("--images", type=int, default=20, help="to train on")
parser.add_argument("--window", type=int, default=150, help="in images")
parser.add_argument("--questions", type=int, default=4800, help="in an epoch")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--learning-rate", type=float, default=1.5e-3)
parser.add_argument("--retrieval-weight", type=float, default=1.0)
parser.add_argument("--logits-weight", type=float, default=1.0)
parser.add_argument("--supervised-weight", type=float, default=0.0)
for part in ("stretching", "gains"):
    parser.add_argument(
        f"--{part}", action=argparse.BooleanOptionalAction, default=True
    )
parser.add_argument(
    "--compare", action="store_true", help="train on logits alone too"
)
parser.add_argument("--output", default="runs/distill_paligemma")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--quick", action="store_true", help="a check in a minute, not a result"
)
args = parser.parse_args()

sizes = (1, 2, 5, 10, 20, 50, 100, 150)
test_questions = 256
if args.quick:
    args.images, args.window, args.questions, args.epochs = 2, 10, 256, 2
    sizes, test_questions = (1, 4), 64

output = pathlib.Path(args.output)
output.mkdir(parents=True, exist_ok=True)
keras.utils.set_random_seed(args.seed)
started = time.time()

"""
## The teacher and the student

Both are ordinary PaliGemma presets. KerasHub's PaliGemma takes one image a
prompt; `MultiImagePaliGemmaCausalLM` shares its layers and weights, and takes
any number.

The student gets a trainable gain on every rotary frequency of its attention.
All gains start at 1: nothing changes before training.
"""


def load(preset):
    return keras_hub.models.PaliGemmaCausalLM.from_preset(preset)


def several_images(model):
    return keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm(model)


teacher, student = load(args.teacher), load(args.student)
preprocessor = student.preprocessor
image_size = student.backbone.image_size
image_length = student.backbone.image_sequence_length


"""
## The data

A haystack is a row of images, each with two handwritten digits. One of them,
the needle, shows the digit that the question names first: "For the image with
a seven, is there a three?" Digits of training and test are different drawings.

Training haystacks are short. `PositionStretching` spreads their images over the
positions of a long window, so that the student sees far positions without
paying for them. Answers are part of the data, but have no weight in the loss
unless `--supervised-weight` gives them one.
"""

digits = keras_laid.Digits("train", image_size, augment=True)
test_digits = keras_laid.Digits("test", image_size)
train_sizes = {1, 2, 5, args.images // 2, args.images}
stretching = keras_laid.PositionStretching(args.window, image_length)


def make_haystacks():
    return keras_laid.Haystacks(
        digits,
        preprocessor,
        num_questions=args.questions * args.epochs,
        sizes=sorted(size for size in train_sizes if size <= args.images),
        batch_size=32,
        stretching=stretching if args.stretching else None,
        seed=args.seed,
    )


def measure(name, model):
    print(f"Accuracy of the {name}:", flush=True)
    results = keras_laid.evaluate_haystacks(
        model,
        keras_laid.draw_haystacks(
            test_digits, test_questions * len(sizes), sizes, seed=args.seed + 1
        ),
    )
    return results.accuracy


accuracy = {"teacher": measure("teacher", teacher)}
accuracy["before"] = measure("student before", student)

"""
## Where the teacher looks

Few attention heads find the image that a question is about. On questions whose
needle is known, `find_retrieval_heads` measures for every head how much of its
attention the needle gets, in the row of text where the head is most certain.
"""

found = keras_laid.find_retrieval_heads(
    several_images(teacher), make_haystacks()
)
print(found.table())

"""
## Training

The distiller runs each model once a step. The student learns from the teacher's
answers, and from where these heads look: its layer at the same relative depth
must look at the same images. Distant images count more and more as training
goes on. Gains have a learning rate of their own. An interrupted run resumes
after its last epoch.
"""


def adamw(learning_rate):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps,
        warmup_target=learning_rate,
        warmup_steps=max(1, steps // 20),
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0)


def make_distiller(student, retrieval_weight):
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=several_images(teacher),
        student=several_images(student),
        distance_weighting=keras_laid.DistanceWeighting(strength=4.0),
        terms=[
            distillation.RetrievalMatching(retrieval_weight, found.heads),
            distillation.NextTokens(args.logits_weight, args.supervised_weight),
        ],
    )
    distiller.compile(
        optimizer=keras_laid.group_optimizer(
            student=adamw(args.learning_rate),
            gains=adamw(10 * args.learning_rate),
        )
    )
    return distiller


def train(distiller, name):
    return distiller.fit(
        make_haystacks(),
        epochs=args.epochs,
        steps_per_epoch=steps_per_epoch,
        callbacks=[keras.callbacks.BackupAndRestore(str(output / name))],
    )


steps_per_epoch = len(make_haystacks()) // args.epochs
steps = args.epochs * steps_per_epoch
if args.gains:
    keras_laid.attach_gain_modulation(student)
distiller = make_distiller(student, args.retrieval_weight)

"""
Two pictures show what training changes: how much attention the needle gets, by
layer and head, and how far back the layers that retrieve look.
"""

sample, _, _ = keras_laid.Haystacks(
    test_digits,
    preprocessor,
    num_questions=32,
    sizes=(args.images,),
    batch_size=32,
    seed=args.seed + 2,
)[0]
edges = np.arange(args.images + 1) * image_length
if args.retrieval_weight:
    matching = distiller.term(distillation.RetrievalMatching)
    student_layers = sorted(matching.student_attention())
else:
    student_layers = [student.backbone.num_layers - 1]
teacher_layers = sorted({layer for layer, _ in found.heads})
looks, masses = {}, {}


def look(name, model, layers):
    model = several_images(model)
    looks[name] = keras_laid.find_retrieval_heads(model, [sample])
    masses[name] = spectral.attention_mass(model, sample, edges, layers)


look("teacher", teacher, teacher_layers)
look("before", student, student_layers)
training_started = time.time()
history = train(distiller, "backup")
training_seconds = time.time() - training_started

"""
## The result

The gains are folded into the query and key kernels. The saved student is a
plain KerasHub preset, which does not need keras_laid. The numbers below are
measured on this preset, read back from disk.
"""

if args.gains:
    keras_laid.fold_gain_modulation(student)
preset = str(output / "student")
student.save_to_preset(preset)
reloaded = load(preset)
accuracy["after"] = measure("student after", reloaded)
look("after", reloaded, student_layers)
if args.compare:
    other = load(args.student)
    train(make_distiller(other, retrieval_weight=0.0), "backup_logits")
    accuracy["logits"] = measure("student after logits alone", other)

windows = {
    name: keras_laid.effective_window(by_size)
    for name, by_size in accuracy.items()
}
before, after = windows["before"].window, windows["after"].window
after_is_at_least = windows["after"].censored == "above"
keras_laid.haystacks.plot_accuracy(
    output / "accuracy.png",
    accuracy,
    {name: found.window for name, found in windows.items()},
    trained_on=args.images,
)
distillation.plot_terms(output / "terms.png", history.history, steps_per_epoch)
spectral.plot_attention_mass(
    output / "attention_mass.png", masses, edges, image_length
)
spectral.plot_retrieval_heads(
    output / "retrieval_heads.png",
    {name: looks[name] for name in ("teacher", "before", "after")},
)
results = {
    "accuracy": accuracy,
    "effective_window": {
        "before": before,
        "after": after,
        "ratio": after / before,
        "after_is_at_least": after_is_at_least,
    }
    | ({"logits": windows["logits"].window} if args.compare else {}),
    "retrieval_heads": found.heads,
    "history": history.history,
    "settings": vars(args),
    "seed": args.seed,
    "versions": {
        "keras_laid": keras_laid.__version__,
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "backend": keras.backend.backend(),
    },
    "seconds": {
        "training": training_seconds,
        "in_all": time.time() - started,
    },
}
(output / "results.json").write_text(json.dumps(results, indent=2))

"""
## Conclusion

Here, the effective window is the longest haystack at which the student keeps
85% of its accuracy above chance with one image. As a next step, pass your own
presets by `--teacher` and `--student`, write a source of your own images with
`names` and `render`, or use single layers in your own model.
"""

print(f"\nPlots, results.json and the student's preset are in {output}/\n")
print("accuracy  " + "".join(f"{size:>7}" for size in sizes) + "   images")
for name, by_size in accuracy.items():
    print(f"{name:<10}" + "".join(f"{by_size[size]:7.2f}" for size in sizes))
print(
    f"effective window: {before:.1f} images before, "
    f"{'at least ' if after_is_at_least else ''}{after:.1f} after, "
    f"{after / before:.1f} times longer"
)
