"""Keeps answers as they come, so that an evaluation can be interrupted."""

import json
import os
import pathlib
import zlib
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_laid.haystacks.files import read_json
from keras_laid.haystacks.haystack import Haystack
from keras_laid.typing import PathLike

# What a record holds, and of which types.
KINDS = {
    "index": (int,),
    "size": (int,),
    "needles": (list,),
    "depths": (list, type(None)),
    "question": (str,),
    "expected": (str,),
    "options": (list, type(None)),
    "images": (int,),
    "answer": (str,),
    "right": (bool,),
    "complied": (bool, type(None)),
}


class AnswerLog:
    """Records of answered questions, in memory and in a folder.

    `answers.jsonl` has a line for each, `settings.json` what all have in
    common. A last line that was cut by an interruption is dropped. Nothing is
    written before the first new answers.

    Args:
        folder: A folder, made if need be, or `None`, to keep no file.
        settings: Dictionary for JSON: what the answers depend on.

    Raises:
        ValueError: If the folder holds answers under other settings or under
            none, or a file that is not as written here.
        NotADirectoryError: If `folder` is a file.
    """

    def __init__(
        self, folder: PathLike | None, settings: dict[str, Any]
    ) -> None:
        self.settings = settings
        # From the index of a question to its record.
        self._answered: dict[int, dict[str, Any]] = {}
        self._seen: set[int] = set()
        self._path: pathlib.Path | None = None
        self._torn_at: int | None = None  # Where a line begins that was cut.
        if folder is not None:
            folder = made_folder(folder)
            self._path = folder / "answers.jsonl"
            self._settings_path = folder / "settings.json"
            if self._path.exists() or self._settings_path.exists():
                self._check_settings()
            if self._path.exists():
                self._read()

    @staticmethod
    def record(
        index: int,
        haystack: Haystack,
        answer: str,
        right: bool,
        complied: bool | None,
    ) -> dict[str, Any]:
        """The record of a question and its answer, for JSON."""
        return {
            **_asked(index, haystack),
            "answer": answer,
            "right": bool(right),
            "complied": None if complied is None else bool(complied),
        }

    def has(self, index: int, haystack: Haystack) -> bool:
        """Whether a question has been answered; refuses one unlike it."""
        self._seen.add(index)
        record = self._answered.get(index)
        if record is None:
            return False
        asked = _asked(index, haystack)
        kept = {name: record[name] for name in asked}
        if kept != asked:
            raise ValueError(
                "An evaluation must be resumed with the same haystacks. "
                f"Received: {asked}, where {self._path} has {kept}. Pass "
                "the same haystacks in the same order, or another `output`."
            )
        return True

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        self._answered.update((record["index"], record) for record in records)
        if self._path is None:
            return
        if not self._settings_path.exists():
            # Written aside and moved, so that no one reads half a file.
            aside = self._settings_path.with_suffix(".new")
            aside.write_text(json.dumps(self.settings, indent=2) + "\n")
            os.replace(aside, self._settings_path)
        if self._torn_at is not None:
            os.truncate(self._path, self._torn_at)
            self._torn_at = None
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def records(self) -> tuple[dict[str, Any], ...]:
        """All records, in the order of their indices.

        Raises:
            ValueError: If there are none, or some for which no haystack came.
        """
        if not self._answered:
            raise ValueError(
                "There must be at least one haystack. Received: none. A "
                "generator is empty once it has been read."
            )
        self.check_all(self._seen)
        return tuple(self._answered[index] for index in sorted(self._answered))

    def check_all(self, indices: Collection[int]) -> None:
        """Refuses answers to questions with other indices than these."""
        if left := self._answered.keys() - indices:
            raise ValueError(
                "An evaluation must be resumed with the same haystacks, all of "
                f"them. Received: {len(indices)}, where {self._path} has "
                f"{len(left)} more. Pass all, or another `output`."
            )

    def _check_settings(self) -> None:
        path = self._settings_path
        if not path.exists():
            raise ValueError(
                "Answers must have their settings beside them. Received: "
                f"{self._path} without {path.name}. Pass another `output`, or "
                "put the file back."
            )
        advice = "pass another `output`, or delete that folder"
        kept = read_json(path, dict, advice)
        differ = sorted(
            name
            for name in kept.keys() | self.settings.keys()
            if kept.get(name) != self.settings.get(name)
        )
        if differ:
            raise ValueError(
                "An evaluation must be resumed with the same settings. "
                "Received: "
                + ", ".join(f"{n}={self.settings.get(n)!r}" for n in differ)
                + f", where {path} has "
                + ", ".join(f"{n}={kept.get(n)!r}" for n in differ)
                + ". Pass another `output`, or delete that folder."
            )

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._torn_at = len(whole)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                record = None
            if not _is_record(record) or record["index"] in self._answered:
                raise ValueError(
                    "A line must be a record of an answer, one a question. "
                    f"Received: line {number} of {self._path}, {line!r:.80}. "
                    "Delete the line."
                )
            self._answered[record["index"]] = record


def made_folder(path: PathLike) -> pathlib.Path:
    """A folder, made if need be."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"The folder to write to must be one. Received: {path}, which is "
            "a file or lies in one. Pass another folder."
        ) from error
    return path


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == KINDS.keys()
        and all(type(value[name]) in kinds for name, kinds in KINDS.items())
        and value["index"] >= 0
    )


def _asked(index: int, haystack: Haystack) -> dict[str, Any]:
    """A string that tells a question from others, its images included."""
    images = haystack.images
    if isinstance(images[0], str):
        checksum = zlib.crc32("\n".join(images).encode())
    else:
        checksum = 0
        for image in images:  # A function may take images of any sizes.
            checksum = zlib.crc32(np.ascontiguousarray(image).data, checksum)
    return {
        "index": index,
        "size": haystack.size,
        "needles": [int(needle) for needle in haystack.needles],
        "depths": haystack.depths and [*haystack.depths],
        "question": haystack.question,
        "expected": haystack.answer,
        "options": haystack.options and [*haystack.options],
        "images": checksum,
    }
