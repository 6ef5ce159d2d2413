"""Haystacks: questions about one image, or a few, among many.

Where `tensorflow_datasets` is installed, importing this package makes
`tfds.load("visual_haystacks/digits")` and
`tfds.load("text_haystacks/single_word")` work. Their builders and configs, such
as `VisualHaystacks` and `HaystackConfig`, are imported when they are asked for,
and raise `ImportError` where it is not installed. `plot_accuracy` and
`plot_positions` are too, since matplotlib is slow to import.
"""

import importlib
import importlib.util
from typing import Any

from keras_laid.backbones.teacher_inputs import aligned_tokens
from keras_laid.haystacks.callback import HaystackEvaluation
from keras_laid.haystacks.coco import Coco
from keras_laid.haystacks.dataset import Haystacks
from keras_laid.haystacks.digits import Digits
from keras_laid.haystacks.drawing import draw_haystacks
from keras_laid.haystacks.effective_window import effective_window
from keras_laid.haystacks.effective_window import effective_window_interval
from keras_laid.haystacks.evaluation import evaluate_haystacks
from keras_laid.haystacks.example_haystacks import example_haystacks
from keras_laid.haystacks.examples import Example
from keras_laid.haystacks.examples import read_examples
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.long_context import LongContextQuestion
from keras_laid.haystacks.long_context_scores import score_mm_long_bench
from keras_laid.haystacks.long_context_scores import score_mm_niah
from keras_laid.haystacks.long_prompts import LongPrompts
from keras_laid.haystacks.mm_long_bench import read_mm_long_bench
from keras_laid.haystacks.mm_niah import read_mm_niah
from keras_laid.haystacks.openmoji import OpenMoji
from keras_laid.haystacks.question_files import Question
from keras_laid.haystacks.question_files import read_questions
from keras_laid.haystacks.results import HaystackResults
from keras_laid.haystacks.sampling import PairSource
from keras_laid.haystacks.scoring import NumberWithin
from keras_laid.haystacks.scoring import score
from keras_laid.haystacks.student_responses import StudentResponses
from keras_laid.haystacks.text_haystacks import draw_text_haystacks

__all__ = [
    "Coco",
    "Example",
    "Digits",
    "Haystack",
    "HaystackConfig",
    "HaystackEvaluation",
    "HaystackResults",
    "Haystacks",
    "LongContextQuestion",
    "LongPrompts",
    "NumberWithin",
    "OpenMoji",
    "PairSource",
    "Question",
    "StudentResponses",
    "TextHaystackConfig",
    "TextHaystacks",
    "VisualHaystacks",
    "aligned_tokens",
    "draw_haystacks",
    "draw_text_haystacks",
    "effective_window",
    "effective_window_interval",
    "evaluate_haystacks",
    "example_haystacks",
    "plot_accuracy",
    "plot_positions",
    "read_examples",
    "read_mm_long_bench",
    "read_mm_niah",
    "read_questions",
    "score",
    "score_mm_long_bench",
    "score_mm_niah",
]

if importlib.util.find_spec("tensorflow_datasets"):
    import wrapt  # tensorflow_datasets requires it.

    # Defining the builder registers it, but imports tensorflow_datasets, which
    # takes a while: so only once someone else has imported that.
    @wrapt.when_imported("tensorflow_datasets")
    def _register(module: Any) -> None:
        for name in ("builder", "text_builder"):
            importlib.import_module(f"keras_laid.haystacks.{name}")


LATER = {
    "HaystackConfig": "builder",
    "TextHaystackConfig": "text_builder",
    "TextHaystacks": "text_builder",
    "VisualHaystacks": "builder",
    "plot_accuracy": "plots",
    "plot_positions": "plots",
}


def __getattr__(name: str) -> Any:
    if name in LATER:
        module = importlib.import_module(f"{__name__}.{LATER[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
