"""Chips that a step is compiled for; none of them has to be there."""

import dataclasses
import os

# libtpu asks the machine about its TPUs, unless these say what it would answer.
DESCRIBED = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Chips of one kind that work together.

    Attributes:
        topology: String, the name by which libtpu knows them.
        mesh_shape: Tuple of two integers: over how many chips a batch is
            split, and over how many the models.
        chips_of_host: Tuple of three integers, how the chips of one host stand.
    """

    topology: str
    mesh_shape: tuple[int, int]
    chips_of_host: tuple[int, int, int] = (2, 2, 1)

    def devices(self):
        """Descriptions of the chips, as JAX wants them to compile."""
        from jax.experimental import topologies

        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=self.topology,
            chips_per_host_bounds=self.chips_of_host,
        ).devices


CHIPS = {
    "v5e": Chip("v5e:1x1", (1, 1), chips_of_host=(1, 1, 1)),
    "v5e-4": Chip("v5e:2x2", (1, 4)),
    "v5e-16": Chip("v5e:4x4", (1, 16)),
    "v6e": Chip("v6e:1x1", (1, 1), chips_of_host=(1, 1, 1)),
    "v6e-8": Chip("v6e:2x4", (1, 8)),
}


def describe():
    """Sets what JAX and libtpu must know before they are imported."""
    for name, value in DESCRIBED.items():
        os.environ.setdefault(name, value)
