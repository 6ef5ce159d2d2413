"""Reads the question files of the MM-NIAH benchmark, strictly."""

import json
import pathlib
from typing import Any

from keras_laid.arguments import check_path
from keras_laid.haystacks.files import checked
from keras_laid.haystacks.long_context import COUNTS
from keras_laid.haystacks.long_context import MM_NIAH
from keras_laid.haystacks.long_context import PLACEHOLDER
from keras_laid.haystacks.long_context import LongContextQuestion
from keras_laid.haystacks.long_context import check_question
from keras_laid.haystacks.long_context import checked_answer
from keras_laid.haystacks.long_context import checked_depths
from keras_laid.haystacks.long_context import checked_id
from keras_laid.haystacks.long_context import checked_tuple
from keras_laid.haystacks.long_context import name_error
from keras_laid.haystacks.long_context import read_entries
from keras_laid.haystacks.long_context import required
from keras_laid.typing import PathLike

KEYS = ("id", "images_list", "context", "question", "answer", "meta")
META = ("placed_depth", "context_length", "choices", "choices_image_path")


def read_mm_niah(
    path: PathLike, root: PathLike | None = None
) -> tuple[LongContextQuestion, ...]:
    """Reads a question file of MM-NIAH (Needle In A Multimodal Haystack).

    The benchmark's `images_list` leaves out the images among the choices; here
    `images` has them at its end, where its prompts show them. Keys that are
    not needed, such as `needles`, are not looked at.

    Args:
        path: A JSONL file with the name of its task, such as
            `mm_niah_val/annotations/retrieval-text.jsonl`.
        root: Optional folder that the paths of images are relative to, such as
            `mm_niah_val/images`. Without it, no image is looked for.

    Returns:
        A tuple of `LongContextQuestion`, in the order of the file.

    Raises:
        ValueError: If the file's name is not one of a task, if a line is not a
            whole JSON object, if an entry lacks a key, has a value of the
            wrong type, an answer that is not one of its choices, another
            number of `<image>` than of images, or the id of an earlier entry,
            or if the path of an image is not relative or leaves the root. The
            message names the file and the line.
        FileNotFoundError: If the file, or an image below `root`, is missing.

    Reference:
     - [Wang et al., 2024](https://arxiv.org/abs/2406.07230), and "Data Format"
       of the README of `OpenGVLab/MM-NIAH` at commit 2fd03dd, whose
       `get_input` counts `<image>` as it is done here.
    """
    check_path("path", path)
    path = pathlib.Path(path)
    task = path.name.removesuffix(".jsonl")
    if task not in MM_NIAH or task == path.name:
        raise name_error(path, "retrieval-text.jsonl")

    def make(entry: dict[str, Any], where: str) -> LongContextQuestion:
        return _question(entry, task, where)

    return read_entries(path, root, make, repeats=1)


def _question(
    entry: dict[str, Any], task: str, where: str
) -> LongContextQuestion:
    required(entry, KEYS, where)
    meta = checked(entry["meta"], dict, "`meta`", where)
    required(meta, META, where)
    choices, shown = (
        meta[key]
        and checked_tuple(meta[key], str, f"`{key}`", where)  # Or none.
        for key in ("choices", "choices_image_path")
    )
    if choices and shown:
        raise ValueError(
            "Choices must be texts or images. Received: both `choices` and "
            f"`choices_image_path` in {where}"
        )
    if shown:
        choices = (PLACEHOLDER,) * len(shown)
    images = checked(entry["images_list"], list, "`images_list`", where)
    length = checked(meta["context_length"], int, "`context_length`", where)
    if length < 1:
        raise ValueError(
            f"`context_length` must be at least 1. Received: {length} in "
            f"{where}"
        )
    answer = entry["answer"]
    if task in COUNTS and isinstance(answer, str):
        answer = _list_in(answer, where)
    question = LongContextQuestion(
        id=checked_id(entry["id"], where),
        task=task,
        context=entry["context"],
        question=entry["question"],
        choices=choices or None,
        answer=checked_answer(answer, task, len(choices or ()), where),
        images=(*images, *(shown or ())),
        depths=checked_depths(meta["placed_depth"], where),
        length=length,
    )
    check_question(question, where)
    return question


def _list_in(answer: str, where: str) -> Any:
    """The list that the benchmark's scorer reads out of a string, too."""
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ValueError(
            "`answer` to a counting question must be a list, or a string that "
            f"holds one in JSON. Received: {answer!r:.80} in {where}"
        ) from error
