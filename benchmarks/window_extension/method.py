"""Descriptions of the methods of the study."""

import dataclasses

from keras_laid.distillation import AttentionMatching
from keras_laid.distillation import NextTokens


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        stretching: Boolean, whether positions are stretched.
        gains: Boolean, whether rotary frequencies have trainable gains.
        strength: Float, the strength of the distance weighting.
        yarn: Boolean, whether the student is trained and used with positions
            interpolated by YaRN, with one factor for the whole window.
        lora_rank: Integer, the rank of LoRA, or `None` to train all weights.
            With LoRA the learning rate is multiplied by 4, since LoRA needs a
            larger one.
        teacher_images: Integer, how many images of a haystack a teacher reads,
            with 1 only the needle, or `None` for all.
        terms: Dictionary from the class of a term of the loss to its arguments;
            each run makes new terms.
    """

    stretching: bool = True
    gains: bool = True
    yarn: bool = False
    lora_rank: int | None = None
    strength: float = 4.0
    teacher_images: int | None = None
    terms: dict = dataclasses.field(default_factory=dict)

    @property
    def has_teacher(self):
        without_labels = self.make_terms(supervised_weight=0.0)
        return any(term.is_used for term in without_labels)

    def make_terms(self, supervised_weight=1.0):
        """Makes new terms, always with one for logits and labels."""
        tokens = self.terms.get(NextTokens, {})
        tokens = tokens | {"supervised_weight": supervised_weight}
        arguments = self.terms | {NextTokens: tokens}
        return [kind(**chosen) for kind, chosen in arguments.items()]


def laid(
    stretching=True,
    gains=True,
    strength=4.0,
    yarn=False,
    logits_weight=1.0,
    **attention,
):
    """LAid in the paper's form, with some of its parts changed."""
    defaults = {"weight": 0.3, "query_key_weight": 0.1}
    return Method(
        stretching=stretching,
        gains=gains,
        strength=strength,
        yarn=yarn,
        terms={
            AttentionMatching: defaults | attention,
            NextTokens: {"logits_weight": logits_weight},
        },
    )


def kd(stretching, yarn=False, teacher_images=None):
    return Method(
        stretching=stretching,
        gains=False,
        yarn=yarn,
        teacher_images=teacher_images,
    )


def sft(stretching, yarn=False, lora_rank=None):
    return Method(
        stretching=stretching,
        gains=False,
        yarn=yarn,
        lora_rank=lora_rank,
        terms={NextTokens: {"logits_weight": 0.0}},
    )
