"""Single-needle haystacks as batches for `fit`, `evaluate` and `predict`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np
from keras_hub.models import PaliGemmaCausalLMPreprocessor

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.backbones.prompt_form_base import Batch
from keras_laid.backbones.prompt_forms import prompt_form
from keras_laid.backbones.prompt_forms import sizes_read
from keras_laid.backbones.teacher_inputs import aligned_tokens
from keras_laid.backbones.text_length import training_length
from keras_laid.haystacks.questions import question
from keras_laid.haystacks.sampling import PairSource
from keras_laid.haystacks.sampling import check_pair_source
from keras_laid.haystacks.sampling import draw_pairs
from keras_laid.haystacks.sampling import draw_questions
from keras_laid.haystacks.sampling import rendered
from keras_laid.haystacks.sampling import sizes_of_batches

if TYPE_CHECKING:
    from keras_laid.distillation.position_stretching import PositionStretching


class Haystacks(keras.utils.PyDataset):
    """Haystacks of images with one needle and one question each.

    Exactly one image of a haystack, the needle, shows the *anchor*. The
    question is "For the image with [anchor], is there a [target]?", and half of
    the needles show the target. Other images may show the target, never the
    anchor: a model must find the needle to answer.

    Batch `i` depends only on `seed` and `i`, so that questions and images are
    the same in every epoch, on every backend and after a restart; positions
    depend on the attribute `epoch` too. All haystacks of a batch have one size.

    Workers, threads or processes, change no batch where they read for
    `keras_laid.DistanceWeightedAttentionDistillation` or
    `keras_laid.MultiImagePaliGemmaCausalLM`. Another Keras model must be built
    before its `fit`, on JAX and PyTorch: what workers read while Keras builds
    it comes again in the first epoch. With `steps_per_epoch`, TensorFlow and
    GPUs may read positions ahead that are of the epoch before.

    Args:
        source: Where images come from, such as `keras_laid.haystacks.Digits`:
            has `names` and `render(pairs, rng)`, which must depend only on
            its arguments.
        preprocessor: The model's preprocessor, with an image converter: a
            `keras_hub.models.PaliGemmaCausalLMPreprocessor`,
            `keras_hub.models.Gemma3CausalLMPreprocessor`,
            `keras_hub.models.Gemma4CausalLMPreprocessor` or
            `keras_hub.models.Qwen3_5CausalLMPreprocessor`.
        num_questions: Integer, the number of questions in all.
        sizes: Sequence of integers: how many images a haystack holds. Sizes are
            shared out evenly over the batches.
        batch_size: Integer, the number of questions in a batch; the last batch
            may be shorter. Defaults to `32`.
        stretching: Optional `keras_laid.PositionStretching`. Adds
            `"positions"` to the inputs, drawn again in each epoch. Defaults to
            `None`.
        seed: Integer. Defaults to `0`.
        teacher_images: Optional integer: the teacher reads haystacks of its
            own, with so many of the same images, the needle among them. 1 shows
            it only the needle, which helps where the teacher itself is weak at
            long prompts. Only next tokens can be compared then. Defaults to
            `None`: the teacher reads the student's haystacks.
        **kwargs: Passed to `keras.utils.PyDataset`: `workers`, etc.

    Attributes:
        batch_images: Integer array of shape `(batches,)`, images in the
            haystacks of each batch.
        epoch: Integer, how often `on_epoch_end` was called. Keras calls it once
            before the first epoch of a `fit`. `keras_laid.ResumableTraining`
            restores it.

    Each batch is a tuple `(x, y, sample_weight)` as the preprocessor makes it.
    For PaliGemma, `x` has `"images"` of shape `(batch, size, height, width,
    3)`, and `"token_ids"`, `"padding_mask"` and `"response_mask"` of shape
    `(batch, length)`; `length` is `preprocessor.sequence_length`, or that of
    the longest question with its answer where this is longer: no question is
    cut. For every family it also has `"needle"` of shape `(batch,)`, the
    needle's place from 0, which `keras_laid.find_retrieval_heads` reads. `y`
    holds the next tokens and `sample_weight` marks those of the answer.

    Raises:
        ValueError: If a number or a size is not positive, if the source has
            fewer than three names or two that are the same, or if the images'
            size is not the one that the preprocessor makes, or would not be
            finite; when a batch is made, if the source renders other images
            than `uint8`, which hold no NaN.
        TypeError: If an argument is of another kind.
    """

    def __init__(
        self,
        source: PairSource,
        preprocessor: keras.layers.Layer,
        num_questions: int,
        sizes: Sequence[int],
        batch_size: int = 32,
        stretching: "PositionStretching | None" = None,
        seed: int = 0,
        teacher_images: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_integer("num_questions", num_questions)
        if teacher_images is not None:
            check_integer("teacher_images", teacher_images)
        check_integer("batch_size", batch_size)
        sizes = check_integers("sizes", sizes)
        check_integer("seed", seed, at_least=0)
        check_pair_source(source)
        if not getattr(preprocessor, "image_converter", None):
            raise TypeError(
                "`preprocessor` must be one of KerasHub with an image "
                f"converter. Received: {preprocessor!r:.80}. Pass "
                "`model.preprocessor`."
            )
        if stretching is not None and not hasattr(stretching, "positions"):
            raise TypeError(
                "`stretching` must be a `keras_laid.PositionStretching` or "
                f"`None`. Received: {stretching!r:.80}"
            )
        self.source = source
        self.preprocessor = preprocessor
        self.num_questions = num_questions
        self.sizes = sizes
        self.batch_size = batch_size
        self.stretching = stretching
        self.seed = seed
        self.teacher_images = teacher_images
        self.epoch = 0
        # PaliGemma's text is apart from its images, and tokenized once.
        self.form = None
        if isinstance(preprocessor, PaliGemmaCausalLMPreprocessor):
            size = preprocessor.image_converter.image_size
            self._check_scale(preprocessor.image_converter)
        else:
            side = source.image_size
            self.form = prompt_form(preprocessor, (side, side))
            size = self.form.image_size
        if size not in (None, (source.image_size, source.image_size)):
            raise ValueError(
                "The images must have the size that the preprocessor makes. "
                f"Received: source.image_size={source.image_size}, where the "
                f"preprocessor makes {size}. Pass `image_size` to the source."
            )

        rng = np.random.default_rng(seed)
        # A needle shows (anchor, other): the target or another thing.
        self.anchors, self.targets, others, self._palettes = draw_questions(
            len(source.names), num_questions, rng
        )
        says_yes = rng.permutation(num_questions) % 2 == 0
        self.beside = np.where(says_yes, self.targets, others[:, 0])
        self.batch_images = sizes_of_batches(self.sizes, len(self), rng)
        self._write_texts()

    def _check_scale(self, converter: keras.layers.Layer) -> None:
        self._scale = 1.0 if converter.scale is None else converter.scale
        self._offset = 0.0 if converter.offset is None else converter.offset
        if not (
            np.isfinite(self._scale).all() and np.isfinite(self._offset).all()
        ):
            raise ValueError(
                "`scale` and `offset` of the preprocessor's image converter "
                f"must be finite. Received: scale={converter.scale}, "
                f"offset={converter.offset}"
            )

    def text(self, anchor: str, target: str, beside: str) -> tuple[str, str]:
        """The prompt and the response for a needle that shows two things.

        Args:
            anchor: String, a name; the needle shows it.
            target: String, the name asked for.
            beside: String, the name of the other thing that the needle shows.

        Returns:
            A tuple of two strings.
        """
        return question(anchor, target), "yes" if target == beside else "no"

    def _write_texts(self) -> None:
        """Writes each different question once; tokenizes it if it is apart."""
        keys = np.stack([self.anchors, self.targets, self.beside], axis=1)
        unique, self._rows = np.unique(keys, axis=0, return_inverse=True)
        names = self.source.names
        self._prompts, self._responses = zip(
            *(self.text(*(names[i] for i in key)) for key in unique),
            strict=True,
        )
        if self.form is None:
            self._tokenize()
            return
        texts = [
            prompt + response
            for prompt, response in zip(
                self._prompts, self._responses, strict=True
            )
        ]
        longest = max(self.form.count_tokens(texts))
        self._lengths = {
            size: self.form.length(longest, size)
            for size in sizes_read(self.sizes, self.teacher_images)
        }

    def _tokenize(self) -> None:
        """Tokenizes PaliGemma's questions."""
        count = len(self._prompts)
        size = self.source.image_size
        needed = training_length(
            self.preprocessor, self._prompts, self._responses
        )
        x, y, sample_weight = self.preprocessor(
            {
                "images": np.zeros((count, size, size, 3), "uint8"),
                "prompts": list(self._prompts),
                "responses": list(self._responses),
            },
            sequence_length=max(self.preprocessor.sequence_length, needed),
        )
        self._text = {
            name: np.asarray(keras.ops.convert_to_numpy(x[name]), "int32")
            for name in ("token_ids", "padding_mask", "response_mask")
        }
        self._next = np.asarray(keras.ops.convert_to_numpy(y), "int32")
        self._weight = np.asarray(
            keras.ops.convert_to_numpy(sample_weight), "float32"
        )

    def __len__(self) -> int:
        return -(-self.num_questions // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, index))
        start = index * self.batch_size
        which = np.arange(
            start, min(start + self.batch_size, self.num_questions)
        )
        size = self.batch_images[index]
        needles = rng.integers(size, size=len(which))
        images = self._images(which, size, needles, rng)
        rows = self._rows[which]
        x, y, sample_weight = self._batch_of(rows, images)
        x["needle"] = needles.astype("int32")
        if self.teacher_images is not None:
            fewer = around(images, needles, min(self.teacher_images, size))
            own, _, marked = self._batch_of(rows, fewer)
            own["aligned"] = aligned_tokens(sample_weight, marked)
            x["teacher"] = own
        if self.stretching is not None:
            rng = np.random.default_rng((self.seed, index, self.epoch))
            x["positions"] = self._positions(self.stretching, x, size, rng)
        return x, y, sample_weight

    def _batch_of(self, rows: np.ndarray, images: np.ndarray) -> Batch:
        """Questions of the numbers `rows`, with their images."""
        if self.form is not None:
            return self.form.encode_whole(
                images,
                [self._prompts[row] for row in rows],
                [self._responses[row] for row in rows],
                self._lengths[images.shape[1]],
            )
        x = {name: values[rows] for name, values in self._text.items()}
        scaled = images * self._scale + self._offset
        x["images"] = scaled.astype("float32")
        return x, self._next[rows], self._weight[rows]

    def _positions(
        self,
        stretching: "PositionStretching",
        x: dict[str, np.ndarray],
        size: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        if self.form is not None:
            return self.form.stretched(stretching, x, size, rng)
        batch, text_length = x["token_ids"].shape
        return stretching.positions(batch, size, text_length, rng)

    def _images(
        self,
        which: np.ndarray,
        size: int,
        needles: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """`uint8` images of shape `(batch, size, height, width, 3)`."""
        pairs = draw_pairs(
            self._palettes[which],
            self.anchors[which],
            self.beside[which, None],
            needles[:, None],
            size,
            rng,
        )
        images = rendered(self.source, pairs.reshape(-1, 2), rng)
        return images.reshape(len(which), size, *images.shape[1:])

    def on_epoch_end(self) -> None:
        self.epoch += 1


def around(images: np.ndarray, needles: np.ndarray, count: int) -> np.ndarray:
    """In each row, `count` images from the needle on, or the last ones."""
    start = np.minimum(needles, images.shape[1] - count)
    index = start[:, None] + np.arange(count)
    return images[np.arange(len(images))[:, None], index]
