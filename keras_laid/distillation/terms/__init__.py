"""The terms of a distiller's loss, one file each."""

from keras_laid.backbones.forward import Run
from keras_laid.distillation.terms.attention import AttentionMatching
from keras_laid.distillation.terms.hidden_states import HiddenStates
from keras_laid.distillation.terms.next_tokens import NextTokens
from keras_laid.distillation.terms.retrieval import RetrievalMatching
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term

__all__ = [
    "AttentionMatching",
    "HiddenStates",
    "NextTokens",
    "RetrievalMatching",
    "Run",
    "Step",
    "Term",
]
