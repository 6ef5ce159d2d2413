"""What the configs of the datasets of `tensorflow_datasets` have in common."""

import hashlib
import importlib.util
import re
from typing import Any

from keras_laid.arguments import check_integer
from keras_laid.haystacks.digits import SPLITS


def require_tfds() -> None:
    """Raises `ImportError` where `tensorflow_datasets` is not installed."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise ImportError(
            "The datasets of haystacks need the package tensorflow-datasets. "
            'Run `pip install "keras-laid[haystacks]"`.'
        )


def default_counts() -> dict[str, int]:
    return {"train": 1600, "validation": 160, "test": 800}


def check_counts(num_questions: Any, may_be_none: bool = False) -> None:
    """Refuses what is not a dictionary from a split to a number of questions.

    Args:
        num_questions: The argument.
        may_be_none: Boolean, whether there may be no questions at all. Defaults
            to `False`.
    """
    if not isinstance(num_questions, dict):
        raise TypeError(
            "`num_questions` must be a dictionary from split to a number. "
            f"Received: num_questions={num_questions!r:.80}"
        )
    for split, count in num_questions.items():
        check_integer(f"num_questions[{split!r}]", count, at_least=0)
    if not may_be_none and not any(num_questions.values()):
        raise ValueError(
            "`num_questions` must be above 0 for a split. "
            f"Received: num_questions={num_questions}"
        )
    if unknown := num_questions.keys() - SPLITS.keys():
        raise ValueError(
            f"The splits must be among {tuple(SPLITS)}. "
            f"Received: {sorted(unknown)} in `num_questions`"
        )


def dataset_name(
    name: str,
    prefix: str,
    key: tuple[Any, ...],
    num_questions: dict[str, int],
    seed: int,
) -> str:
    """The name of a config, or one made of all that its dataset depends on."""
    if not name:
        whole = (*key, *sorted(num_questions.items()), seed)
        digest = hashlib.sha256(repr(whole).encode()).hexdigest()[:12]
        name = f"{prefix}_{digest}"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            "`name` must be that of a folder: letters, digits, '_', '-' "
            f"and '.'. Received: name={name!r:.80}"
        )
    return name
