"""Images of handwritten digits: the embedded source of haystacks."""

import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_switch
from keras_laid.haystacks.sampling import PairSource

NAMES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
# Of every 20 drawings of a digit: which go where.
SPLITS = {
    "train": range(16),
    "validation": range(16, 17),
    "test": range(17, 20),
}
PATCH = 8  # Pixels on a side of a drawing.


class Digits(PairSource):
    """Images with two different handwritten digits each.

    The drawings are scikit-learn's 1,797 digits of 8 x 8 pixels (UCI "Optical
    Recognition of Handwritten Digits", CC BY 4.0). An image has a 2 x 2 grid of
    cells; two cells drawn at random hold one digit each, two are blank. The
    splits share no drawing.

    Args:
        split: `"train"` (80% of the drawings of each digit), `"validation"`
            (5%) or `"test"` (15%).
        image_size: Integer, height and width in pixels, a multiple of 16.
            Drawings are enlarged by repeating pixels. Defaults to `16`.
        augment: Boolean, whether each drawing is moved by up to half a pixel
            and dimmed by up to a fifth, for training. Defaults to `False`.

    Attributes:
        names: Tuple of the ten words a question uses, `names[d]` for digit `d`.

    Raises:
        TypeError: If `image_size` is not an integer, or `augment` is not a
            boolean.
        ValueError: If `split` is unknown or `image_size` is not a positive
            multiple of 16.
    """

    def __init__(
        self, split: str, image_size: int = 2 * PATCH, augment: bool = False
    ) -> None:
        check_choice("split", split, SPLITS)
        check_integer("image_size", image_size)
        check_switch("augment", augment)
        if image_size % (2 * PATCH):
            raise ValueError(
                "`image_size` must be a positive multiple of "
                f"{2 * PATCH} pixels, the size of a 2 x 2 grid of drawings. "
                f"Received: image_size={image_size}"
            )
        self.split = split
        self.image_size = image_size
        self.augment = augment
        self.names = NAMES
        # Here, since scikit-learn takes a second to import.
        from sklearn.datasets import load_digits

        data = load_digits()
        drawings = np.round(data.images * (255 / 16)).astype("uint8")
        # One array of shape (count, 8, 8) a digit.
        self._drawings: list[np.ndarray] = []
        for digit in range(len(NAMES)):
            digit_drawings = drawings[data.target == digit]
            mine = np.isin(np.arange(len(digit_drawings)) % 20, SPLITS[split])
            self._drawings.append(digit_drawings[mine])

    def render(self, pairs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws one image for each pair of digits.

        Args:
            pairs: Integer array of shape `(images, 2)`, digits 0 to 9.
            rng: A `numpy.random.Generator`; it picks drawings and cells.

        Returns:
            A `uint8` array of shape `(images, image_size, image_size, 3)`.
        """
        count = len(pairs)
        cells = np.zeros((count, 4, PATCH, PATCH), "uint8")
        places = np.argsort(rng.random((count, 4)), axis=1)[:, :2]
        draws = rng.random((count, 2))
        for digit, drawings in enumerate(self._drawings):
            image, which = np.nonzero(pairs == digit)
            chosen = (draws[image, which] * len(drawings)).astype(int)
            cells[image, places[image, which]] = drawings[chosen]
        if self.augment:
            cells = augmented(cells.astype("float32"), rng)
        grid = cells.reshape(count, 2, 2, PATCH, PATCH)
        images = grid.transpose(0, 1, 3, 2, 4)  # (image, row, y, column, x)
        images = images.reshape(count, 2 * PATCH, 2 * PATCH)
        zoom = self.image_size // (2 * PATCH)
        images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
        return np.repeat(images[..., None], 3, axis=-1)


def augmented(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves and dims drawings of shape `(images, cells, height, width)`."""
    for axis in (2, 3):
        # Half a pixel to either side, by linear interpolation.
        share = rng.uniform(-0.5, 0.5, size=(*cells.shape[:2], 1, 1))
        width = [(0, 0)] * 4
        width[axis] = (1, 1)
        padded = np.pad(cells, width)
        after = padded.take(np.arange(2, PATCH + 2), axis)
        before = padded.take(np.arange(PATCH), axis)
        neighbour = np.where(share > 0, after, before)
        cells = cells + np.abs(share) * (neighbour - cells)
    light = rng.uniform(0.8, 1.0, size=(*cells.shape[:2], 1, 1))
    return np.round(cells * light).astype("uint8")
