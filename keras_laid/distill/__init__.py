"""Distils a pair of presets by a recipe: `python -m keras_laid.distill`."""

from keras_laid.distill.recipe import Recipe
from keras_laid.distill.recipe import read_recipe
from keras_laid.distill.run import distill

__all__ = ["Recipe", "distill", "read_recipe"]
