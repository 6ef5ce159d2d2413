"""Distillation: the wrapper, its terms and data, and stored teachers."""

import importlib
from typing import Any

from keras_laid.distillation.distance_weighting import DistanceWeighting
from keras_laid.distillation.distiller import (
    DistanceWeightedAttentionDistillation,
)
from keras_laid.distillation.group_optimizer import group_optimizer
from keras_laid.distillation.position_stretching import PositionStretching
from keras_laid.distillation.resumable_training import ResumableTraining
from keras_laid.distillation.store_log_probabilities import (
    store_log_probabilities,
)
from keras_laid.distillation.store_teacher import store_teacher
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.terms import AttentionMatching
from keras_laid.distillation.terms import HiddenStates
from keras_laid.distillation.terms import NextTokens
from keras_laid.distillation.terms import RetrievalMatching

__all__ = [
    "AttentionMatching",
    "DistanceWeightedAttentionDistillation",
    "DistanceWeighting",
    "HiddenStates",
    "NextTokens",
    "PositionStretching",
    "ResumableTraining",
    "RetrievalMatching",
    "StoredTeacher",
    "group_optimizer",
    "plot_terms",
    "store_log_probabilities",
    "store_teacher",
]


LATER = {"plot_terms": "plots"}  # Matplotlib is slow to import.


def __getattr__(name: str) -> Any:
    if name in LATER:
        module = importlib.import_module(f"{__name__}.{LATER[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
