"""On-policy distillation: a student learns on its own answers."""

from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_kind
from keras_laid.arguments import check_number
from keras_laid.backbones.model_prompts import ModelPrompts
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks.long_prompts import LongPrompts


class StudentResponses(keras.callbacks.Callback):
    """Makes the student's own answers the responses of training prompts.

    Before an epoch the student answers prompts greedily, and the teacher's next
    tokens along these answers become the targets. So the student learns what to
    do where it goes itself, not only along the answers of others. Reverse
    divergences (`NextTokens(beta=1.0)`) are usual with it.

    The labels are then the student's own tokens, so that the supervised term
    must have weight 0.

    Args:
        data: The `keras_laid.LongPrompts` that the student is trained on.
        share: Float in `(0, 1]`, the share of prompts that get the student's
            answers; the others keep their own responses. Which ones is drawn
            again each time. Defaults to `1.0`.
        every: Integer: the student answers before epochs `0`, `every`,
            `2 * every`, and so on. Defaults to `1`.
        max_tokens: Integer, the largest number of tokens of an answer. Defaults
            to `16`.
        seed: Integer. Defaults to `0`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of its range. When training begins, if
            the labels have a weight in the loss.

    Example:

    ```python
    distiller.fit(
        data,
        epochs=10,
        callbacks=[keras_laid.haystacks.StudentResponses(data, share=0.5)],
    )
    ```

    Reference:
     - [Agarwal et al., 2024](https://arxiv.org/abs/2306.13649), algorithm 1.
    """

    def __init__(
        self,
        data: LongPrompts,
        share: float = 1.0,
        every: int = 1,
        max_tokens: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_kind("data", data, LongPrompts, "a `keras_laid.LongPrompts`")
        check_number("share", share, "(0, 1]")
        check_integer("every", every)
        check_integer("max_tokens", max_tokens)
        check_integer("seed", seed, at_least=0)
        self.data = data
        self.share = share
        self.every = every
        self.max_tokens = max_tokens
        self.seed = seed
        self._prompts: Any = None  # Made when training begins.
        data.make_room(max_tokens)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        if self.model.term_weights.get("supervised"):
            raise ValueError(
                "The student's own answers cannot be its labels. Received: a "
                "distiller with a supervised term. Pass `supervised_weight=0`."
            )
        # Once, so that nothing is compiled again in later epochs.
        self._prompts = prompts_for(self.model.student)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, float] | None = None
    ) -> None:
        if epoch % self.every:
            return
        rng = np.random.default_rng((self.seed, epoch))
        chosen = rng.random(self.data.num_prompts) < self.share
        self.data.responses = {}
        for index in tqdm(range(len(self.data)), desc="student's answers"):
            self._answer(self._prompts, index, chosen)

    def _answer(
        self, prompts: ModelPrompts, index: int, chosen: np.ndarray
    ) -> None:
        """Lets the student answer the chosen prompts of a batch."""
        numbers = self.data.numbers(index)
        if not chosen[numbers].any():
            return
        images: Any
        images, _ = self.data.drawn(index)
        texts = [
            prompts.fill(
                "{images}{question}",
                len(shown),
                question=self.data.examples[row].prompt,
            )
            for row, shown in zip(self.data.order[numbers], images, strict=True)
        ]
        if prompts.takes_images:
            images = self.data.load(images)
        answers = prompts.generate(images, texts, self.max_tokens)
        for number, answer in zip(numbers.tolist(), answers, strict=True):
            if chosen[number]:
                self.data.responses[number] = answer

    def get_state(self) -> dict[str, str]:
        """The answers, for `keras_laid.ResumableTraining`."""
        return {str(n): text for n, text in self.data.responses.items()}

    def set_state(self, state: dict[str, str]) -> None:
        self.data.responses = {int(n): text for n, text in state.items()}
