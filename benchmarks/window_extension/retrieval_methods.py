"""Matching retrieval: its forms, and the controls that could refute it."""

import random

from keras import ops

from benchmarks.window_extension.method import Method
from benchmarks.window_extension.method import kd
from benchmarks.window_extension.method import sft
from keras_laid.distillation import AttentionMatching
from keras_laid.distillation import HiddenStates
from keras_laid.distillation import NextTokens
from keras_laid.distillation import RetrievalMatching

LAYERS, HEADS = range(4), range(4)  # Of the embedded teacher.
RETRIEVING = [(1, 1), (1, 2), (1, 3)]
OTHERS = [
    (layer, head)
    for layer in LAYERS
    for head in HEADS
    if (layer, head) not in RETRIEVING
]

# These heads give the needle at most 0.11 more of their attention than other
# images; heads that retrieve give it 0.7 more (see `retrieval_heads.csv`).
BLIND = [(layer, head) for layer in (0, 3) for head in HEADS]


def matching(
    kind=RetrievalMatching,
    stretching=False,
    yarn=False,
    strength=4.0,
    gains=False,
    logits_weight=1.0,
    **arguments,
):
    """LAid by retrieval: the default distiller, without labels."""
    return Method(
        stretching=stretching,
        gains=gains,
        yarn=yarn,
        strength=strength,
        terms={
            kind: arguments,
            NextTokens: {"logits_weight": logits_weight},
        },
    )


def dense(**arguments):
    """Logits, and whole attention maps, as in the paper."""
    return Method(
        stretching=False, gains=False, terms={AttentionMatching: arguments}
    )


def hidden_states(stretching=False, **arguments):
    """Logits, and outputs of blocks through a learned projection."""
    return Method(
        stretching=stretching, gains=False, terms={HiddenStates: arguments}
    )


class WrongHeads(RetrievalMatching):
    """As many heads as retrieve, drawn at random from all others."""

    drawn_from = OTHERS

    def named_heads(self, teacher):
        # Keras has seeded this generator with the seed of the run.
        return tuple(random.sample(self.drawn_from, len(RETRIEVING)))


class BlindHeads(WrongHeads):
    """As many heads, drawn from those that hardly look at the needle."""

    drawn_from = BLIND


class AllRowsAlike(RetrievalMatching):
    """Every counted row has the same weight, whatever the teacher does."""

    def teacher_retrieval(self, log_shares, heads, x):
        found = super().teacher_retrieval(log_shares, heads, x)
        ones = ops.ones_like(found.mass)
        return found._replace(mass=ones, sharpness=ones)


class TrueNeedle(RetrievalMatching):
    """The needle is the target of every row; the teacher only weighs rows."""

    def teacher_retrieval(self, log_shares, heads, x):
        found = super().teacher_retrieval(log_shares, heads, x)
        segments = ops.shape(found.shares)[-1]
        needle = ops.equal(x["needle"][:, None], ops.arange(segments))
        needle = ops.cast(needle, "float32")[:, None]
        return found._replace(shares=needle + ops.zeros_like(found.shares))


METHODS = {
    "all_labels": sft(stretching=False),
    "all_labels_stretched": sft(stretching=True),
    "logits": kd(stretching=False),
    "logits_needle_alone": kd(stretching=False, teacher_images=1),
    "logits_stretched": kd(stretching=True),
    "logits_yarn": kd(stretching=False, yarn=True),
    "retrieval": matching(),
    "retrieval_stretched": matching(stretching=True),
    "retrieval_yarn": matching(yarn=True),
    "retrieval_gains_stretched": matching(stretching=True, gains=True),
    # Other forms of the term.
    "retrieval_heads": matching(pooling="heads"),
    "retrieval_rows": matching(pooling="rows"),
    "retrieval_every_layer": matching(student_layers=tuple(LAYERS)),
    "retrieval_layer_2": matching(student_layers=(2,)),
    # Without a part.
    "retrieval_without_logits": matching(logits_weight=0.0),
    "retrieval_without_distance": matching(strength=0.0),
    "retrieval_without_row_weights": matching(AllRowsAlike),
    "retrieval_without_choice": matching(
        teacher_heads=[(1, head) for head in HEADS]
    ),
    # Controls: other targets.
    "wrong_heads": matching(WrongHeads),
    "blind_heads": matching(BlindHeads),
    "true_needle": matching(TrueNeedle),
    "hidden_states": hidden_states(layer_map="uniform"),
    "hidden_states_stretched": hidden_states(
        stretching=True, layer_map="uniform"
    ),
    # The one layer that retrieves, in both models.
    "hidden_states_layer_1": hidden_states(layer_map=[(1, 1)]),
    # Whole maps: the paper's form, the layer that retrieves, all layers.
    "last_layer": dense(weight=0.3),
    "dense_layer_1": dense(layer_map=[(1, 1)]),
    "dense_every_layer": dense(layer_map="uniform"),
}
