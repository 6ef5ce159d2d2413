"""Reads the question files of the Visual Haystacks benchmark, strictly."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any
from typing import TypeVar

import numpy as np

from keras_laid.haystacks.questions import ANSWERS
from keras_laid.haystacks.sampling import Haystack
from keras_laid.typing import PathLike

Kind = TypeVar("Kind")
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
LARGEST = 2**31  # Bytes of a JSON file; COCO's largest has 0.5 GB.


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


def read_json(
    path: pathlib.Path, kind: type[Kind], advice: str = "download it again"
) -> Kind:
    """Reads a JSON file whose outermost value is a `list` or a `dict`."""
    if not path.is_file():  # A pipe would be waited for.
        raise FileNotFoundError(
            f"A JSON file must be there. Received: {path}, which is no file"
        )
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"A JSON file must have at most {LARGEST} bytes. "
            f"Received: {path} of {path.stat().st_size}"
        )
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_dict_of,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:  # Of JSON and of UTF-8.
        raise ValueError(
            f"The file must be a whole JSON file in UTF-8. Received: {path}, "
            f"with this error: {error}. It may be truncated: {advice}."
        ) from error
    return checked(value, kind, "the outermost value", path)


def _dict_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What Python would make of an object, but with each key once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key twice in {[key for key, _ in pairs]!r:.80}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")


def checked(value: object, kind: type[Kind], name: str, where: object) -> Kind:
    """Returns `value`, of type `kind`, or says where it is not."""
    # A boolean is an integer in Python, but not in JSON.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{name} must be of type {kind.__name__}. Received: "
            f"{value!r:.80} of type {type(value).__name__} in {where}"
        )
    return value


def image_path(root: PathLike, name: str) -> pathlib.Path:
    """The path of an image that must be a file below a root.

    Args:
        root: A folder.
        name: String, a path relative to it, with `/` between folders.

    Returns:
        A `pathlib.Path`, links resolved.

    Raises:
        ValueError: If `name` is not relative, or leaves the root by itself or
            by a symbolic link.
        FileNotFoundError: If there is no such file.
    """
    # Not `Path.resolve`, which raises at a link that leads to itself.
    root = pathlib.Path(os.path.realpath(root))
    path = root / _relative(name, "image_path")
    path = pathlib.Path(os.path.realpath(path))
    if not path.is_relative_to(root):
        raise ValueError(
            "An image must not lie outside the root, by symbolic links either. "
            f"Received: {name!r}, which is {path}, with root={root}. "
            "Copy the images below the root, or pass the root they lie in."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"Images must be below the root. Received: {name!r}, which is not "
            f"in {root}. Download COCO 2017's images, or correct the root."
        )
    return path


def _relative(name: str, where: object) -> str:
    checked(name, str, "The path of an image", where)
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
        raise ValueError(
            "The path of an image must be relative and must not leave its "
            f"root: folders and a file with '/' between. Received: {name!r} "
            f"in {where}"
        )
    return name


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
        _relative(image, where)
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
