"""Shards KerasHub models and the distiller over devices."""

import re
from typing import Any

import keras

from keras_laid.arguments import check_kind

# The axis along which each kernel is best split; a negative one counts from the
# back. The axis that a product puts out is the one that the next product sums
# over, so that devices communicate once for both.
PREFERRED_AXES = (
    (r"token_embedding/embeddings$", 0),  # The vocabulary.
    (r"reverse_embeddings$", -1),
    (r"decoder_block.*/attention/(query|key|value)/(dense/)?kernel$", 0),
    (r"self_attention/(query|key|value)/kernel$", 1),  # Heads.
    (r"(attention_output|out_proj)/(dense/)?kernel$", 0),
    (r"(ffw_linear|output_dense|mlp_dense_2)/(dense/)?kernel$", 0),
    (r"(gating(_2)?|gate_dense|intermediate_dense)/(dense/)?kernel$", -1),
    (r"(mlp_dense_1|_proj|in_proj_\w+)/kernel$", -1),
)
REPLICATED = r"(mixing_logits|log_gain)$"  # Small, and used by all.


class ModelParallel(keras.distribution.ModelParallel):
    """Splits the weights of any KerasHub model by their names and shapes.

    KerasHub has layout maps for a few text models; this class needs none.
    Matrices are split over the model axis of the mesh: attention by heads,
    feedforward layers by their inner width, and embeddings by tokens of the
    vocabulary. If the number of devices does not divide that axis, the longest
    axis that it divides is split. Vectors, mixers and gains are copied to every
    device. Batches are split over the other axis of the mesh.

    Args:
        device_mesh: A `keras.distribution.DeviceMesh` with two axes: first that
            of data, then that of the model.
        layout_map: Optional `keras.distribution.LayoutMap` for variables that
            are to be laid out in another way. Defaults to `None`.
        **kwargs: Passed to `keras.distribution.ModelParallel`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the mesh does not have two axes or is not the map's, or
            the backend is not JAX, the only one that Keras can shard models on.

    Example:

    ```python
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"])
    keras.distribution.set_distribution(keras_laid.ModelParallel(mesh))
    # Weights are read to the host, and from there each device gets its part.
    with jax.default_device(jax.devices("cpu")[0]):
        teacher = keras_hub.models.PaliGemmaCausalLM.from_preset(...)
    ```
    """

    def __init__(
        self,
        device_mesh: keras.distribution.DeviceMesh,
        layout_map: keras.distribution.LayoutMap | None = None,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "jax":
            raise ValueError(
                "Keras shards models over devices only on JAX. Received: "
                f"backend={keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        check_kind(
            "device_mesh",
            device_mesh,
            keras.distribution.DeviceMesh,
            "a `keras.distribution.DeviceMesh`",
        )
        if len(device_mesh.shape) != 2:
            raise ValueError(
                "`device_mesh` must have an axis of data and one of model. "
                f"Received: device_mesh.shape={tuple(device_mesh.shape)}. "
                "Give an axis that you do not need the size 1."
            )
        if layout_map is None:
            layout_map = keras.distribution.LayoutMap(device_mesh)
        check_kind(
            "layout_map",
            layout_map,
            keras.distribution.LayoutMap,
            "a `keras.distribution.LayoutMap`",
        )
        if layout_map.device_mesh is not device_mesh:
            raise ValueError(
                "`layout_map` must be one of `device_mesh`. "
                f"Received: a map of {layout_map.device_mesh}, "
                f"device_mesh={device_mesh}"
            )
        super().__init__(layout_map=layout_map, **kwargs)
        self.layout_map = layout_map

    def get_variable_layout(
        self, variable: keras.Variable
    ) -> keras.distribution.TensorLayout:
        """The `keras.distribution.TensorLayout` of a variable."""
        given = getattr(variable, "_layout", None) is not None
        if given or self.layout_map[variable.path] is not None:
            return super().get_variable_layout(variable)
        axes = [None] * len(variable.shape)
        axis = split_axis(
            variable.path, variable.shape, self.device_mesh.shape[1]
        )
        if axis is not None:
            axes[axis] = self.device_mesh.axis_names[1]
        return keras.distribution.TensorLayout(axes, self.device_mesh)


def split_axis(path: str, shape: tuple[int, ...], devices: int) -> int | None:
    """The axis of a variable to split over devices, or `None` for none.

    Args:
        path: String, the variable's path.
        shape: Tuple of integers, the variable's shape.
        devices: Integer, the number of devices.
    """
    if len(shape) < 2 or re.search(REPLICATED, path):
        return None
    for pattern, axis in PREFERRED_AXES:
        if re.search(pattern, path) and shape[axis] % devices == 0:
            return axis % len(shape)
    dividing = [i for i, size in enumerate(shape) if size % devices == 0]
    return max(dividing, key=lambda i: shape[i], default=None)
