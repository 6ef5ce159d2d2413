"""A learning rate for each group of a distiller's variables."""

import keras


def group_optimizer(student, mixer=None, gains=None, **kwargs):
    """One optimizer for the student, one for mixers, one for gains.

    The paper trains the model at 1e-5 and the mixing weights at 1e-4.

    Args:
        student: `keras.Optimizer` of every variable no other one takes.
        mixer: Optional `keras.Optimizer` of the head mixers. Defaults to the
            student's.
        gains: Optional `keras.Optimizer` of the rotary gains. Defaults to the
            student's.
        **kwargs: Passed to `keras.optimizers.MultiOptimizer`.

    Returns:
        A `keras.optimizers.MultiOptimizer`.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), settings.
    """
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
