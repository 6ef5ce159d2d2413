"""Reads what others wrote, strictly: JSON files and paths of images."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any
from typing import TypeVar

from keras_laid.typing import PathLike

Kind = TypeVar("Kind")
LARGEST = 2**31  # Bytes of a JSON file; COCO's largest has 0.5 GB.


def read_json(
    path: pathlib.Path, kind: type[Kind], advice: str = "download it again"
) -> Kind:
    """Reads a JSON file whose outermost value is a `list` or a `dict`."""
    _check_file(path)
    try:
        value = _loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # Of JSON and of UTF-8.
        raise ValueError(
            f"The file must be a whole JSON file in UTF-8. Received: {path}, "
            f"with this error: {error}. It may be truncated: {advice}."
        ) from error
    return checked(value, kind, "the outermost value", path)


def read_json_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a JSONL file: a JSON object a line; blank lines are skipped.

    Yields:
        Tuples of a string, which names the file and the line's number from 1,
        and the line's dictionary.

    Raises:
        ValueError: If a line is not a whole JSON object in UTF-8 or has a key
            twice, or if the file is larger than 2 GiB.
        FileNotFoundError: If there is no such file.
    """
    _check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = _loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    "A line must be a whole JSON object in UTF-8. Received: "
                    f"{line!r:.80} in {where}, with this error: {error}. The "
                    "file may be truncated: download it again."
                ) from error
            yield where, checked(value, dict, "a line", where)


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():  # A pipe would be waited for.
        raise FileNotFoundError(
            f"A JSON file must be there. Received: {path}, which is not a file"
        )
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"A JSON file must have at most {LARGEST} bytes. "
            f"Received: {path} of {path.stat().st_size}"
        )


def _loads(content: bytes) -> Any:
    return json.loads(
        content.decode("utf-8"),
        object_pairs_hook=_dict_of,
        parse_constant=_refuse_constant,
    )


def _dict_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of a JSON object, which must have each key once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key twice in {[key for key, _ in pairs]!r:.80}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not a number of JSON")


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
    path = root / relative_path(name, "image_path")
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
            f"in {root}. Download the images, or correct the root."
        )
    return path


def relative_path(name: str, where: object) -> str:
    checked(name, str, "The path of an image", where)
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
        raise ValueError(
            "The path of an image must be relative and must not leave its "
            f"root: folders and a file with '/' between. Received: {name!r} "
            f"in {where}"
        )
    return name
