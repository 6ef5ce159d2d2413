"""The dataset `visual_haystacks` of `tensorflow_datasets`."""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.haystacks.builder_config import check_counts
from keras_laid.haystacks.builder_config import dataset_name
from keras_laid.haystacks.builder_config import default_counts
from keras_laid.haystacks.builder_config import require_tfds
from keras_laid.haystacks.coco import Coco
from keras_laid.haystacks.coco import read_image
from keras_laid.haystacks.digits import SPLITS
from keras_laid.haystacks.digits import Digits
from keras_laid.haystacks.drawing import draw_haystacks
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.openmoji import ATTRIBUTION
from keras_laid.haystacks.openmoji import OpenMoji
from keras_laid.haystacks.question_files import Question
from keras_laid.haystacks.question_files import read_questions
from keras_laid.haystacks.sampling import PairSource
from keras_laid.haystacks.sampling import check_sizes

require_tfds()
import tensorflow_datasets as tfds  # noqa: E402

SOURCES = ("digits", "openmoji", "coco")
LONG = (1, 2, 5, 10, 20, 50, 100, 150)
SHORT = (1, 2, 5, 10, 20)
MULTI = (2, 3)  # Needles, as in the benchmark.


@dataclasses.dataclass
class HaystackConfig(tfds.core.BuilderConfig):
    """The form of the haystacks of a dataset.

    Attributes:
        name: String, also the name of a folder. Where left out, it is made
            from all of the following, so that no two datasets are mixed up.
        source: `"digits"`, `"openmoji"` or `"coco"`, where images come from.
        sizes: Tuple of integers: how many images a haystack holds.
        needles: Tuple of integers: how many of them show the anchor. `(1,)`
            asks the benchmark's single-needle question, `(2, 3)` its
            multi-needle ones.
        image_size: Integer, height and width in pixels.
        num_questions: Dictionary from split to a number of questions. A split
            with none is left out.
        seed: Integer.

    Raises:
        ValueError: If a value is out of its range, if there are no questions,
            no room for needles, or if the name is that of no folder.
        TypeError: If a value is of another kind.
    """

    name: str = ""
    source: str = "digits"
    sizes: tuple[int, ...] = LONG
    needles: tuple[int, ...] = (1,)
    image_size: int = 16
    num_questions: dict[str, int] = dataclasses.field(
        default_factory=default_counts
    )
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("source", self.source, SOURCES)
        self.sizes, self.needles = check_sizes(self.sizes, self.needles)
        check_integer("image_size", self.image_size)
        check_integer("seed", self.seed, at_least=0)
        # Question files may be all that is wanted of `coco`.
        check_counts(self.num_questions, may_be_none=self.source == "coco")
        key = (self.source, self.sizes, self.needles, self.image_size)
        self.name = dataset_name(
            self.name, self.source, key, self.num_questions, self.seed
        )


class VisualHaystacks(tfds.core.GeneratorBasedBuilder):
    """Questions about one image, or a few, among many.

    A user's own haystacks are a config:
    `tfds.load("visual_haystacks", builder_kwargs={"config":
    HaystackConfig(source="digits", sizes=(200,))})`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
    For `coco`, the root of COCO 2017: `annotations/instances_train2017.json`
    and `annotations/instances_val2017.json` from
    annotations_trainval2017.zip, and the folders `train2017` and `val2017` from
    train2017.zip and val2017.zip (https://cocodataset.org/#download).
    Question files of the benchmark go below `questions`, such as
    `questions/single_needle/visual_haystack_10.json`; each is a split of its
    own. The other configs need nothing.
    """
    BUILDER_CONFIGS = [
        HaystackConfig(
            name=source if needles == (1,) else f"{source}_multi",
            description=f"{kind}, {description}.",
            source=source,
            sizes=sizes if needles == (1,) else sizes[2:],
            needles=needles,
            image_size=image_size,
        )
        for source, sizes, image_size, description in (
            ("digits", LONG, 16, "two handwritten digits an image"),
            ("openmoji", SHORT, 144, "two icons an image"),
            ("coco", SHORT, 224, "photographs of COCO 2017"),
        )
        for needles, kind in (
            ((1,), "One needle"),
            (MULTI, "Two or three needles"),
        )
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.image_size
        features = {
            "id": tfds.features.Text(doc="Of the entry in a question file."),
            "images": tfds.features.Sequence(
                tfds.features.Image(shape=(side, side, 3)),
                doc="In the order in which they are shown.",
            ),
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(doc="yes or no"),
            "anchor": tfds.features.Text(doc="What only the needles show."),
            "target": tfds.features.Text(doc="What is asked for."),
            "needles": tfds.features.Sequence(
                np.int64, doc="Positions of the needles among the images."
            ),
        }
        if self.builder_config.source == "coco":
            features["paths"] = tfds.features.Sequence(
                tfds.features.Text(), doc="Of the images, below the root."
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            homepage="https://visual-haystacks.github.io",
            license="digits: CC BY 4.0; openmoji: CC BY-SA 4.0; coco: see "
            "https://cocodataset.org/#termsofuse",
            citation=CITATION,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        config = self.builder_config
        wanted = {
            split: (number, count)
            for number, split in enumerate(SPLITS)
            if (count := config.num_questions.get(split, 0))
        }
        root, published = None, {}
        if config.source == "coco":
            root = pathlib.Path(dl_manager.manual_dir)
            published = _published(root / "questions")
        exclude = {
            image
            for questions in published.values()
            for question in questions
            for image in question.pos_image + question.neg_image
        }
        sources: dict[str, Callable[[Any], PairSource | Coco]] = {
            "digits": lambda split: Digits(split, config.image_size),
            "openmoji": lambda split: OpenMoji(
                split, config.image_size, dl_manager.download_dir
            ),
            "coco": lambda split: Coco(root, split, exclude),
        }
        make = sources[config.source]
        splits = {}
        for split, (number, count) in wanted.items():
            haystacks = draw_haystacks(
                make(split),
                count,
                config.sizes,
                config.needles,
                seed=(config.seed, number),
            )
            numbered = ((str(index), h) for index, h in enumerate(haystacks))
            splits[split] = self._generate_examples(numbered, root)
        for split, questions in published.items():
            rng = np.random.default_rng(config.seed)
            drawn = [(q.id, q.haystack(rng)) for q in questions]
            splits[split] = self._generate_examples(drawn, root)
        return splits

    def _generate_examples(
        self,
        haystacks: Iterable[tuple[str, Haystack]],
        root: pathlib.Path | None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (name, haystack) in enumerate(haystacks):
            example: dict[str, Any] = {
                "id": name,
                "question": haystack.question,
                "answer": haystack.answer,
                "anchor": haystack.anchor,
                "target": haystack.target,
                "needles": haystack.needles,
            }
            images = haystack.images
            if root is None:
                example["images"] = [encoded(image, "PNG") for image in images]
            else:
                side = self.builder_config.image_size
                example["paths"] = images
                example["images"] = [
                    encoded(read_image(root, path, side), "JPEG")
                    for path in images
                ]
            yield index, example


def _published(folder: pathlib.Path) -> dict[str, tuple[Question, ...]]:
    """Question files below a folder, by the name of their split."""
    questions = {}
    for path in sorted(folder.rglob("*.json")):
        name = str(path.relative_to(folder).with_suffix(""))
        split = re.sub(r"\W", "_", name)
        if split in questions or split in (*SPLITS, tfds.Split.ALL):
            raise ValueError(
                "Question files are splits, and need names of their own. "
                f"Received: {path}, which would be split {split!r} again. "
                "Rename it."
            )
        questions[split] = read_questions(path)
    return questions


def encoded(image: np.ndarray, image_format: str) -> bytes:
    """Encodes a `uint8` array of shape `(height, width, 3)`."""
    # Here, since tensorflow_datasets needs TensorFlow to do it. Each format
    # ignores the other's option.
    file = io.BytesIO()
    Image.fromarray(image).save(
        file, image_format, quality=95, compress_level=1
    )
    return file.getvalue()


DESCRIPTION = f"""\
Visual haystacks: one or a few images among many show a thing, the anchor, and a
question asks whether they also show another, the target: "For the image with a
seven, is there an eight?" Half of the answers are yes. Needles are anywhere.

Images are handwritten digits (scikit-learn's, from UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0), icons or photographs of COCO 2017. Training,
validation and test splits share no drawing, no icon and no photograph. With
`coco`, question files of the benchmark are splits of their own, and those three
hold none of their images.

{ATTRIBUTION} The icons are rasterised, two on a grid; images made from them are
under the same licence.
"""
CITATION = """\
@inproceedings{wu2025visual,
  title={Visual Haystacks: A Vision-Centric Needle-In-A-Haystack Benchmark},
  author={Wu, Tsung-Han and Biamby, Giscard and Quenum, Jerome and
          Gupta, Ritwik and Gonzalez, Joseph E. and Darrell, Trevor and
          Chan, David M.},
  booktitle={International Conference on Learning Representations},
  year={2025},
}
"""
