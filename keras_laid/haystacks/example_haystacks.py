"""Haystacks of a user's own examples, and the images in them."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.arguments import check_seed
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks.examples import Example
from keras_laid.haystacks.examples import as_examples
from keras_laid.haystacks.examples import open_image
from keras_laid.haystacks.haystack import Haystack

KEPT_BYTES = 2**31


def draw_images(
    examples: Sequence[Example],
    row: int,
    size: int,
    rng: np.random.Generator,
) -> tuple[list[Any], int]:
    """An example's images among others', and the place of the first."""
    own = list(examples[row].images)
    others: list[Any] = []
    drawn = {row}
    while len(others) < size - len(own):
        number = int(rng.integers(len(examples)))
        if number not in drawn:
            drawn.add(number)
            others += examples[number].images
    others = others[: size - len(own)]
    place = int(rng.integers(len(others) + 1))
    return others[:place] + own + others[place:], place


class ImageLoader:
    """Makes images have one size, and keeps those that were read from files.

    Args:
        size: Tuple of integers, height and width in pixels.
        kept_bytes: Integer, how many bytes of images from files are kept in
            memory, so that a file is decoded only once. Defaults to 2 GiB,
            14,000 images of 224 by 224 pixels.
    """

    def __init__(
        self, size: tuple[int, int], kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.size = size
        height, width = size
        self.most = kept_bytes // (3 * height * width)
        self.kept: dict[str, np.ndarray] = {}

    def __call__(
        self, images: Sequence[Sequence[np.ndarray | str]]
    ) -> np.ndarray:
        """Images of prompts as an array.

        Args:
            images: For each prompt, equally many `uint8` arrays of shape
                `(height, width, 3)` or paths.

        Returns:
            A `uint8` array of shape `(batch, images, height, width, 3)`.
        """
        return np.stack([list(map(self.load, each)) for each in images])

    def load(self, image: np.ndarray | str) -> np.ndarray:
        if not isinstance(image, str):
            return resized(image, self.size)
        if image in self.kept:
            return self.kept[image]
        loaded = open_image(image, self.size)
        if len(self.kept) < self.most:
            self.kept[image] = loaded
        return loaded


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image squeezed to height and width."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size[::-1]))


def check_image_size(image_size: Any) -> tuple[int, int]:
    """Returns height and width as a tuple."""
    size = check_integers("image_size", image_size)
    if len(size) != 2:
        raise ValueError(
            "`image_size` must be height and width. "
            f"Received: image_size={image_size}"
        )
    return size[0], size[1]


def check_room(examples: Sequence[Example], sizes: Sequence[int]) -> None:
    """Refuses sizes that examples cannot fill."""
    counts = [len(example.images) for example in examples]
    row = int(np.argmax(counts))
    if min(sizes) < counts[row]:
        raise ValueError(
            "`sizes` must have room for the images of each example. "
            f"Received: sizes={sizes}, and example {row} with {counts[row]} "
            "images"
        )
    if max(sizes) > sum(counts):
        raise ValueError(
            "`sizes` must be at most the images of all examples together. "
            f"Received: sizes={sizes}, and {sum(counts)} images"
        )


def example_haystacks(
    examples: Iterable[Any],
    num_questions: int,
    sizes: Sequence[int],
    model: keras.Model | None = None,
    seed: int = 0,
    options: tuple[str, ...] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Iterator[Haystack]:
    """Haystacks of your own examples, for `keras_laid.evaluate_haystacks`.

    The question is an example's prompt, the answer its response, the needles
    are its images, and the others come from other examples. Sizes are shared
    out evenly, and so are the examples.

    Args:
        examples: Iterable of `keras_laid.haystacks.Example`s or of what
            `keras_laid.LongPrompts` takes, all with a response.
        num_questions: Integer, at least 1.
        sizes: Sequence of integers: how many images a haystack holds.
        model: Optional model that will be asked. Images are read, and made to
            have the size that it takes; documents of text stay as they are.
            Defaults to `None`: all images stay as they are, for a function.
        seed: Integer. Defaults to `0`.
        options: Optional tuple of strings, the possible answers of every
            question. Defaults to `None`: answers in free words.
        image_size: Optional tuple of two integers, height and width in pixels
            that images are made to have, for a model that takes several sizes,
            such as Qwen 3.5. Defaults to `None`: that of `model`.

    Returns:
        An iterator of `Haystack`s, which are drawn one by one.

    Raises:
        ValueError: If an example is refused or has no response; its number is
            named. If a number is not positive, or if examples cannot fill a
            size.
        TypeError: If an argument is of another kind.
    """
    check_integer("num_questions", num_questions)
    sizes = check_integers("sizes", sizes)
    check_seed(seed)
    known = as_examples(examples)
    for row, example in enumerate(known):
        if example.response is None:
            raise ValueError(
                "Every example must have a response to be compared with. "
                f"Received: example {row} without"
            )
    check_room(known, sizes)
    if image_size is not None:
        image_size = check_image_size(image_size)
    elif model is not None:
        prompts = prompts_for(model)
        image_size = prompts.image_size if prompts.takes_images else None
    return _haystacks(known, num_questions, sizes, image_size, seed, options)


def _haystacks(
    examples: Sequence[Example],
    num_questions: int,
    sizes: Sequence[int],
    image_size: tuple[int, int] | None,
    seed: int,
    options: tuple[str, ...] | None,
) -> Iterator[Haystack]:
    load = None if image_size is None else ImageLoader(image_size)
    rng = np.random.default_rng(seed)
    size_of = rng.permutation(np.resize(sizes, num_questions))
    row_of = rng.permutation(np.resize(np.arange(len(examples)), num_questions))
    children = rng.spawn(num_questions)
    for size, row, child in zip(size_of, row_of, children, strict=True):
        example = examples[row]
        images, place = draw_images(examples, int(row), int(size), child)
        shown = images if load is None else load([images])[0]
        yield Haystack(
            example.prompt,
            str(example.response),
            anchor="",
            target="",
            needles=tuple(range(place, place + len(example.images))),
            images=shown,
            options=options,
        )
