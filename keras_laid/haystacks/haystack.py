"""One question about images, some of which are the needles."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from typing import Self

import numpy as np

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.arguments import is_integer
from keras_laid.haystacks.questions import ANSWERS
from keras_laid.typing import Images


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Images, and a question about those of them that show the anchor.

    Attributes:
        question: String, with its options where a model cannot know them.
        answer: String, the right answer: one of `options`, if there are any.
        anchor: String, what the needles show and no other image does. It may
            be empty.
        target: String, what is asked for. It may be empty.
        needles: Tuple of integers, the positions of the needles. It may be
            empty, as where the question is about something that no image
            shows.
        images: Sequence of `uint8` arrays of shape `(height, width, 3)`, or of
            strings: paths below a root, or for a decoder of text the documents
            themselves.
        options: Tuple of two or more different strings, the possible answers;
            or `None` for a question that is answered in free words. Defaults to
            `("yes", "no")`.
        length: Optional integer, the length of the whole prompt in tokens. With
            it, accuracy is by tokens. Defaults to `None`: accuracy is by the
            number of images.
        depths: Optional tuple of floats in `[0, 1]`, where each needle begins:
            `0` is the start of the prompt, `1` its end. It is given with
            `length`, and only then.

    Raises:
        TypeError: If the question or an answer is not a string, the images are
            not a sequence, or a path is not a string.
        ValueError: If the question or an answer is empty, if the answer is not
            an option, if an option comes twice, if there are no images, if a
            needle is not one of their positions, or if `length` or `depths` is
            out of its range or without the other.
    """

    question: str
    answer: str
    anchor: str
    target: str
    needles: tuple[int, ...]
    images: Images
    options: tuple[str, ...] | None = ANSWERS
    length: int | None = None
    depths: tuple[float, ...] | None = None

    @property
    def size(self) -> int:
        """The length in tokens where it is given, or the number of images."""
        return len(self.images) if self.length is None else self.length

    def __eq__(self, other: object) -> bool:
        """Whether all is equal, images pixel by pixel."""
        if not isinstance(other, Haystack):
            return NotImplemented
        return (
            len(self.images) == len(other.images)
            and all(map(np.array_equal, self.images, other.images))
            and all(
                getattr(self, field.name) == getattr(other, field.name)
                for field in dataclasses.fields(self)
                if field.name != "images"
            )
        )

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not hasattr(
            self.images, "__len__"
        ):
            raise TypeError(
                "A haystack must have a string as its question and a sequence "
                f"of images. Received: question={self.question!r:.80}, images "
                f"of type {type(self.images).__name__}"
            )
        self._check_answer()
        if any(isinstance(image, os.PathLike) for image in self.images):
            raise TypeError(
                "Paths of images must be strings. Received: "
                f"images={self.images!r:.80}. Pass `str(path)` of each."
            )
        count = len(self.images)
        if not count or not all(
            is_integer(needle) and 0 <= needle < count
            for needle in self.needles
        ):
            raise ValueError(
                "A haystack must have images, and `needles` must be positions "
                f"among them. Received: {count} images, needles={self.needles}"
            )
        self._check_length()

    def _check_length(self) -> None:
        if self.length is None and self.depths is None:
            return
        if self.length is None or self.depths is None:
            raise ValueError(
                "`length` and `depths` must be given together. Received: "
                f"length={self.length}, depths={self.depths}"
            )
        check_integer("length", self.length)
        if len(self.depths) != len(self.needles):
            raise ValueError(
                "`depths` must have one number for each needle. Received: "
                f"depths={self.depths}, needles={self.needles}"
            )
        for depth in self.depths:
            check_number("depths", depth, "[0, 1]")

    def _check_answer(self) -> None:
        options = self.options
        if options is not None and not isinstance(options, tuple):
            raise TypeError(
                "`options` must be a tuple of strings or `None`. "
                f"Received: options={options!r:.80}"
            )
        texts = (self.answer, *(options or ()))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(
                "The answer and the options must be strings. Received: "
                f"answer={self.answer!r:.80}, options={options!r:.80}"
            )
        if not all(text.strip() for text in (self.question, *texts)):
            raise ValueError(
                "A haystack must have a question, an answer and options that "
                f"are not empty. Received: question={self.question!r:.80}, "
                f"answer={self.answer!r:.80}, options={options!r:.80}"
            )
        if options is not None and (
            self.answer not in options or len({*options}) < max(2, len(options))
        ):
            raise ValueError(
                "The answer must be one of `options`, two or more different "
                f"strings. Received: answer={self.answer!r:.80}, "
                f"options={options!r:.80}. Pass `options=None` for an answer "
                "in free words."
            )

    @classmethod
    def from_example(cls, example: Mapping[str, Any]) -> Self:
        """Makes one from an example of `visual_haystacks` or `text_haystacks`.

        Args:
            example: Dictionary of NumPy values, of `tfds.as_numpy` or
                `tfds.data_source`.
        """
        is_text = "documents" in example
        options: tuple[str, ...] | None = ANSWERS
        if is_text:
            options = tuple(map(_decoded, example["options"])) or None
        return cls(
            question=_decoded(example["question"]),
            answer=_decoded(example["answer"]),
            anchor=_decoded(example["anchor"]),
            target="" if is_text else _decoded(example["target"]),
            needles=tuple(int(needle) for needle in example["needles"]),
            images=tuple(map(_decoded, example["documents"]))
            if is_text
            else example["images"],
            options=options,
            length=int(example["length"]) if is_text else None,
            depths=tuple(map(float, example["depths"])) if is_text else None,
        )


def _decoded(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)
