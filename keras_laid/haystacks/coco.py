"""Images of COCO 2017, labelled by their instances: a source of haystacks."""

import pathlib
from collections.abc import Collection
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.haystacks.examples import open_image
from keras_laid.haystacks.files import checked
from keras_laid.haystacks.files import image_path
from keras_laid.haystacks.files import read_json
from keras_laid.typing import PathLike

FOLDERS = {"train": "train2017", "validation": "val2017", "test": "val2017"}


class Coco:
    """Photographs, with the names of all things that they show.

    Training images are those of `train2017`. Of `val2017`, sorted by name,
    every other image is for validation and the rest for testing. The root holds

        annotations/instances_train2017.json
        annotations/instances_val2017.json
        train2017/000000000009.jpg ...
        val2017/000000000139.jpg ...

    of which a split needs its own. Images are only looked for when they are
    opened.

    Args:
        root: The folder of COCO 2017.
        split: `"train"`, `"validation"` or `"test"`.
        exclude: Iterable of strings, images to leave out, such as
            `"val2017/000000000139.jpg"`. Defaults to none.

    Attributes:
        names: Tuple of the names of the categories, in the order of their ids.
        images: Tuple of strings, paths relative to the root.
        labels: Boolean array of shape `(images, names)`: what an image shows.

    Raises:
        ValueError: If `split` is unknown, or if the annotations are truncated,
            lack a key, have an id or a name twice or name an unknown image or
            category.
        TypeError: If `exclude` is a string.
        FileNotFoundError: If there are no annotations.

    Reference:
     - [Lin et al., 2014](https://arxiv.org/abs/1405.0312), and the format on
       COCO's site, of which `categories`, `images` and `annotations` are read.
    """

    def __init__(
        self,
        root: PathLike,
        split: str,
        exclude: Collection[str] = (),
    ) -> None:
        check_choice("split", split, FOLDERS)
        if isinstance(exclude, str):
            raise TypeError(
                "`exclude` must be a collection of strings. Received: "
                f"exclude={exclude!r:.80}. Pass `({exclude!r:.80},)`."
            )
        self.root = pathlib.Path(root)
        self.split = split
        folder = FOLDERS[split]
        path = self.root / "annotations" / f"instances_{folder}.json"
        if not path.is_file():
            raise FileNotFoundError(
                "The root of COCO 2017 must hold the instance annotations. "
                f"Received: root={root}, which lacks {path}. Download "
                "annotations_trainval2017.zip and unpack it in the root."
            )
        self.names, shown = _read_instances(path)
        names = sorted(shown)
        if split != "train":
            names = names[split == "test" :: 2]
        exclude = frozenset(exclude)  # An iterator can be read once.
        names = [n for n in names if f"{folder}/{n}" not in exclude]
        self.images = tuple(f"{folder}/{name}" for name in names)
        self.labels = np.zeros((len(names), len(self.names)), bool)
        for row, name in enumerate(names):
            self.labels[row, list(shown[name])] = True
        # How many images show both of two things.
        counts = self.labels.astype("int64")
        self._both = counts.T @ counts

    def draw(
        self,
        size: int,
        needles: np.ndarray,
        shows: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[str, str, list[str]]:
        """Draws the anchor, the target and the images of one haystack.

        All pairs of names that could be asked about, whatever the answer, are
        equally likely. Straws are images without the anchor, as in the
        benchmark; no image is in a haystack twice.

        Args:
            size: Integer, number of images.
            needles: Integer array, positions of the needles.
            shows: Boolean array, which of the needles show the target.
            rng: A `numpy.random.Generator`.

        Returns:
            A tuple: two names and a list of `size` strings, paths relative to
            the root.

        Raises:
            ValueError: If there are too few images for any pair of names.
        """
        having = np.diagonal(self._both)
        enough = (
            (self._both >= len(needles))
            & (having[:, None] - self._both >= len(needles))
            & (len(self.images) - having[:, None] >= size - len(needles))
        )
        pairs = np.argwhere(enough)
        if not len(pairs):
            raise ValueError(
                "There must be two names with enough images that show both, "
                "that show but the first, and that do not show it. Received: "
                f"size={size}, needles={len(needles)} for the "
                f"{len(self.images)} images of split={self.split!r}. "
                "Pass smaller haystacks or more images."
            )
        anchor, target = pairs[rng.integers(len(pairs))]
        has_anchor = self.labels[:, anchor]
        has_target = self.labels[:, target]
        chosen = np.zeros(size, int)
        straws = np.setdiff1d(np.arange(size), needles)
        for places, pool in (
            (needles[shows], has_anchor & has_target),
            (needles[~shows], has_anchor & ~has_target),
            (straws, ~has_anchor),
        ):
            chosen[places] = rng.choice(
                np.flatnonzero(pool), len(places), replace=False
            )
        images = [self.images[i] for i in chosen]
        return self.names[anchor], self.names[target], images


def read_image(root: PathLike, name: str, image_size: int) -> np.ndarray:
    """Reads an image and makes it square.

    Args:
        root: A folder.
        name: String, the path of a JPEG or PNG file relative to it.
        image_size: Integer, height and width in pixels. The image is squeezed,
            not cropped, so that it shows all that it is labelled with.

    Returns:
        A `uint8` array of shape `(image_size, image_size, 3)`.

    Raises:
        ValueError: If the path leaves the root, or if the file is not an image.
        FileNotFoundError: If there is no such file.
    """
    path = image_path(root, name)
    return open_image(path, (image_size, image_size))


def _read_instances(
    path: pathlib.Path,
) -> tuple[tuple[str, ...], dict[str, set[int]]]:
    """Returns names, and the numbers of those that each file shows."""
    data = read_json(path, dict)

    def rows(name: str, /, **kinds: type) -> Iterator[tuple[Any, ...]]:
        for row in checked(data.get(name), list, f"`{name}`", path):
            checked(row, dict, f"An element of `{name}`", path)
            yield tuple(
                checked(row.get(key), kind, f"`{key}` of `{name}`", path)
                for key, kind in kinds.items()
            )

    def by_id(name: str, /, **kinds: type) -> dict[Any, Any]:
        pairs = list(rows(name, **kinds))
        for key, values in zip(kinds, zip(*pairs, strict=True), strict=False):
            if len(set(values)) < len(values) or "" in values:
                raise ValueError(
                    f"`{name}` must have each `{key}` once, and none that is "
                    f"empty. Received: {len(values)} of them, "
                    f"{len(set(values) - {''})} different ones in {path}"
                )
        return dict(sorted(pairs))

    names = by_id("categories", id=int, name=str)
    numbers = {category: number for number, category in enumerate(names)}
    files = by_id("images", id=int, file_name=str)
    shown: dict[str, set[int]] = {file: set() for file in files.values()}
    for image, category in rows("annotations", image_id=int, category_id=int):
        if image not in files or category not in numbers:
            raise ValueError(
                "An annotation must be of an image and a category in the file. "
                f"Received: image_id={image}, category_id={category} in {path}"
            )
        shown[files[image]].add(numbers[category])
    return tuple(names.values()), shown
