"""Reads the question files of the Visual Haystacks benchmark, strictly."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_laid.haystacks.files import checked
from keras_laid.haystacks.files import image_path
from keras_laid.haystacks.files import read_json
from keras_laid.haystacks.files import relative_path
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.questions import ANSWERS
from keras_laid.typing import PathLike

KINDS: dict[str, type] = {
    "conversations": list,
    "id": str,
    "needle": str,
    "neg_image": list,
    "pos_image": list,
    "target": str,
}
# Who speaks: single-needle files say "human", multi-needle ones "user".
ASKERS = ("human", "user")
ANSWERERS = ("gpt",)


@dataclasses.dataclass(frozen=True)
class Question:
    """An entry of a question file.

    Attributes:
        id: String; entries about the same things share it.
        question: String.
        answer: `"yes"` or `"no"`.
        needle: String with its article, such as `"a knife"`: what all positive
            images show and no negative one does.
        target: String with its article: what is asked for.
        pos_image: Tuple of strings, one or more paths relative to a COCO 2017
            root.
        neg_image: Tuple of such strings, maybe empty.
    """

    id: str
    question: str
    answer: str
    needle: str
    target: str
    pos_image: tuple[str, ...]
    neg_image: tuple[str, ...]

    def haystack(self, rng: np.random.Generator) -> Haystack:
        """Shuffles the images, which files keep apart, with `rng`."""
        images = self.pos_image + self.neg_image
        order = rng.permutation(len(images))
        return Haystack(
            question=self.question,
            answer=self.answer,
            anchor=self.needle.split(" ", 1)[-1],
            target=self.target.split(" ", 1)[-1],
            needles=tuple(
                place
                for place, image in enumerate(order)
                if image < len(self.pos_image)
            ),
            images=[images[i] for i in order],
        )


def read_questions(
    path: PathLike, root: PathLike | None = None
) -> tuple[Question, ...]:
    """Reads a question file of the Visual Haystacks benchmark.

    Args:
        path: A JSON file, such as `single_needle/visual_haystack_10.json`.
        root: Optional folder that the paths of images are relative to. Without
            it, no image is looked for.

    Returns:
        A tuple of `Question`.

    Raises:
        ValueError: If the file is not whole, has a key twice, is larger than
            2 GiB or holds no questions, if an entry lacks a key, has another or
            has a value of the wrong type, or if the path of an image is not
            relative or leaves the root.
        FileNotFoundError: If the file, or an image below `root`, is missing.

    Reference:
     - [Wu et al., 2025](https://arxiv.org/abs/2407.13766), and the dataset
       page of the authors.
    """
    path = pathlib.Path(path)
    entries = read_json(path, list)
    if not entries:
        raise ValueError(
            f"A question file must hold at least one question. Received: {path}"
        )
    questions = tuple(
        _question(entry, f"{path}, entry {index}")
        for index, entry in enumerate(entries)
    )
    if root is not None:
        for question in questions:
            for image in question.pos_image + question.neg_image:
                image_path(root, image)
    return questions


def _keys(
    value: Any, kinds: Mapping[str, type], name: str, where: object
) -> None:
    """Checks that a dictionary has these keys, of these types, and no other."""
    checked(value, dict, name, where)
    for problem, keys in (
        ("lacks", sorted(kinds.keys() - value.keys())),
        ("has the unknown", sorted(value.keys() - kinds.keys())),
    ):
        if keys:
            raise ValueError(
                f"{name} must have the keys {sorted(kinds)} and no other. "
                f"Received: one that {problem} {keys} in {where}"
            )
    for key, kind in kinds.items():
        checked(value[key], kind, f"`{key}`", where)


def _question(entry: Any, where: str) -> Question:
    _keys(entry, KINDS, "An entry", where)
    if len(entry["conversations"]) != 2:
        raise ValueError(
            "`conversations` must hold a question and its answer. Received: "
            f"{len(entry['conversations'])} turns in {where}"
        )
    for turn, name, speakers in zip(
        entry["conversations"],
        ("The question", "The answer"),
        (ASKERS, ANSWERERS),
        strict=True,
    ):
        _keys(turn, {"from": str, "value": str}, name, where)
        _one_of(turn["from"], speakers, "`from`", where)
    asked, answered = (turn["value"] for turn in entry["conversations"])
    _one_of(answered, ANSWERS, "The answer", where)
    texts = {"id": entry["id"], "The question": asked}
    texts.update((key, entry[key]) for key in ("needle", "target"))
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(
                f"{name} must not be empty. Received: {text!r} in {where}"
            )
    images = entry["pos_image"] + entry["neg_image"]
    for image in images:
        relative_path(image, where)
    if not entry["pos_image"] or len(set(images)) < len(images):
        raise ValueError(
            "A haystack must have at least one needle in `pos_image`, and each "
            "image once. Received: "
            f"pos_image={entry['pos_image']!r:.80}, "
            f"neg_image={entry['neg_image']!r:.80} in {where}"
        )
    return Question(
        id=entry["id"],
        question=asked,
        answer=answered,
        needle=entry["needle"],
        target=entry["target"],
        pos_image=tuple(entry["pos_image"]),
        neg_image=tuple(entry["neg_image"]),
    )


def _one_of(
    value: str, choices: tuple[str, ...], name: str, where: str
) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {choices}. Received: {value!r} in {where}"
        )
