"""The dataset `text_haystacks` of `tensorflow_datasets`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras_hub
import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.haystacks.builder_config import check_counts
from keras_laid.haystacks.builder_config import dataset_name
from keras_laid.haystacks.builder_config import default_counts
from keras_laid.haystacks.builder_config import require_tfds
from keras_laid.haystacks.text_haystacks import draw_text_haystacks
from keras_laid.haystacks.text_tasks import SPLITS
from keras_laid.haystacks.text_tasks import TASKS

require_tfds()
import tensorflow_datasets as tfds  # noqa: E402

LENGTHS = (512, 1024, 2048, 4096)


@dataclasses.dataclass
class TextHaystackConfig(tfds.core.BuilderConfig):
    """The form of the haystacks of text of a dataset.

    Attributes:
        name: String, also the name of a folder. Where left out, it is made from
            all of the following.
        task: String, as in `keras_laid.haystacks.draw_text_haystacks`. Defaults
            to `"single_word"`.
        lengths: Tuple of integers, the length of a prompt in tokens. Defaults
            to `(512, 1024, 2048, 4096)`.
        preset: String, the preset of the `keras_hub.models.CausalLM` whose
            tokens are counted: a name or a folder. Defaults to `""`: words are
            counted.
        questions_per_text: Integer, how many questions in a row are about the
            same text. Defaults to `1`.
        num_questions: Dictionary from split to a number of questions. A split
            with none is left out.
        seed: Integer.

    Raises:
        ValueError: If a value is out of its range, if there are no questions,
            or if the name is that of no folder.
        TypeError: If a value is of another kind.
    """

    name: str = ""
    task: str = "single_word"
    lengths: tuple[int, ...] = LENGTHS
    preset: str = ""
    questions_per_text: int = 1
    num_questions: dict[str, int] = dataclasses.field(
        default_factory=default_counts
    )
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        self.lengths = check_integers("lengths", self.lengths)
        check_integer("questions_per_text", self.questions_per_text)
        check_integer("seed", self.seed, at_least=0)
        check_counts(self.num_questions)
        key = (self.task, self.lengths, self.preset, self.questions_per_text)
        self.name = dataset_name(
            self.name, self.task, key, self.num_questions, self.seed
        )


class TextHaystacks(tfds.core.GeneratorBasedBuilder):
    """Facts hidden in a long text, and questions about them.

    Lengths are in words, or in the tokens of a model of yours:
    `tfds.load("text_haystacks", builder_kwargs={"config":
    TextHaystackConfig(preset="my_preset")})`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        TextHaystackConfig(name=task, task=task, description=f"Task {task}.")
        for task in TASKS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text, tfds.features.Sequence
        features = {
            "documents": texts(text(), doc="Paragraphs, first to last."),
            "question": text(doc="It ends where the answer begins."),
            "answer": text(),
            "options": texts(text(), doc="Empty for answers in free words."),
            "anchor": text(doc="What is asked about."),
            "needles": texts(np.int64, doc="Paragraphs with the facts."),
            "depths": texts(np.float64, doc="Where each begins, 0 to 1."),
            "length": tfds.features.Scalar(np.int64, doc="Of the prompt."),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Facts among short paragraphs about everyday life, as "
            "in RULER, NoLiMa and the pass-key task; see "
            "`keras_laid.haystacks.draw_text_haystacks`. Splits share no city, "
            "word, name, number or meaning.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://arxiv.org/abs/2404.06654",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        counts = self.builder_config.num_questions
        return {
            split: self._generate_examples(split, number, counts[split])
            for number, split in enumerate(SPLITS)
            if counts.get(split)
        }

    def _generate_examples(
        self, split: Any, number: int, count: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        model = None
        if config.preset:
            model = keras_hub.models.CausalLM.from_preset(config.preset)
        haystacks = draw_text_haystacks(
            model,
            count,
            config.lengths,
            config.task,
            split,
            config.questions_per_text,
            seed=(config.seed, number),
        )
        for index, haystack in enumerate(haystacks):
            yield (
                index,
                {
                    "documents": haystack.images,
                    "question": haystack.question,
                    "answer": haystack.answer,
                    "options": haystack.options or (),
                    "anchor": haystack.anchor,
                    "needles": haystack.needles,
                    "depths": haystack.depths,
                    "length": haystack.length,
                },
            )
