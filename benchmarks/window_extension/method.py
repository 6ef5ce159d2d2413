"""How a method of the study is written down."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train a student; the whole of LAid where nothing is said.

    Attributes:
        stretching: Boolean, whether positions are stretched.
        gains: Boolean, whether rotary frequencies have trainable gains.
        strength: Float, of the distance weighting.
        yarn: Boolean, whether the student is trained and used with positions
            interpolated by YaRN, by one factor for the whole window.
        lora_rank: Integer, or `None` to train all weights. With LoRA, four
            times the learning rate is taken: it wants a larger one.
        terms: Dictionary of further arguments of
            `keras_laid.DistanceWeightedAttentionDistillation`.
        make_terms: Tuple of functions without arguments, which make further
            terms of the loss: each run has its own.
    """

    stretching: bool = True
    gains: bool = True
    yarn: bool = False
    lora_rank: int | None = None
    strength: float = 4.0
    terms: dict = dataclasses.field(default_factory=dict)
    make_terms: tuple = ()

    @property
    def has_teacher(self):
        return bool(self.make_terms) or any(
            self.terms.get(f"{term}_weight", 1.0)
            for term in ("retrieval", "attention", "query_key", "logits")
        )


def laid(stretching=True, gains=True, strength=4.0, yarn=False, **terms):
    """LAid with some of its parts changed."""
    defaults = {
        "retrieval_weight": 0.0,
        "attention_weight": 0.3,
        "query_key_weight": 0.1,
    }
    return Method(
        stretching=stretching,
        gains=gains,
        strength=strength,
        yarn=yarn,
        terms=defaults | terms,
    )


def kd(stretching, yarn=False):
    return laid(
        stretching,
        gains=False,
        yarn=yarn,
        attention_weight=0.0,
        query_key_weight=0.0,
    )


def sft(stretching, yarn=False, lora_rank=None):
    method = kd(stretching, yarn)
    terms = method.terms | {"logits_weight": 0.0}
    return dataclasses.replace(method, lora_rank=lora_rank, terms=terms)
