"""The distiller's entry points, which check what Keras would not."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_laid.arguments import check_tokens
from keras_laid.backbones.qwen_vision import check_grids
from keras_laid.backbones.teacher_inputs import inputs_of_teacher
from keras_laid.backbones.workers import check_workers
from keras_laid.distillation import checks
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.distillation.total_steps import TotalSteps


class CheckedEntries:
    """A base class of the distiller: `fit`, `evaluate` and batch methods."""

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        *args: Any,
        sample_weight: Any = None,
        callbacks: Sequence[keras.callbacks.Callback]
        | keras.callbacks.Callback
        | None = None,
        initial_epoch: int = 0,
        class_weight: None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        checks.check_no_class_weight(class_weight)
        check_workers(x, kwargs)
        self.check_tokens(x, y, sample_weight)
        self.find_heads_once(x, y, sample_weight, batch_size)
        callbacks = [
            *keras.tree.flatten(callbacks or []),
            TotalSteps(initial_epoch),
        ]
        try:
            return super().fit(
                x,
                y,
                batch_size,
                *args,
                sample_weight=sample_weight,
                callbacks=callbacks,
                initial_epoch=initial_epoch,
                **kwargs,
            )
        finally:
            self.fit_knows_steps = False

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.check_tokens(x, y, sample_weight)
        self.check_end_is_known()
        self.find_heads_once(x, y, sample_weight, batch_size)
        return super().evaluate(
            x, y, batch_size, verbose, sample_weight, *args, **kwargs
        )

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: None = None,
        return_dict: bool = False,
    ) -> Any:
        checks.check_no_class_weight(class_weight)
        self.check_tokens(x, y, sample_weight)
        self.find_heads_once([(x, y, sample_weight)])
        self.check_progress()
        return super().train_on_batch(
            x, y, sample_weight, return_dict=return_dict
        )

    def test_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        self.check_tokens(x, y, sample_weight)
        self.check_end_is_known()
        self.find_heads_once([(x, y, sample_weight)])
        return super().test_on_batch(x, y, sample_weight, return_dict)

    def unpack(self, data: Any) -> tuple[Any, Any, Any]:
        """A batch as `(x, y, sample_weight)`, checked."""
        batch = keras.utils.unpack_x_y_sample_weight(data)
        checks.check_batch(self.student, batch)
        self.check_tokens(*batch)
        return batch

    def check_tokens(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Refuses what is no token or no image, if values can be read."""
        student, teacher = [each.vocabulary_size for each in self.descriptions]
        is_stored = isinstance(self.teacher, StoredTeacher)
        if isinstance(x, dict) and "token_ids" in x:
            checks.check_teacher_inputs(x, is_stored, self.terms)
            read_by_all = student if is_stored else min(student, teacher)
            check_tokens("token_ids", x["token_ids"], read_by_all, least=0)
            check_grids(x)
            check_grids(inputs_of_teacher(x))
        checks.check_labels(student, self.supervised_loss, y, sample_weight)
