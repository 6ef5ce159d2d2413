"""Long prompts made of a user's short examples, as batches for `fit`."""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.backbones.prompt_form_base import LENGTH_STEP
from keras_laid.backbones.prompt_form_base import Batch
from keras_laid.backbones.prompt_forms import prompt_form
from keras_laid.backbones.prompt_forms import sizes_read
from keras_laid.backbones.teacher_inputs import aligned_tokens
from keras_laid.haystacks.example_haystacks import ImageLoader
from keras_laid.haystacks.example_haystacks import check_image_size
from keras_laid.haystacks.example_haystacks import check_room
from keras_laid.haystacks.example_haystacks import draw_images
from keras_laid.haystacks.examples import as_examples
from keras_laid.haystacks.sampling import sizes_of_batches

if TYPE_CHECKING:
    from keras_laid.distillation.position_stretching import PositionStretching


class LongPrompts(keras.utils.PyDataset):
    """One example's images among those of other examples, in each prompt.

    The prompt and the response are those of one example, whose images stand
    together at a random place; the others come from other examples. A teacher
    that finds them teaches the student where to look, with or without
    responses: where an example has none, the teacher's next token is matched.

    Prompts are made by the model's own preprocessor: PaliGemma's images stand
    before the text, those of Gemma 3, Gemma 4 and Qwen 3.5 at placeholders. For
    a decoder of text the images of examples are documents, and each is a
    segment.

    Batch `i` depends only on `seed` and `i`, so that prompts are the same in
    every epoch, on every backend and after a restart; positions depend on the
    attribute `epoch` too. All prompts of a batch have one size. Up to 2 GiB of
    images are kept in memory, so that their files are decoded only once.

    Args:
        examples: Iterable of `keras_laid.haystacks.Example`s, of tuples
            `(image or images, prompt, response)` whose response may be left
            out, or of dictionaries with `"images"` (or `"image"`), `"prompt"`
            and maybe `"response"`, such as `tfds.as_numpy` gives;
            `keras_laid.haystacks.read_examples` reads a table.
        preprocessor: The model's preprocessor, of PaliGemma, Gemma 3, Gemma 4,
            Qwen 3.5 or any decoder of text in KerasHub.
        sizes: Sequence of integers: how many images, or documents, a prompt
            holds. Sizes are shared out evenly over the batches.
        num_prompts: Optional integer, how many prompts in all. Defaults to
            `None`: one for each example.
        batch_size: Integer, prompts a batch; the last may be shorter. Defaults
            to `32`.
        stretching: Optional `keras_laid.PositionStretching`. Adds
            `"positions"` to the inputs, drawn again in each epoch. Defaults to
            `None`.
        image_size: Optional tuple of two integers, height and width in pixels
            that all images are made to have. Defaults to `None`: the size that
            the preprocessor makes, which must make one; for Qwen 3.5, the
            smallest square that its preprocessor does not enlarge.
        max_length: Optional integer, the most tokens of text that a prompt may
            have, with placeholders of images. Defaults to `None`, no bound.
        teacher_images: Optional integer: the teacher reads prompts of its own,
            with so many of the same images, the example's among them. 1 shows
            it the needle without a haystack, which helps where the teacher
            itself is weak at long prompts. Only next tokens can be compared
            then. Defaults to `None`: the teacher reads the student's prompts.
        seed: Integer. Defaults to `0`.
        **kwargs: Passed to `keras.utils.PyDataset`: `workers`, etc.

    Attributes:
        batch_images: Integer array of shape `(batches,)`, images in the
            prompts of each batch.
        epoch: Integer, how often `on_epoch_end` was called.
            `keras_laid.ResumableTraining` restores it.
        responses: Dictionary from the number of a prompt to a string, which
            takes the place of its example's response. Empty at first;
            `keras_laid.haystacks.StudentResponses` fills it.

    Each batch is a tuple `(x, y, sample_weight)` as the preprocessor makes it.
    `x` also has `"needle"`, of shape `(batch,)`: the place of the example's
    first image, from 0, which `keras_laid.find_retrieval_heads` reads. For Qwen
    3.5, `x` has the M-RoPE positions of its preprocessor as `"positions"`, of
    shape `(batch, 4, length)`, and each input has an axis of prompts first.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an example is refused, whose number is named; if a size
            is smaller than an example or larger than all examples together; if
            a prompt is longer than `max_length`; or if documents are stretched.

    Example:

    ```python
    examples = keras_laid.haystacks.read_examples("photos/questions.csv")
    data = keras_laid.LongPrompts(
        examples, student.preprocessor, sizes=(1, 2, 5, 10)
    )
    distiller.fit(data, epochs=10)
    ```
    """

    def __init__(
        self,
        examples: Iterable[Any],
        preprocessor: keras.layers.Layer,
        sizes: Sequence[int],
        num_prompts: int | None = None,
        batch_size: int = 32,
        stretching: "PositionStretching | None" = None,
        image_size: tuple[int, int] | None = None,
        max_length: int | None = None,
        teacher_images: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size is not None:
            image_size = check_image_size(image_size)
        self.form = prompt_form(preprocessor, image_size)
        self.sizes = check_integers("sizes", sizes)
        self.examples = as_examples(examples)
        if num_prompts is None:
            num_prompts = len(self.examples)
        check_integer("num_prompts", num_prompts)
        check_integer("batch_size", batch_size)
        if max_length is not None:
            check_integer("max_length", max_length)
        if teacher_images is not None:
            check_integer("teacher_images", teacher_images)
            self.check_teacher_images(teacher_images)
        check_integer("seed", seed, at_least=0)
        if stretching is not None:
            self.check_stretching(stretching)
        self.teacher_images = teacher_images
        check_room(self.examples, self.sizes)
        if self.form.takes_images:
            self.load = ImageLoader(image_size or self.form.image_size)
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.stretching = stretching
        self.max_length = max_length
        self.seed = seed
        self.epoch = 0
        self.responses: dict[int, str] = {}

        rng = np.random.default_rng(seed)
        rounds = -(-num_prompts // len(self.examples))
        order = [rng.permutation(len(self.examples)) for _ in range(rounds)]
        self.order = np.concatenate(order)[:num_prompts]
        self.batch_images = sizes_of_batches(self.sizes, len(self), rng)
        self.lengths = self.find_lengths()

    def check_stretching(self, stretching: Any) -> None:
        if not hasattr(stretching, "positions_in_text"):
            raise TypeError(
                "`stretching` must be a `keras_laid.PositionStretching` or "
                f"`None`. Received: {stretching!r:.80}"
            )
        if not self.form.takes_images:
            raise ValueError(
                "Only prompts with images can be stretched. Received: "
                "stretching for a preprocessor of text. Leave it out."
            )

    def check_teacher_images(self, teacher_images: int) -> None:
        """Refuses a number that is smaller than that of an example."""
        counts = [len(example.images) for example in self.examples]
        row = int(np.argmax(counts))
        if teacher_images < counts[row]:
            raise ValueError(
                "`teacher_images` must have room for the images of each "
                f"example. Received: teacher_images={teacher_images}, and "
                f"example {row} with {counts[row]} images"
            )

    def find_lengths(self) -> dict[int, int]:
        """Tokens that prompts of each size have room for, however drawn."""
        texts = [
            example.prompt + (example.response or "")
            for example in self.examples
        ]
        longest = max(self.form.count_tokens(texts))
        counts = []
        if not self.form.takes_images:
            documents = [str(d) for each in self.examples for d in each.images]
            counts = sorted(self.form.count_tokens(documents))
        return {
            size: self.form.length(longest + sum(counts[-size:]), size)
            for size in sizes_read(self.sizes, self.teacher_images)
        }

    def make_room(self, tokens: int) -> None:
        """Makes all prompts long enough for responses of so many tokens."""
        room = -(-tokens // LENGTH_STEP) * LENGTH_STEP
        self.lengths = {
            size: length + room for size, length in self.find_lengths().items()
        }

    def __len__(self) -> int:
        return -(-self.num_prompts // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        size = int(self.batch_images[index])
        images, places = self.drawn(index)
        numbers = self.numbers(index)
        x, y, sample_weight = self.batch_of(numbers, images, places)
        if self.stretching is not None:
            rng = np.random.default_rng((self.seed, index, self.epoch))
            x["positions"] = self.form.stretched(self.stretching, x, size, rng)
        return x, y, sample_weight

    def numbers(self, index: int) -> np.ndarray:
        """The numbers of the prompts in a batch."""
        end = min((index + 1) * self.batch_size, self.num_prompts)
        return np.arange(index * self.batch_size, end)

    def drawn(self, index: int) -> tuple[list[list[Any]], list[int]]:
        """The images of each prompt in a batch, and where its own are."""
        rng = np.random.default_rng((self.seed, index))
        size = int(self.batch_images[index])
        drawn = [
            draw_images(self.examples, int(row), size, rng)
            for row in self.order[self.numbers(index)]
        ]
        return [images for images, _ in drawn], [place for _, place in drawn]

    def batch_of(
        self, numbers: np.ndarray, images: list[list[Any]], places: list[int]
    ) -> Batch:
        """Prompts of these numbers, all of one length."""
        x, y, sample_weight = self.encode(images, numbers)
        x["needle"] = np.array(places, "int32")
        if self.teacher_images is not None:
            shown = min(self.teacher_images, len(images[0]))
            fewer = [
                around(*each, shown)
                for each in zip(images, places, strict=True)
            ]
            own, _, marked = self.encode(fewer, numbers)
            own["aligned"] = aligned_tokens(sample_weight, marked)
            x["teacher"] = own
        return x, y, sample_weight

    def encode(self, images: list[list[Any]], numbers: np.ndarray) -> Batch:
        """Prompts of these numbers, with these images or documents."""
        length = self.lengths[len(images[0])]
        rows = self.order[numbers]
        examples = [self.examples[row] for row in rows]
        shown: Any = images
        if self.form.takes_images:
            shown = self.load(images)
        batch = self.form.encode_whole(
            shown,
            [example.prompt for example in examples],
            [
                self.responses.get(int(number), example.response)
                for number, example in zip(numbers, examples, strict=True)
            ],
            length,
        )
        self.check_length(batch[0]["padding_mask"], rows)
        return batch

    def check_length(self, present: np.ndarray, rows: np.ndarray) -> None:
        lengths = present.sum(axis=1)
        if self.max_length is not None and lengths.max() > self.max_length:
            row = int(rows[int(np.argmax(lengths))])
            raise ValueError(
                "A prompt must have at most `max_length` tokens. Received: "
                f"max_length={self.max_length}, and example {row} with "
                f"{int(lengths.max())} tokens. Take smaller `sizes`."
            )

    def on_epoch_end(self) -> None:
        self.epoch += 1


def around(images: list[Any], place: int, count: int) -> list[Any]:
    """The `count` images from `place` on, or the last ones."""
    start = min(place, len(images) - count)
    return images[start : start + count]
