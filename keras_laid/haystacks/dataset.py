"""Single-needle haystacks as batches for `fit`, `evaluate` and `predict`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np
from keras_hub.models import PaliGemmaCausalLMPreprocessor

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.backbones.text_length import training_length
from keras_laid.haystacks.questions import question
from keras_laid.haystacks.sampling import PairSource
from keras_laid.haystacks.sampling import check_pair_source
from keras_laid.haystacks.sampling import draw_pairs
from keras_laid.haystacks.sampling import draw_questions
from keras_laid.haystacks.sampling import rendered

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
        preprocessor: A `keras_hub.models.PaliGemmaCausalLMPreprocessor`. It
            tokenizes questions and answers; `scale` and `offset` of its image
            converter are applied to the images.
        num_questions: Integer, how many questions in all.
        sizes: Sequence of integers: how many images a haystack holds. Sizes are
            shared out evenly over the batches.
        batch_size: Integer, questions a batch; the last may be shorter.
        stretching: Optional `keras_laid.PositionStretching`. Adds
            `"positions"` to the inputs, drawn again in each epoch.
        seed: Integer.
        **kwargs: Passed to `keras.utils.PyDataset`: `workers`, etc.

    Attributes:
        batch_images: Integer array of shape `(batches,)`, images in the
            haystacks of each batch.
        epoch: Integer, how often `on_epoch_end` was called. Keras calls it once
            before the first epoch of a `fit`. `keras_laid.ResumableTraining`
            restores it.

    Each batch is a tuple `(x, y, sample_weight)` as PaliGemma's preprocessor
    makes it: `x` has `"images"` of shape `(batch, size, height, width, 3)`,
    `"token_ids"`, `"padding_mask"` and `"response_mask"` of shape
    `(batch, length)`, and `"needle"` of shape `(batch,)`, the needle's place
    from 0, which `keras_laid.find_retrieval_heads` reads; `y` holds the next
    tokens and `sample_weight` marks those of the answer. `length` is
    `preprocessor.sequence_length`, or that of the longest question with its
    answer where this is longer: no question is cut.

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
        preprocessor: PaliGemmaCausalLMPreprocessor,
        num_questions: int,
        sizes: Sequence[int],
        batch_size: int = 32,
        stretching: "PositionStretching | None" = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_integer("num_questions", num_questions)
        check_integer("batch_size", batch_size)
        sizes = check_integers("sizes", sizes)
        check_integer("seed", seed, at_least=0)
        check_pair_source(source)
        if not hasattr(preprocessor, "image_converter"):
            raise TypeError(
                "`preprocessor` must be a "
                "`keras_hub.models.PaliGemmaCausalLMPreprocessor`. "
                f"Received: {preprocessor!r:.80}. Pass `model.preprocessor`."
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
        self.epoch = 0
        converter = preprocessor.image_converter
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
        expected = (source.image_size, source.image_size)
        if converter.image_size not in (None, expected):
            raise ValueError(
                "The images must have the size that the preprocessor makes. "
                f"Received: source.image_size={source.image_size}, "
                f"image_converter.image_size={converter.image_size}. "
                "Pass `image_size` to the source."
            )

        rng = np.random.default_rng(seed)
        # A needle shows (anchor, other): the target or another thing.
        self.anchors, self.targets, others, self._palettes = draw_questions(
            len(source.names), num_questions, rng
        )
        says_yes = rng.permutation(num_questions) % 2 == 0
        self.beside = np.where(says_yes, self.targets, others[:, 0])
        count = len(self)
        self.batch_images = rng.permutation(
            np.resize(np.asarray(self.sizes), count)
        )
        # TensorFlow takes its input shapes from the first two batches: these
        # must differ where sizes do.
        differ = np.nonzero(self.batch_images != self.batch_images[0])[0]
        if len(differ):
            one, other = 1, differ[0]
            self.batch_images[[one, other]] = self.batch_images[[other, one]]
        self._tokenize()

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

    def _tokenize(self) -> None:
        """Tokenizes each different question once."""
        keys = np.stack([self.anchors, self.targets, self.beside], axis=1)
        unique, self._rows = np.unique(keys, axis=0, return_inverse=True)
        names = self.source.names
        size = self.source.image_size
        prompts, responses = zip(
            *(self.text(*(names[i] for i in key)) for key in unique),
            strict=True,
        )
        needed = training_length(self.preprocessor, prompts, responses)
        x, y, sample_weight = self.preprocessor(
            {
                "images": np.zeros((len(unique), size, size, 3), "uint8"),
                "prompts": list(prompts),
                "responses": list(responses),
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

    def __getitem__(
        self, index: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        start = index * self.batch_size
        which = np.arange(
            start, min(start + self.batch_size, self.num_questions)
        )
        size = self.batch_images[index]
        needles = rng.integers(size, size=len(which))
        images = self._images(which, size, needles, rng)
        rows = self._rows[which]
        x = {name: values[rows] for name, values in self._text.items()}
        x["images"] = images
        x["needle"] = needles.astype("int32")
        if self.stretching is not None:
            x["positions"] = self.stretching.positions(
                batch=len(which),
                images=size,
                text_length=x["token_ids"].shape[1],
                rng=np.random.default_rng((self.seed, index, self.epoch)),
            )
        return x, self._next[rows], self._weight[rows]

    def _images(
        self,
        which: np.ndarray,
        size: int,
        needles: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Images of shape `(batch, size, height, width, 3)`, scaled."""
        pairs = draw_pairs(
            self._palettes[which],
            self.anchors[which],
            self.beside[which, None],
            needles[:, None],
            size,
            rng,
        )
        images = rendered(self.source, pairs.reshape(-1, 2), rng)
        images = images.reshape(len(which), size, *images.shape[1:])
        return (images * self._scale + self._offset).astype("float32")

    def on_epoch_end(self) -> None:
        self.epoch += 1
