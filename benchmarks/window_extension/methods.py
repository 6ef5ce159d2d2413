"""The methods of the study, and how a student is trained by each."""

import contextlib
import dataclasses
import math

import keras
import keras_hub

import keras_laid
from benchmarks.window_extension import retrieval_methods
from benchmarks.window_extension.data import make_data
from benchmarks.window_extension.method import kd
from benchmarks.window_extension.method import laid
from benchmarks.window_extension.method import sft
from benchmarks.window_extension.settings import RUNS
from keras_laid.backbones import several_images

WINDOW = 150  # In images: the range of stretched positions.
# In tokens: the length that the embedded student was trained on, 5 images and
# the text; and the window of neighbours whose positions SelfExtend leaves as
# they are, chosen on the validation split.
ORIGINAL_LENGTH = 36
NEIGHBOR_WINDOW = 24
PRIOR_SEED = 1000
PRIOR_RATE = 7e-4


# Without training, with the best factor or group size for each length.


def yarn(student, length):
    return keras_laid.yarn(
        student,
        factor=max(1.0, length / ORIGINAL_LENGTH),
        original_length=ORIGINAL_LENGTH,
    )


def self_extend(student, length):
    return keras_laid.self_extend(
        student,
        group_size=max(
            1,
            math.ceil(
                (length - NEIGHBOR_WINDOW) / (ORIGINAL_LENGTH - NEIGHBOR_WINDOW)
            ),
        ),
        neighbor_window=NEIGHBOR_WINDOW,
    )


def untouched(student, length):
    return contextlib.nullcontext()


def yarn_for_all(student, length):
    """YaRN with the factor of the whole window, whatever the length."""
    image_length = student.backbone.image_sequence_length
    text_length = student.preprocessor.sequence_length
    return yarn(student, WINDOW * image_length + text_length)


UNTRAINED = {
    "untouched": untouched,
    "yarn": yarn,
    "self_extend": self_extend,
    "teacher": untouched,
}

METHODS = {
    "sft": sft(stretching=False),
    "sft_stretched": sft(stretching=True),
    "sft_lora": sft(stretching=False, lora_rank=8),
    "sft_lora_stretched": sft(stretching=True, lora_rank=8),
    "kd": kd(stretching=False),
    "kd_stretched": kd(stretching=True),
    "laid": laid(stretching=False),
    "laid_stretched": laid(),
    "sft_yarn": sft(stretching=False, yarn=True),
    "sft_yarn_stretched": sft(stretching=True, yarn=True),
    "kd_yarn": kd(stretching=False, yarn=True),
    "kd_yarn_stretched": kd(stretching=True, yarn=True),
    "laid_yarn": laid(stretching=False, yarn=True),
    "laid_yarn_stretched": laid(yarn=True),
    # With a tenth of the loss weights.
    "laid_light_stretched": laid(weight=0.03, query_key_weight=0.01),
    "laid_light_yarn": laid(
        stretching=False,
        yarn=True,
        weight=0.03,
        query_key_weight=0.01,
    ),
    "laid_light": laid(stretching=False, weight=0.03, query_key_weight=0.01),
    # All of the weight on the attention of the question's rows.
    "laid_heavy": laid(stretching=False, weight=1.0, query_key_weight=0.0),
    "laid_all_layers": laid(stretching=False, layer_map="uniform"),
    # LAid with stretching, each without one part.
    "without_kl": laid(logits_weight=0.0),
    "without_query_key": laid(query_key_weight=0.0),
    "without_attention": laid(weight=0.0),
    "without_gain": laid(gains=False),
    "without_distance_weighting": laid(strength=0.0),
    # Other layers than the last: all layers, and the teacher's sharpest.
    "all_layers": laid(layer_map="uniform"),
    "sharpest_layer": laid(layer_map=[(2, 1)]),
    # LAid by retrieval, without gains, and methods to compare it with.
    **retrieval_methods.METHODS,
}


def prior_student(settings):
    """The student that every method of a config starts from."""
    student = load(getattr(keras_laid.presets, settings.student))
    train_beforehand(
        student, settings, "prior", settings.prior_steps, settings.prior_sizes
    )
    return student


def prior_teacher(settings):
    """The teacher of every method of a config."""
    teacher = load(getattr(keras_laid.presets, settings.teacher))
    train_beforehand(
        teacher,
        settings,
        "teacher",
        settings.teacher_steps,
        settings.teacher_sizes,
    )
    return teacher


def train_beforehand(model, settings, name, steps, sizes):
    """Trains a model on labels, once for all runs of a config."""
    if not steps:
        return
    weights = RUNS / settings.name / f"{name}.weights.h5"
    if not weights.is_file():
        beforehand = dataclasses.replace(
            settings,
            labelled=settings.batch_size * steps,
            unlabelled=0,
            sizes=sizes,
            steps=steps,
            teacher_steps=0,
        )
        keras.utils.set_random_seed(PRIOR_SEED)
        train(METHODS["sft"], beforehand, PRIOR_SEED, PRIOR_RATE, model)
        weights.parent.mkdir(parents=True, exist_ok=True)
        new = weights.with_name("new.weights.h5")
        model.backbone.save_weights(new)
        new.replace(weights)
    model.backbone.load_weights(weights)


class AfterSteps(keras.callbacks.Callback):
    """Calls `function(steps_done, model)` after each number of `steps`."""

    def __init__(self, steps, function):
        super().__init__()
        self.steps = steps
        self.function = function
        self.done = 0

    def on_train_batch_end(self, batch, logs=None):
        self.done += 1
        if self.done in self.steps:
            # Reading `self.model` gives variables the values of this step.
            self.function(self.done, self.model)


def train(method, settings, seed, learning_rate, student, callbacks=()):
    """Trains a student in place, and returns the distiller."""
    teacher = prior_teacher(settings)
    image_length = student.backbone.image_sequence_length
    stretching = keras_laid.PositionStretching(WINDOW, image_length)
    data = make_data(
        settings,
        student.preprocessor,
        uses_unlabelled=method.has_teacher,
        stretching=stretching if method.stretching else None,
        seed=seed,
        teacher_images=method.teacher_images,
    )
    if method.lora_rank:
        student.backbone.enable_lora(method.lora_rank)
    if method.gains:
        keras_laid.attach_gain_modulation(student)
    has_labels = settings.labelled or not method.has_teacher
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=several_images(teacher),
        student=several_images(student),
        distance_weighting=keras_laid.DistanceWeighting(method.strength),
        terms=method.make_terms(1.0 if has_labels else 0.0),
    )
    steps = settings.steps
    if method.lora_rank:
        learning_rate = 4 * learning_rate
    distiller.compile(
        keras_laid.group_optimizer(
            student=adamw(learning_rate, steps),
            mixer=adamw(10 * learning_rate, steps),
            gains=adamw(10 * learning_rate, steps),
        )
    )
    with scope_of(method)(student, length=None):
        fit(distiller, data, steps, callbacks)
    if method.gains:
        keras_laid.fold_gain_modulation(student)
    return distiller


def scope_of(method):
    """The scope to use a trained student in: a function of it and a length."""
    return yarn_for_all if method.yarn else untouched


def fit(model, data, steps, callbacks):
    """Trains for a number of steps, over as many epochs as that takes."""
    per_epoch = min(len(data), steps)
    epochs, rest = divmod(steps, per_epoch)
    if rest:
        raise ValueError(
            "The steps must make whole epochs. "
            f"Received: steps={steps}, {per_epoch} batches an epoch."
        )
    model.fit(
        data,
        epochs=epochs,
        steps_per_epoch=per_epoch,
        callbacks=callbacks,
        verbose=2,
    )


def adamw(learning_rate, steps):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=learning_rate, warmup_steps=steps // 20
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0)


def load(preset):
    return keras_hub.models.PaliGemmaCausalLM.from_preset(preset)
