"""Evaluates on haystacks while a model is trained."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sized
from typing import Any

import keras
from tqdm import tqdm

from keras_laid.arguments import check_integer
from keras_laid.haystacks.asking import Asking
from keras_laid.haystacks.asking import check_asking
from keras_laid.haystacks.asking import check_iterable
from keras_laid.haystacks.effective_window import effective_window
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.results import HaystackResults


class HaystackEvaluation(keras.callbacks.Callback):
    """Measures accuracy and the effective window every few epochs.

    After an evaluated epoch, `logs` has `haystack_accuracy_{size}` for each
    size and `effective_window` in images, by its rule `"relative"`; 0 while the
    model only guesses at the smallest size. Callbacks that come later in the
    list, such as `CSVLogger`, `ModelCheckpoint` and `EarlyStopping`, see them.
    The first epoch is evaluated whatever `every` is, so that `CSVLogger` has
    the columns.

    Example:

    ```python
    haystacks = list(draw_haystacks(Digits("validation"), 256, (1, 10, 50)))
    evaluation = keras_laid.HaystackEvaluation(haystacks, every=2)
    stopping = keras.callbacks.EarlyStopping("effective_window", mode="max")
    distiller.fit(data, epochs=20, callbacks=[evaluation, stopping])
    ```

    Args:
        haystacks: List or other iterable of `keras_laid.haystacks.Haystack`
            that can be read again and again, or a function that returns one.
        every: Integer, an evaluation comes after epochs `1`, `1 + every`, ...
            Defaults to `1`.
        model: The model to evaluate. Defaults to `student` of the model that is
            trained, as distillers have, or to that model itself.
        tokens_per_batch: As in `keras_laid.evaluate_haystacks`.
        verbose: Boolean, whether to print a line. Defaults to `True`.
        **arguments: `through`, `rule`, `prompt`, `shown`, `max_answer_tokens`
            and `root`
            of `keras_laid.evaluate_haystacks`.

    Attributes:
        results: The last `keras_laid.haystacks.HaystackResults`, or `None`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If `haystacks` is empty or can be read only once, or if
            `every` or another argument is none of those above. As
            `evaluate_haystacks` about the model, when training begins.
    """

    def __init__(
        self,
        haystacks: Iterable[Haystack] | Callable[[], Iterable[Haystack]],
        every: int = 1,
        model: keras.Model | None = None,
        tokens_per_batch: int = 8192,
        verbose: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if not callable(haystacks):
            check_iterable(haystacks)
            if iter(haystacks) is haystacks:
                raise ValueError(
                    "`haystacks` must be readable in every epoch. Received: "
                    f"{haystacks!r:.80}, which can be read once. Pass a list, "
                    "`list(haystacks)`, or a function that makes them."
                )
        check_integer("every", every)
        if isinstance(haystacks, Sized) and not len(haystacks):
            raise ValueError(
                "`haystacks` must hold at least one. Received: "
                f"haystacks={haystacks!r:.80}"
            )
        check_integer("tokens_per_batch", tokens_per_batch)
        check_asking(**arguments)
        self.haystacks = haystacks
        self.every = every
        self.evaluated = model
        self.tokens_per_batch = tokens_per_batch
        self.verbose = verbose
        self.arguments = arguments
        self.results: HaystackResults | None = None
        self._asking: Asking | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        model = self.evaluated
        if model is None:
            model = getattr(self.model, "student", self.model)
        # Once, so that nothing is compiled again in later epochs.
        self._asking = Asking(model, **self.arguments)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, float] | None = None
    ) -> None:
        if epoch % self.every:
            return
        haystacks = self.haystacks
        self.results = self._asking.evaluate(
            haystacks() if callable(haystacks) else haystacks,
            self.tokens_per_batch,
            output=None,
            verbose=False,
        )
        accuracy = self.results.accuracy
        window = 0.0
        chance = self.results.chance
        if accuracy[min(accuracy)] > chance:
            window = effective_window(accuracy, chance=chance).window
        if self.verbose:
            numbers = ", ".join(f"{n}: {a:.3f}" for n, a in accuracy.items())
            tqdm.write(
                f"Epoch {epoch + 1}: haystack accuracy by images {{{numbers}}}"
                f", effective window {window:.1f} images"
            )
        if logs is not None:
            for size, value in accuracy.items():
                logs[f"haystack_accuracy_{size}"] = value
            logs["effective_window"] = window
