"""Learned weights from a teacher's heads to a student's heads."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.typing import Tensor


@keras.saving.register_keras_serializable(package="keras_laid")
class HeadMixer(keras.layers.Layer):
    """Gives each student head a mixture of the teacher's heads.

    The weights of a mixture are not negative and sum to 1: for each student
    head, they are a softmax of trainable logits over the teacher's heads. With
    equal logits, the default, each student head is given the mean of all
    teacher heads.

    Weight decay pulls the logits to 0, and so the mixtures to that mean. With
    `trainable=False` the mixtures stay as they start.

    Args:
        student_heads: Positive integer, the number of the student's heads.
        teacher_heads: Positive integer, the number of the teacher's heads.
        initializer: A `keras.initializers.Initializer` of the logits, or its
            name. Defaults to `"zeros"`.
        sharpness: Float, added to the initial logits of the teacher heads at
            the same relative place as the student head, so that it starts with
            more of these heads. With 8 teacher heads, the second of 4 student
            heads prefers the third and fourth. `0.0` prefers none. Defaults to
            `0.0`.
        **kwargs: Passed to `keras.layers.Layer`: `name`, `trainable`, etc.

    Call arguments:
        inputs: Tensor of shape `(batch, length, teacher_heads, features)`.

    Returns:
        A tensor of shape `(batch, length, student_heads, features)`, in the
        layer's compute dtype.

    Raises:
        TypeError: If a number of heads is not an integer, or `sharpness` is not
            a number.
        ValueError: If a number of heads is not positive, or `sharpness` is not
            finite.

    Example:

    ```python
    mixer = keras_laid.layers.HeadMixer(student_heads=2, teacher_heads=8)
    mixer(keras.random.normal((1, 16, 8, 64))).shape  # (1, 16, 2, 64)
    mixer.mixture().shape  # (2, 8)
    ```
    """

    def __init__(
        self,
        student_heads: int,
        teacher_heads: int,
        initializer: str | keras.initializers.Initializer = "zeros",
        sharpness: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_integer("student_heads", student_heads)
        check_integer("teacher_heads", teacher_heads)
        check_number("sharpness", sharpness, "(-inf, inf)")
        super().__init__(**kwargs)
        self.student_heads = student_heads
        self.teacher_heads = teacher_heads
        self.initializer = keras.initializers.get(initializer)
        self.sharpness = sharpness
        self.input_spec = keras.layers.InputSpec(
            ndim=4, axes={2: teacher_heads}
        )
        # The shape is known without inputs, so that `mixture` can be called
        # before the layer is.
        self.mixing_logits = self.add_weight(
            name="mixing_logits",
            shape=(student_heads, teacher_heads),
            initializer=self._initial_logits,
            dtype="float32",
            autocast=False,
        )
        self.built = True

    def mixture(self) -> Tensor:
        """The weights of the teacher's heads.

        Returns:
            A float32 tensor of shape `(student_heads, teacher_heads)`, not
            negative, with rows that sum to 1.
        """
        return ops.softmax(ops.convert_to_tensor(self.mixing_logits), axis=-1)

    def call(self, inputs: Tensor) -> Tensor:
        # b = batch, l = position, t = teacher head, s = student head,
        # d = feature
        mixture = ops.cast(self.mixture(), inputs.dtype)
        return ops.einsum("bltd,st->blsd", inputs, mixture)

    def compute_output_shape(
        self, input_shape: Sequence[int | None]
    ) -> tuple[int | None, ...]:
        return (*input_shape[:2], self.student_heads, *input_shape[3:])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "student_heads": self.student_heads,
                "teacher_heads": self.teacher_heads,
                "initializer": keras.initializers.serialize(self.initializer),
                "sharpness": self.sharpness,
            }
        )
        return config

    def _initial_logits(
        self, shape: Sequence[int], dtype: str | None = None
    ) -> Tensor:
        student = np.arange(self.student_heads)[:, None]
        teacher = np.arange(self.teacher_heads)[None, :]
        # Head `i` of `n` covers `i / n` to `(i + 1) / n`, which are compared
        # exactly, as integers.
        overlap = np.logical_and(
            student * self.teacher_heads < (teacher + 1) * self.student_heads,
            teacher * self.student_heads < (student + 1) * self.teacher_heads,
        )
        preferred = ops.convert_to_tensor(self.sharpness * overlap, dtype)
        return self.initializer(shape, dtype=dtype) + preferred
