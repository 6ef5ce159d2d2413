"""Reads a GGUF file into the variables of a KerasHub model."""

import functools

import gguf


class GGUFFile:
    """A GGUF file.

    Args:
        path: Path.
    """

    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def __getitem__(self, key):
        """A value of the file's metadata; `{arch}` is the architecture."""
        arch = self.reader.fields["general.architecture"].contents()
        return self.reader.fields[key.format(arch=arch)].contents()

    def load(self, model, weights):
        """Assigns a tensor to every variable, and uses every tensor.

        Args:
            model: A Keras model.
            weights: Iterable of tuples `(variable, name, convert)`: the name of
                the tensor without `.weight`, and a function of its array, of
                shape `(out, in)` where it is a matrix.
        """
        unused = set(self.tensors)
        missing = {variable.path for variable in model.weights}
        for variable, name, convert in weights:
            tensor = self.tensors[f"{name}.weight"]
            unused.discard(tensor.name)
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            variable.assign(convert(array))
            missing.remove(variable.path)
        if unused or missing:
            raise ValueError(
                "Every tensor must belong to a variable. Received: tensors "
                f"without a variable {sorted(unused)}, and variables without a "
                f"tensor {sorted(missing)}."
            )


def unchanged(array):
    return array


def kernels(block, denses):
    """Tuples for `load`, for dense layers whose kernel is a matrix in the file.

    In Keras, heads may have an axis: a kernel has the shape `(in, out)`,
    `(in, heads, head_dim)` or `(heads, head_dim, out)`.

    Args:
        block: Integer, the index of the transformer block.
        denses: Iterable of pairs of a dense layer and its name in the file.
    """
    for dense, name in denses:
        convert = functools.partial(transposed, dense.kernel.shape)
        yield dense.kernel, f"blk.{block}.{name}", convert


def transposed(shape, matrix):
    return matrix.T.reshape(shape)
