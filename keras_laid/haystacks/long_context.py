"""Questions about long documents, as several benchmarks have them."""

import dataclasses
import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

from keras_laid.arguments import is_number
from keras_laid.haystacks.files import checked
from keras_laid.haystacks.files import image_path
from keras_laid.haystacks.files import read_json_lines
from keras_laid.haystacks.files import relative_path
from keras_laid.haystacks.questions import ANSWERS
from keras_laid.typing import PathLike

PLACEHOLDER = "<image>"
# Tasks by the kind of answer that they ask for.
WORDS = ("retrieval-text", "reasoning-text")
COUNTS = ("counting-text", "counting-image")
CHOICES = ("retrieval-image", "reasoning-image")
MM_NIAH = WORDS + COUNTS + CHOICES
VISUAL_HAYSTACKS = ("vh_single", "vh_multi")


@dataclasses.dataclass(frozen=True)
class LongContextQuestion:
    """A question about a long row of text and images.

    Attributes:
        id: String or integer, the benchmark's own.
        task: String: `"retrieval-text"`, `"retrieval-image"`,
            `"counting-text"`, `"counting-image"`, `"reasoning-text"` or
            `"reasoning-image"` of MM-NIAH, or `"vh_single"` or `"vh_multi"` of
            Visual Haystacks.
        context: String, with `<image>` where an image is.
        question: String; images are marked in it likewise.
        choices: Tuple of strings, the options A, B, ... of a multiple-choice
            question, or `None`. Options that are images are `"<image>"`.
        answer: For `"retrieval-text"` and `"reasoning-text"`, a tuple of
            strings, each of which is right. For the counting tasks, a tuple of
            integers, one for each image or kind of thing. For the other two
            tasks of MM-NIAH, the index of the right option, from 0. For
            Visual Haystacks, `"yes"` or `"no"`.
        images: Tuple of strings, paths relative to the benchmark's folder of
            images, in the order of the marks in `context`, `question` and
            `choices`.
        depths: Tuple of floats in `[0, 1]`: where in the context each needle
            is, 0 at its beginning. Empty where the file does not say.
        length: Integer, the length of the prompt in tokens, as the benchmark
            counts them.
    """

    id: str | int
    task: str
    context: str
    question: str
    choices: tuple[str, ...] | None
    answer: Any  # Of the kind that the task asks for.
    images: tuple[str, ...]
    depths: tuple[float, ...]
    length: int


def check_question(question: LongContextQuestion, where: str) -> None:
    """Refuses texts, images and choices that do not fit each other."""
    choices = question.choices or ()
    for name, text in (
        ("`context`", question.context),
        ("`question`", question.question),
        *(("A choice", choice) for choice in choices),
    ):
        if not checked(text, str, name, where).strip():
            raise ValueError(
                f"{name} must not be empty. Received: {text!r} in {where}"
            )
    texts = (question.context, question.question, *choices)
    marks = sum(text.count(PLACEHOLDER) for text in texts)
    if marks != len(question.images):
        raise ValueError(
            f"Context, question and choices must have a {PLACEHOLDER} for each "
            f"image. Received: {marks} for {len(question.images)} images in "
            f"{where}"
        )
    for image in question.images:
        relative_path(image, where)
    if (question.task in CHOICES) != bool(choices):
        raise ValueError(
            f"Questions of the tasks {CHOICES} must have choices, and no "
            f"others. Received: {question.task} with choices="
            f"{question.choices!r:.80} in {where}"
        )


def checked_id(value: Any, where: str) -> str | int:
    if isinstance(value, int):
        return checked(value, int, "`id`", where)
    return checked(value, str, "`id`", where)


def checked_answer(value: Any, task: str, choices: int, where: str) -> Any:
    """The answer of an entry, of the kind that its task asks for."""
    if task in CHOICES:
        if not 0 <= checked(value, int, "`answer`", where) < choices:
            raise ValueError(
                "`answer` must be the index of a choice, from 0. Received: "
                f"{value} with {choices} choices in {where}"
            )
        return value
    if task in VISUAL_HAYSTACKS:
        answer = checked(value, str, "`answer`", where).lower()
        if answer not in ANSWERS:
            raise ValueError(
                f"`answer` must be one of {ANSWERS}, in any case. Received: "
                f"{value!r:.80} in {where}"
            )
        return answer
    if task in WORDS and isinstance(value, str):
        value = [value]
    kind = str if task in WORDS else int
    answers = checked_tuple(value, kind, "`answer`", where)
    if not all(a.strip() if kind is str else a >= 0 for a in answers):
        raise ValueError(
            "`answer` must be texts that are not empty, or numbers of at "
            f"least 0. Received: {value!r:.80} in {where}"
        )
    return answers


def checked_depths(value: Any, where: str) -> tuple[float, ...]:
    """One depth or a list of them."""
    depths = value if isinstance(value, list) else [value]
    if not depths or not all(is_number(d) and 0 <= d <= 1 for d in depths):
        raise ValueError(
            "A depth must be a number in [0, 1], or a list of one or more. "
            f"Received: {value!r:.80} in {where}"
        )
    return tuple(float(depth) for depth in depths)


def checked_tuple(
    value: Any, kind: type, name: str, where: str
) -> tuple[Any, ...]:
    """A list of one or more values of a kind, as a tuple."""
    values = checked(value, list, name, where)
    if not values:
        raise ValueError(f"{name} must not be empty. Received: [] in {where}")
    return tuple(checked(v, kind, f"A value of {name}", where) for v in values)


def required(entry: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Refuses an entry that lacks keys; it may have others."""
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(
            f"An entry must have the keys {list(keys)}. Received: one that "
            f"lacks {missing} in {where}"
        )


def name_error(path: pathlib.Path, example: str) -> ValueError:
    """That a file's name does not tell the task, which entries do not."""
    return ValueError(
        "The file must have the name that it was published under, which tells "
        f"the task, such as {example!r}. Received: {path.name!r}"
    )


def read_entries(
    path: pathlib.Path,
    root: PathLike | None,
    make: Callable[[dict[str, Any], str], LongContextQuestion],
    repeats: int,
) -> tuple[LongContextQuestion, ...]:
    """Reads a JSONL file of questions and checks them together.

    Args:
        path: A JSONL file.
        root: Folder below which all images must be, or `None`.
        make: Function of a line's dictionary and a string that names the line.
        repeats: Integer, how many entries, at different depths, may share an
            id.

    Returns:
        A tuple of `LongContextQuestion`.
    """
    questions: dict[str, LongContextQuestion] = {}
    depths: dict[str | int, list[tuple[float, ...]]] = {}
    for where, entry in read_json_lines(path):
        question = make(entry, where)
        before = depths.setdefault(question.id, [])
        if len(before) >= repeats or (question.depths or None) in before:
            raise ValueError(
                f"At most {repeats} entries of this file may share an `id`, "
                f"each with another depth. Received: {question.id!r:.80} with "
                f"depth {question.depths} in {where}, after {before}"
            )
        before.append(question.depths)
        questions[where] = question
    if not questions:
        raise ValueError(
            f"A question file must hold at least one question. Received: {path}"
        )
    if root is not None:
        _check_images(questions, root)
    return tuple(questions.values())


def _check_images(
    questions: dict[str, LongContextQuestion], root: PathLike
) -> None:
    """Refuses images that are not files below `root`, by their line."""
    seen: set[str] = set()
    for where, question in questions.items():
        for image in question.images:
            if image in seen:
                continue
            try:
                image_path(root, image)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"{where}: {error}") from error
            seen.add(image)
