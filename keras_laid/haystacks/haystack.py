"""One question about images, some of which are the needles."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from typing import Self

import numpy as np

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

    Raises:
        TypeError: If the question or an answer is not a string, the images are
            not a sequence, or a path is not a string.
        ValueError: If the question or an answer is empty, if the answer is not
            an option, if an option comes twice, if there are no images, or if a
            needle is not one of their positions.
    """

    question: str
    answer: str
    anchor: str
    target: str
    needles: tuple[int, ...]
    images: Images
    options: tuple[str, ...] | None = ANSWERS

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
        """Makes one from an example of the dataset `visual_haystacks`.

        Args:
            example: Dictionary of NumPy values, of `tfds.as_numpy` or
                `tfds.data_source`.
        """
        return cls(
            question=_decoded(example["question"]),
            answer=_decoded(example["answer"]),
            anchor=_decoded(example["anchor"]),
            target=_decoded(example["target"]),
            needles=tuple(int(needle) for needle in example["needles"]),
            images=example["images"],
        )


def _decoded(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)
