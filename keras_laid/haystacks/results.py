"""Results of an evaluation: accuracy by size and needle position."""

import csv
import dataclasses
import json
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.arguments import check_seed
from keras_laid.haystacks.answer_log import made_folder
from keras_laid.typing import PathLike

RESAMPLES = 2000


class PositionRange(NamedTuple):
    """Accuracy where needles are in one part of the haystack.

    Attributes:
        low: Float, where the part begins, `0` being the first image, or the
            start of the prompt.
        high: Float, where it ends, `1` being the end of the last image, or of
            the prompt.
        accuracy: Float, 0 to 1, or `None` where no question was asked.
        questions: Integer, how many were asked.
    """

    low: float
    high: float
    accuracy: float | None
    questions: int


@dataclasses.dataclass(frozen=True)
class HaystackResults:
    """The result of `keras_laid.evaluate_haystacks`.

    Attributes:
        records: Tuple of dictionaries, one a question: `index`, `size`,
            `needles`, `depths`, `question`, `expected`, `options`, `images` (a
            checksum), `answer`, `right` and `complied`.
        settings: Dictionary of how the questions were asked.
    """

    @property
    def unit(self) -> str:
        """What sizes count: `"images"`, or `"tokens"` of whole prompts."""
        kinds = {record["depths"] is None for record in self.records}
        if len(kinds) > 1:
            raise ValueError(
                "Haystacks of images and of text must be evaluated apart, "
                "since the sizes of the one are images and those of the other "
                "tokens. Received: both."
            )
        return "images" if kinds.pop() else "tokens"

    records: tuple[dict[str, Any], ...]
    settings: dict[str, Any]

    @property
    def accuracy(self) -> dict[int, float]:
        """From size to the share of right answers, 0 to 1."""
        return self._mean("right")

    @property
    def chance(self) -> float:
        """The accuracy of guessing among the options of each question.

        It is 0 for questions without options.
        """
        options = [record["options"] for record in self.records]
        return sum(1 / len(each) if each else 0.0 for each in options) / len(
            options
        )

    @property
    def questions(self) -> dict[int, int]:
        """From size to how many questions were asked."""
        return {size: len(records) for size, records in self._by_size().items()}

    @property
    def compliance(self) -> dict[int, float] | None:
        """From size to the share of answers that were an option at all.

        `None` where nothing else could be said or was looked for: with
        `through="choice"`, by rules that know no options, and for questions
        without options.
        """
        if any(record["complied"] is None for record in self.records):
            return None
        return self._mean("complied")

    def intervals(
        self,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> dict[int, tuple[float, float]]:
        """How sure each accuracy is, given how many questions were asked.

        The percentile bootstrap: questions of a size are drawn with
        replacement, as many as were asked. An accuracy of exactly 0 or 1 does
        not vary, so that its interval is too narrow where questions are few.

        Args:
            confidence: Float in `(0, 1)`. Defaults to `0.95`.
            resamples: Integer. Defaults to `2000`.
            seed: Integer. Defaults to `0`.

        Returns:
            A dictionary from size to a tuple `(low, high)`.

        Raises:
            ValueError: If `confidence` or `resamples` is out of its range.
        """
        check_number("confidence", confidence, "(0, 1)")
        check_integer("resamples", resamples)
        check_seed(seed)
        rng = np.random.default_rng(seed)
        tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        intervals = {}
        accuracy = self.accuracy
        for size, count in self.questions.items():
            # Of answers that are right or wrong, only their number counts.
            right = rng.binomial(count, accuracy[size], resamples)
            low, high = np.quantile(right / count, tails).tolist()
            intervals[size] = (low, high)
        return intervals

    def by_position(
        self, bins: int = 5
    ) -> dict[int, tuple[PositionRange, ...]]:
        """Accuracy by size and by where the needle was.

        Haystacks are cut into equal parts, `bins` of them or as many as there
        are images. A question with several needles counts once for each. In
        text, a needle is where it begins.

        Args:
            bins: Integer, at least 1. Defaults to `5`.

        Returns:
            A dictionary from size to a tuple of `PositionRange`s, first to
            last.

        Raises:
            ValueError: If `bins` is not positive.
        """
        check_integer("bins", bins)
        ranges = {}
        for size, records in self._by_size().items():
            parts = min(bins, size)
            right = np.zeros(parts, int)
            asked = np.zeros(parts, int)
            for record in records:
                for part in parts_of(record, parts):
                    asked[part] += 1
                    right[part] += record["right"]
            ranges[size] = tuple(
                PositionRange(
                    low=part / parts,
                    high=(part + 1) / parts,
                    accuracy=right[part] / n if n else None,
                    questions=n,
                )
                for part, n in enumerate(asked.tolist())
            )
        return ranges

    def save(self, folder: PathLike) -> None:
        """Writes tables and plots.

        Args:
            folder: Where to write `results.csv`, with a row for each size;
                `results.json`, with positions, settings and versions too;
                `accuracy.png` and `positions.png`.
        """
        # Here, since matplotlib takes a second to import.
        from keras_laid.haystacks import plots

        folder = made_folder(folder)
        rows = self._rows()
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (folder / "results.json").write_text(
            json.dumps(
                {
                    "unit": self.unit,
                    "sizes": rows,
                    "positions": {
                        size: [part._asdict() for part in parts]
                        for size, parts in self.by_position().items()
                    },
                    "settings": self.settings,
                    "versions": {
                        "keras": keras.__version__,
                        "backend": keras.backend.backend(),
                    },
                },
                indent=2,
            )
            + "\n"
        )
        plots.plot_accuracy(
            folder / "accuracy.png",
            {"": self.accuracy},
            intervals={"": self.intervals()},
            chance=self.chance,
            unit=self.unit,
        )
        plots.plot_positions(folder / "positions.png", self)

    def _rows(self) -> list[dict[str, Any]]:
        """A dictionary for each size, for CSV and JSON."""
        accuracy, compliance = self.accuracy, self.compliance
        intervals = self.intervals()
        return [
            {
                "size": size,
                "questions": count,
                "accuracy": accuracy[size],
                "low": intervals[size][0],
                "high": intervals[size][1],
                "compliance": compliance and compliance[size],
            }
            for size, count in self.questions.items()
        ]

    def _by_size(self) -> dict[int, list[dict[str, Any]]]:
        """Records of each size, smallest first."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for record in sorted(self.records, key=lambda r: r["size"]):
            groups.setdefault(record["size"], []).append(record)
        return groups

    def _mean(self, name: str) -> dict[int, float]:
        return {
            size: sum(record[name] for record in records) / len(records)
            for size, records in self._by_size().items()
        }


def parts_of(record: dict[str, Any], parts: int) -> list[int]:
    """In which of so many equal parts of the haystack each needle is."""
    if record["depths"] is not None:
        return [min(int(d * parts), parts - 1) for d in record["depths"]]
    # The middle of image 0 of 10 is at 0.05.
    return [
        (2 * needle + 1) * parts // (2 * record["size"])
        for needle in record["needles"]
    ]
