"""A learning rate for each group of a distiller's variables."""

from typing import Any

import keras

from keras_laid.arguments import check_kind

OF_ALL = ("loss_scale_factor", "name")  # Arguments of `MultiOptimizer`.


def group_optimizer(
    student: keras.Optimizer,
    mixer: keras.Optimizer | None = None,
    gains: keras.Optimizer | None = None,
    **kwargs: Any,
) -> keras.optimizers.MultiOptimizer:
    """One optimizer for the student, one for mixers, one for gains.

    The paper trains the model at 1e-5 and the mixing weights at 1e-4.

    Args:
        student: `keras.Optimizer` of every variable that no other one trains.
        mixer: Optional `keras.Optimizer` of the head mixers. Defaults to the
            student's.
        gains: Optional `keras.Optimizer` of the rotary gains. Defaults to the
            student's.
        **kwargs: `name` and `loss_scale_factor` of
            `keras.optimizers.MultiOptimizer`.

    Returns:
        A `keras.optimizers.MultiOptimizer`.

    Raises:
        TypeError: If an optimizer is not a `keras.Optimizer`, or `kwargs` has
            an argument of a single optimizer, such as `clipnorm`.
        ValueError: If two groups are given the same optimizer; or if one
            optimizer scales the loss, which has one scale for all groups.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), settings.
    """
    for name, value in kwargs.items():
        if name not in OF_ALL:
            raise TypeError(
                f"Arguments of all groups must be among {OF_ALL}. Received: "
                f"{name}={value!r:.80}. Pass others to the optimizers, as in "
                "`keras.optimizers.AdamW(1e-5, clipnorm=1.0)`."
            )
    given = {"student": student, "mixer": mixer, "gains": gains}
    given = {name: each for name, each in given.items() if each is not None}
    for name, optimizer in {"student": student, **given}.items():
        check_kind(
            name, optimizer, keras.optimizers.Optimizer, "a `keras.Optimizer`"
        )
        check_unscaled(name, optimizer)
    if len({id(optimizer) for optimizer in given.values()}) < len(given):
        raise ValueError(
            "Each group must have an optimizer of its own, which keeps the "
            f"state of its variables. Received: one for several of {[*given]}. "
            "Make one for each, or leave out groups that the student's trains."
        )
    groups = {"mixing_logits": mixer, "log_gain": gains}
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            student,
            {
                f".*{name}": optimizer
                for name, optimizer in groups.items()
                if optimizer is not None
            },
        ),
        **kwargs,
    )


def check_unscaled(name: str, optimizer: keras.Optimizer) -> None:
    """Refuses an optimizer that would scale the loss of only its group."""
    is_scaling = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if is_scaling or optimizer.loss_scale_factor is not None:
        raise ValueError(
            "The loss must have one scale for all groups. Received: "
            f"{name}={optimizer.name!r}, which has one of its own. Pass "
            "`keras.optimizers.LossScaleOptimizer(group_optimizer(...))` or "
            "`group_optimizer(..., loss_scale_factor=...)`."
        )
