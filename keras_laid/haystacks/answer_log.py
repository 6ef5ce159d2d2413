"""Keeps answers as they come, so that an evaluation can be interrupted."""

import json
import pathlib
import zlib

import numpy as np


class AnswerLog:
    """Records of answered questions, in memory and in a folder.

    `answers.jsonl` has a line for each, `settings.json` what all have in
    common. A last line that was cut by an interruption is dropped.

    Args:
        folder: A folder, made if need be, or `None`, to keep no file.
        settings: Dictionary for JSON: what the answers depend on.

    Raises:
        ValueError: If the folder holds answers under other settings, or a file
            that is not as written here.
    """

    def __init__(self, folder, settings):
        self.settings = settings
        self._answered = {}  # From the index of a question to its record.
        self._seen = set()
        self._path = None
        if folder is not None:
            folder = pathlib.Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / "answers.jsonl"
            self._check_settings(folder / "settings.json")
            self._read()

    @staticmethod
    def record(index, haystack, answer, right, complied):
        """What is kept of a question and its answer, for JSON."""
        return {
            **_asked(index, haystack),
            "answer": answer,
            "right": bool(right),
            "complied": None if complied is None else bool(complied),
        }

    def has(self, index, haystack):
        """Whether a question has been answered; refuses one unlike it."""
        self._seen.add(index)
        record = self._answered.get(index)
        if record is None:
            return False
        asked = _asked(index, haystack)
        kept = {name: record[name] for name in asked}
        if kept != asked:
            raise ValueError(
                "An evaluation must go on with the haystacks it was begun "
                f"with. Received: {asked}, where {self._path} has {kept}. Pass "
                "the same haystacks in the same order, or another `output`."
            )
        return True

    def add(self, records):
        self._answered.update((record["index"], record) for record in records)
        if self._path is not None:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)

    def records(self):
        """All records, in the order of their indices.

        Raises:
            ValueError: If there are none, or some for which no haystack came.
        """
        if not self._answered:
            raise ValueError(
                "There must be at least one haystack. Received: none. A "
                "generator is empty once it has been read."
            )
        if left := self._answered.keys() - self._seen:
            raise ValueError(
                "An evaluation must go on with all haystacks it was begun "
                f"with. Received: {len(self._seen)}, where {self._path} has "
                f"{len(left)} more. Pass all, or another `output`."
            )
        return tuple(self._answered[index] for index in sorted(self._answered))

    def _check_settings(self, path):
        if not path.exists():
            path.write_text(json.dumps(self.settings, indent=2) + "\n")
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(
            name
            for name in kept.keys() | self.settings.keys()
            if kept.get(name) != self.settings.get(name)
        )
        if differ:
            raise ValueError(
                "An evaluation must go on as it was begun. Received: "
                + ", ".join(f"{n}={self.settings.get(n)!r}" for n in differ)
                + f", where {path} has "
                + ", ".join(f"{n}={kept.get(n)!r}" for n in differ)
                + ". Pass another `output`, or delete that folder."
            )

    def _read(self):
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._path.write_bytes(whole)
        for number, line in enumerate(whole.decode().splitlines(), start=1):
            try:
                record = json.loads(line)
                self._answered[record["index"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    "A line must be a record of an answer. Received: line "
                    f"{number} of {self._path}, {line!r:.80}. Delete the line."
                ) from error


def _asked(index, haystack):
    """What tells a question from others, its images included."""
    images = haystack.images
    if isinstance(images[0], str):
        content = "\n".join(images).encode()
    else:
        content = np.ascontiguousarray(images)
    return {
        "index": index,
        "size": len(images),
        "needles": list(haystack.needles),
        "question": haystack.question,
        "expected": haystack.answer,
        "images": zlib.crc32(content),
    }
