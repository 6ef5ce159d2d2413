"""Several devices: models split over them, and the memory that each needs."""

from keras_laid.devices.memory_plan import plan
from keras_laid.devices.model_parallel import ModelParallel

__all__ = ["ModelParallel", "plan"]
