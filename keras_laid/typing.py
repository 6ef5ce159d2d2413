"""Names that annotations share."""

import os
from typing import Any
from typing import TypeAlias

# What `keras.ops` takes and gives: a tensor of the backend, concrete or
# symbolic, a `keras.Variable` or a NumPy array. They have no class in common.
Tensor: TypeAlias = Any

# Of a haystack: `uint8` arrays of shape `(height, width, 3)`, one array of all
# of them, or strings, paths. The first element tells readers which.
Images: TypeAlias = Any

PathLike: TypeAlias = str | os.PathLike[str]
