"""The loss that `compile` of the distiller is given, and its scaling."""

from collections.abc import Callable
from typing import Any

import keras

from keras_laid.typing import Tensor


def as_loss(loss: Any) -> keras.losses.Loss | None:
    """The loss that `compile` was given; `None` for `"auto"`."""
    if isinstance(loss, str):
        if loss == "auto":
            return None
        raise ValueError(
            '`loss` must be "auto", a `keras.losses.Loss` or a function: names '
            "stand for losses of probabilities, and the student gives logits. "
            f"Received: loss={loss!r:.80}. Pass one such as "
            "`keras.losses.SparseCategoricalCrossentropy(from_logits=True)`."
        )
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            '`loss` must be "auto", a `keras.losses.Loss` or a function. '
            f"Received: loss={loss!r:.80}"
        )
    if not isinstance(loss, keras.losses.Loss):
        return FunctionLoss(loss)
    if loss.reduction in (None, "none"):
        raise ValueError(
            "`loss` must have a reduction, to one number. "
            f"Received: {loss.name!r} with reduction={loss.reduction!r}"
        )
    return loss


def scaling_the_loss(optimizer: keras.Optimizer) -> keras.Optimizer:
    """The optimizer in a `LossScaleOptimizer`, unless it scales by itself."""
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scales or optimizer.loss_scale_factor is not None:
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer)


class FunctionLoss(keras.losses.Loss):
    """The weighted mean of a function of labels and logits."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(reduction="mean_with_sample_weight")
        self.function = function

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return self.function(y_true, y_pred)
