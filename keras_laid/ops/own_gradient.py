"""Functions of tensors that compute their own gradient."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_laid.typing import Tensor

Gradients = Callable[[Tensor], list[Tensor]]


def with_own_gradient(
    function: Callable[..., tuple[Tensor, Gradients]],
    variables: list[Tensor],
    constants: Any,
) -> Tensor:
    """Calls a function that also computes its own gradient.

    Every tensor that the function reads must be one of its arguments: JAX may
    differentiate it after the call, when tensors that it captured from the
    caller no longer exist.

    Args:
        function: Called as `function(constants, *variables)`. Returns a tensor
            and a second function. The second function takes the gradient of
            the tensor and returns a list of the gradients of the variables,
            each in the variable's dtype.
        variables: List of float tensors.
        constants: Nested structure of tensors and other values. No gradient
            reaches its tensors.

    Returns:
        The tensor that `function` returns.
    """
    leaves = keras.tree.flatten(constants)
    tensors = [leaf for leaf in leaves if ops.is_tensor(leaf)]

    @ops.custom_gradient
    def run(*arguments: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        variables = arguments[: len(arguments) - len(tensors)]
        # Constants are passed as floats: only these can have a gradient, 0.
        floats = arguments[len(variables) :]
        given = iter(
            ops.cast(each, tensor.dtype)
            for each, tensor in zip(floats, tensors, strict=True)
        )
        filled = [
            next(given) if ops.is_tensor(leaf) else leaf for leaf in leaves
        ]
        output, gradients_of = function(
            keras.tree.pack_sequence_as(constants, filled), *variables
        )

        def gradients(
            *arguments: Tensor, upstream: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            if upstream is None:  # Only torch passes it by name.
                (upstream,) = arguments
            zeros = [ops.zeros_like(each) for each in floats]
            return (*gradients_of(upstream), *zeros)

        return output, gradients

    return run(*variables, *map(as_float, tensors))


def as_float(tensor: Tensor) -> Tensor:
    is_float = keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(tensor.dtype)
    )
    return tensor if is_float else ops.cast(tensor, "float32")
