"""Short examples of a user's own: images, a prompt about them, a response."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_laid.arguments import check_path
from keras_laid.haystacks.files import read_json_lines
from keras_laid.typing import PathLike

# Columns of a table of examples; several images are separated by `;`.
COLUMNS = ("images", "prompt", "response")


@dataclasses.dataclass(frozen=True)
class Example:
    """Images, or documents of text, and a prompt about them.

    Attributes:
        images: Sequence of `uint8` arrays of shape `(height, width, 3)`, or of
            strings: paths of JPEG or PNG files, or for a decoder of text the
            documents themselves.
        prompt: String, which does not speak of an image's place.
        response: String, or `None` where the teacher's own next token is
            matched.

    Raises:
        TypeError: If an attribute is of another kind.
        ValueError: If there are no images, or if a text is empty.
    """

    images: Sequence[np.ndarray | str]
    prompt: str
    response: str | None = None

    def __post_init__(self) -> None:
        images = self.images
        if isinstance(images, (str, np.ndarray)) or not hasattr(
            images, "__len__"
        ):
            raise TypeError(
                "`images` must be a sequence of arrays or strings. Received: "
                f"images of type {type(images).__name__}. Put a single one "
                "into a list."
            )
        if not len(images):
            raise ValueError(
                "An example must have at least one image or document. "
                "Received: images=[]"
            )
        for image in images:
            check_image_or_text(image)
        for name, text in (
            ("prompt", self.prompt),
            ("response", self.response),
        ):
            if name == "response" and text is None:
                continue
            if not isinstance(text, str):
                raise TypeError(
                    f"`{name}` must be a string. Received: {name}={text!r:.80}"
                )
            if not text.strip():
                raise ValueError(
                    f"`{name}` must not be empty. Received: {name}={text!r}. "
                    "Leave the response out to learn the teacher's."
                )


def check_image_or_text(image: object) -> None:
    """Refuses what is neither a string nor a `uint8` image."""
    if isinstance(image, str):
        if not image.strip():
            raise ValueError(
                "A path or a document must not be empty. "
                f"Received: images with {image!r}"
            )
        return
    array = np.asarray(image)
    if array.dtype != "uint8" or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            "An image must be a path, or a `uint8` array of shape `(height, "
            f"width, 3)`. Received: dtype={array.dtype}, shape={array.shape}"
        )


def as_examples(examples: Iterable[Any]) -> list[Example]:
    """Examples of tuples, of dictionaries or of `Example`s.

    Raises:
        ValueError: If there are none, or if one is refused; its number is
            named, from 0.
        TypeError: If one is of another kind, likewise.
    """
    made = []
    for row, example in enumerate(examples):
        try:
            made.append(as_example(example))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Example {row}: {error}") from error
    if not made:
        raise ValueError("There must be examples. Received: none")
    return made


def as_example(example: Any) -> Example:
    if isinstance(example, Example):
        return example
    if isinstance(example, Mapping):
        return from_columns(example)
    if isinstance(example, (list, tuple)) and len(example) in (2, 3):
        images, *texts = example
        single = isinstance(images, (str, np.ndarray))
        return Example([images] if single else images, *texts)
    raise TypeError(
        "An example must be an `Example`, a dictionary, or a tuple `(images, "
        f"prompt, response)`. Received: {example!r:.80}"
    )


def from_columns(row: Mapping[str, Any]) -> Example:
    """An example of a dictionary, as of a table or a tfds-style dataset."""
    known = {name: row[name] for name in COLUMNS if name in row}
    if "images" not in known and "image" in row:
        known["images"] = [row["image"]]
    missing = [name for name in COLUMNS[:2] if name not in known]
    if missing:
        raise ValueError(
            f"An example must have {COLUMNS}, of which the last may be missing."
            f" Received: {sorted(row)}, without {missing}"
        )
    texts = [_decoded(known.get(name)) for name in COLUMNS[1:]]
    images = known["images"]
    if isinstance(images, str):
        images = [path.strip() for path in images.split(";") if path.strip()]
    return Example(list(images), texts[0], texts[1] or None)


def _decoded(text: Any) -> Any:
    return text.decode() if isinstance(text, bytes) else text


def read_examples(
    path: PathLike, root: PathLike | None = None
) -> list[Example]:
    """Reads a table of examples.

    Args:
        path: A CSV file with a header, or a JSONL file with a dictionary a
            line. Columns are `images` (paths; in CSV several are separated by
            `;`), `prompt` and `response`, which may be left out or empty.
        root: Folder that paths of images are relative to. Defaults to the
            file's own.

    Returns:
        A list of `Example`s, whose images are whole paths.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is not an example, or names an image that is
            missing or broken; the row is named.
    """
    check_path("path", path)
    path = pathlib.Path(path)
    root = path.parent if root is None else pathlib.Path(root)
    examples = []
    for where, row in rows_of(path):
        try:
            example = from_columns(row)
            images = [
                str(checked_file(root, image)) for image in example.images
            ]
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from error
        examples.append(dataclasses.replace(example, images=images))
    if not examples:
        raise ValueError(
            f"A table must have examples. Received: {str(path)!r}, without any"
        )
    return examples


def rows_of(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dictionaries, each after a string that names the file and the row."""
    if path.suffix == ".jsonl":
        yield from read_json_lines(path)
        return
    if path.suffix != ".csv":
        raise ValueError(
            "Examples are read from `.csv` and `.jsonl` files. "
            f"Received: {str(path)!r}"
        )
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    "A row must have as many cells as the header. "
                    f"Received: {row} in {where}"
                )
            yield where, row


def checked_file(root: pathlib.Path, image: Any) -> pathlib.Path:
    """The path of an image that can be opened."""
    if not isinstance(image, str):
        raise TypeError(
            "Images of a table must be paths. Received: an image of type "
            f"{type(image).__name__}"
        )
    path = root / image
    if not path.is_file():
        raise FileNotFoundError(
            f"An image must exist. Received: {image!r}, which is not a file in "
            f"{str(root)!r}"
        )
    open_image(path)
    return path


def open_image(path: PathLike, size: tuple[int, int] | None = None) -> Any:
    """Reads an image the right way up, as its EXIF data say.

    Args:
        path: A JPEG or PNG file.
        size: Optional tuple of integers, height and width in pixels that it is
            squeezed to. Defaults to `None`: the file is only looked at.

    Returns:
        A `uint8` array of shape `(height, width, 3)`, or `None` without `size`.

    Raises:
        ValueError: If the file is not a whole image.
    """
    from PIL import Image
    from PIL import ImageOps

    try:
        # By default Pillow also opens formats that other programs decode.
        with Image.open(path, formats=("JPEG", "PNG")) as file:
            if size is None:
                file.load()
                return None
            upright = ImageOps.exif_transpose(file).convert("RGB")
            return np.asarray(upright.resize(size[::-1]))
    except (
        OSError,
        ValueError,
        SyntaxError,  # Of a chunk of a PNG.
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"An image must be a whole JPEG or PNG file. Received: {path}, "
            f"with this error: {error}"
        ) from error
