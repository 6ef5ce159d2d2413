"""Distils a pair of presets by a recipe: `python -m keras_laid.distill`."""
