"""How much more distant tokens count, and how that grows over training."""

import math

from keras import ops

SCHEDULES = ("constant", "linear", "cosine")


class DistanceWeighting:
    """Weights attention divergence by distance, more as training goes on.

    A pair of tokens at the longest distance weighs
    `1 + strength * progress`, a token and itself weigh 1.

    Args:
        strength: Float, 0 or more. Defaults to `4.0`.
        exponent: Float greater than 0, of the distance as a share of the
            longest. Defaults to `1.0`.
        schedule: How `progress` goes from 0 to 1 over training: `"linear"`,
            `"cosine"` (slow at both ends), or `"constant"` (1 throughout).
            Defaults to `"linear"`.
        steps: Optional integer: the step at which `progress` reaches 1.
            Defaults to the last step of `fit`.

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), "progressive
       distance-weighted attention matching"; the formula is ours.
    """

    def __init__(
        self, strength=4.0, exponent=1.0, schedule="linear", steps=None
    ):
        if not (strength >= 0 and math.isfinite(strength)):
            raise ValueError(
                "`strength` must be a finite number, 0 or more. "
                f"Received: strength={strength}"
            )
        if not (exponent > 0 and math.isfinite(exponent)):
            raise ValueError(
                "`exponent` must be a finite number greater than 0. "
                f"Received: exponent={exponent}"
            )
        if schedule not in SCHEDULES:
            raise ValueError(
                f"`schedule` must be one of {SCHEDULES}. "
                f"Received: schedule={schedule!r}"
            )
        if steps is not None and steps < 1:
            raise ValueError(
                f"`steps` must be at least 1 or `None`. Received: steps={steps}"
            )
        self.strength = strength
        self.exponent = exponent
        self.schedule = schedule
        self.steps = steps

    def progress(self, step, steps):
        """Progress in `[0, 1]`, a float32 scalar tensor.

        Args:
            step: Scalar tensor, training steps done.
            steps: Scalar tensor, steps after which progress is 1.
        """
        step, steps = ops.cast(step, "float32"), ops.cast(steps, "float32")
        share = ops.clip(step / ops.maximum(steps, 1.0), 0.0, 1.0)
        if self.schedule == "constant":
            return ops.ones_like(share)
        if self.schedule == "cosine":
            return (1.0 - ops.cos(math.pi * share)) / 2.0
        return share
