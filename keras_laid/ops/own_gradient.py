"""Functions of tensors that bring a gradient of their own."""

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
    """Calls a function that computes its gradient too.

    What the function reads must come as its arguments: JAX may differentiate
    after the call, when other tensors of the caller are gone.

    Args:
        function: Called as `function(constants, *variables)`. Returns a tensor
            and a function from its gradient to those of the variables, each in
            the variable's dtype.
        variables: List of float tensors.
        constants: Nested structure. No gradient reaches its tensors.

    Returns:
        The function's tensor.
    """
    leaves = keras.tree.flatten(constants)
    tensors = [leaf for leaf in leaves if ops.is_tensor(leaf)]

    @ops.custom_gradient
    def run(*arguments: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        variables = arguments[: len(arguments) - len(tensors)]
        # Only floats have gradients, if of 0.
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
            if upstream is None:  # Only torch gives it by name.
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
