"""How much more distant tokens count, and how that grows over training."""

import math
from typing import Any
from typing import Literal
from typing import Self

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.typing import Tensor

SCHEDULES = ("constant", "linear", "cosine")


@keras.saving.register_keras_serializable(package="keras_laid")
class DistanceWeighting:
    """Weights attention divergence by distance, more as training goes on.

    A pair of tokens has weight `1 + strength * progress * share**exponent`,
    where `share` is their distance divided by the longest distance: a token and
    itself have weight 1, a pair at the longest distance `1 + strength *
    progress`.

    Args:
        strength: Float, 0 or more: how much the weight grows with distance. `0`
            weights all distances alike. Defaults to `4.0`.
        exponent: Float greater than 0: how the weight grows with distance. `1`
            is in proportion; larger values raise mainly the weights of the
            longest distances. Defaults to `1.0`.
        schedule: How `progress` goes from 0 to 1 over training: `"linear"`,
            `"cosine"` (slow at both ends), or `"constant"` (1 throughout).
            Defaults to `"linear"`.
        steps: Optional integer: the training step at which `progress` reaches
            1. Defaults to the last step of `fit`. Unless the schedule is
            `"constant"`, it is needed for `train_on_batch`, for a loop of your
            own, and for `fit` of data without a length, which raise a
            `ValueError` without it.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is outside its range.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), "progressive
       distance-weighted attention matching"; the formula is ours.
    """

    def __init__(
        self,
        strength: float = 4.0,
        exponent: float = 1.0,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        steps: int | None = None,
    ) -> None:
        check_number("strength", strength, "[0, inf)")
        check_number("exponent", exponent, "(0, inf)")
        check_choice("schedule", schedule, SCHEDULES)
        if steps is not None:
            check_integer("steps", steps)
        self.strength = strength
        self.exponent = exponent
        self.schedule = schedule
        self.steps = steps

    def progress(self, step: Tensor, steps: Tensor | int) -> Tensor:
        """Progress in `[0, 1]`, a float32 scalar tensor.

        Args:
            step: Scalar tensor, training steps done.
            steps: Scalar tensor or integer, steps after which progress is 1.
        """
        step, steps = ops.cast(step, "float32"), ops.cast(steps, "float32")
        share = ops.clip(step / ops.maximum(steps, 1.0), 0.0, 1.0)
        if self.schedule == "constant":
            return ops.ones_like(share)
        if self.schedule == "cosine":
            return (1.0 - ops.cos(math.pi * share)) / 2.0
        return share

    def get_config(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "exponent": self.exponent,
            "schedule": self.schedule,
            "steps": self.steps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)
