"""How many steps a training has."""

import keras


class TotalSteps(keras.callbacks.Callback):
    """Tells a distiller how many steps its training has."""

    def __init__(self, initial_epoch: int) -> None:
        super().__init__()
        self.initial_epoch = initial_epoch

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        model = self.model
        model.fit_knows_steps = self.params["steps"] is not None
        model.check_progress()
        if not model.fit_knows_steps:
            # Evaluation takes the value of schedules at this step.
            if model.distance_weighting.steps is not None:
                model.total_steps.assign(model.distance_weighting.steps)
            return
        # A callback that resumes an earlier run sets `_initial_epoch`.
        initial_epoch = model._initial_epoch or self.initial_epoch
        remaining = self.params["epochs"] - initial_epoch
        model.total_steps.assign(model.step + remaining * self.params["steps"])
