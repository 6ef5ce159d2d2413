"""The terms of a distiller's loss, one file each."""

from keras_laid.backbones.forward import Run
from keras_laid.distillation.terms.hidden_states import HiddenStates
from keras_laid.distillation.terms.term import Step
from keras_laid.distillation.terms.term import Term

__all__ = ["HiddenStates", "Run", "Step", "Term"]
