"""Reads the haystacks of the MMLongBench benchmark, strictly."""

import pathlib
import re
from typing import Any

from keras_laid.arguments import check_path
from keras_laid.haystacks.files import checked
from keras_laid.haystacks.long_context import CHOICES
from keras_laid.haystacks.long_context import MM_NIAH
from keras_laid.haystacks.long_context import PLACEHOLDER
from keras_laid.haystacks.long_context import VISUAL_HAYSTACKS
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

# `retrieval-image_test_K8_dep6.jsonl`, `vh_single_test_1000_K128_dep6.jsonl`:
# the task, thousands of tokens, and at how many depths a question is asked.
NAME = re.compile(
    rf"({'|'.join(MM_NIAH + VISUAL_HAYSTACKS)})"
    r"_test(?:_[0-9]+)?_K([0-9]{1,6})_dep([0-9]{1,6})\.jsonl"
)


def read_mm_long_bench(
    path: PathLike, root: PathLike | None = None
) -> tuple[LongContextQuestion, ...]:
    """Reads a file of MMLongBench's Visual Haystacks or MM-NIAH.

    The files are those in its folder `NIAH`. Entries with the same `id` are
    one question at several depths, as many as the file's name says: draw them
    together when you take a part of a file. Keys that are not needed, such as
    `positive_ctxs`, are not looked at.

    Args:
        path: A JSONL file with its published name, such as
            `retrieval-image_test_K8_dep6.jsonl`: entries do not tell the task,
            nor the length, which is 8 * 1024 tokens here.
        root: Optional folder that the paths of images are relative to,
            `mmlb_image`. Without it, no image is looked for.

    Returns:
        A tuple of `LongContextQuestion`, in the order of the file. Its `depths`
        are empty where entries have no `depth`.

    Raises:
        ValueError: If the file's name is not a published one, if a line is not
            a whole JSON object, if an entry lacks a key, has a value of the
            wrong type, an answer that is none of its choices, another number
            of `<image>` than of images, or an id that came at that depth
            before or more often than the name says, or if the path of an image
            is not relative or leaves the root. The message names the file and
            the line.
        FileNotFoundError: If the file, or an image below `root`, is missing.

    Reference:
     - [Wang et al., 2025](https://arxiv.org/abs/2505.10610), and `data.py`,
       `configs/` and `figure_scripts/utils.py`, which reads `depth`, of
       `EdinburghNLP/MMLongBench` at commit 22b9f27.
    """
    check_path("path", path)
    path = pathlib.Path(path)
    match = NAME.fullmatch(path.name)
    if match is None:
        raise name_error(path, "vh_single_test_1000_K8_dep6.jsonl")
    task, length = match[1], 1024 * int(match[2])

    def make(entry: dict[str, Any], where: str) -> LongContextQuestion:
        return _question(entry, task, length, where)

    return read_entries(path, root, make, repeats=int(match[3]))


def _question(
    entry: dict[str, Any], task: str, length: int, where: str
) -> LongContextQuestion:
    required(entry, ("id", "ctxs", "question", "answer"), where)
    choices = None
    if task in VISUAL_HAYSTACKS:
        images = checked_tuple(entry["ctxs"], str, "`ctxs`", where)
        context = "\n".join([PLACEHOLDER] * len(images))
    else:
        required(entry, ("image_list", *_further_images(task)), where)
        images = (*checked(entry["image_list"], list, "`image_list`", where),)
        for key in _further_images(task):
            further = checked_tuple(entry[key], str, f"`{key}`", where)
            images += further
            if task in CHOICES:
                choices = (PLACEHOLDER,) * len(further)
        context = "\n\n".join(_texts(entry["ctxs"], where))
    answer = checked_answer(entry["answer"], task, len(choices or ()), where)
    question = LongContextQuestion(
        id=checked_id(entry["id"], where),
        task=task,
        context=context,
        question=entry["question"],
        choices=choices,
        answer=answer,
        images=images,
        depths=checked_depths(entry["depth"], where)
        if "depth" in entry
        else (),
        length=length,
    )
    check_question(question, where)
    return question


def _further_images(task: str) -> tuple[str, ...]:
    """The key of images that question or choices show."""
    if task in CHOICES:
        return ("choices_image",)
    return ("needle_image_list",) if task == "counting-image" else ()


def _texts(paragraphs: Any, where: str) -> list[str]:
    for paragraph in checked_tuple(paragraphs, dict, "`ctxs`", where):
        required(paragraph, ("text",), where)
        checked(paragraph["text"], str, "`text`", where)
    return [paragraph["text"] for paragraph in paragraphs]
