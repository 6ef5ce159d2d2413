"""Where attention goes, as numbers and as pictures.

Not imported by `keras_laid`, since matplotlib is slow to import:
`from keras_laid import spectral`.
"""

from keras_laid.spectral.attention_mass import attention_mass
from keras_laid.spectral.plots import plot_accuracy
from keras_laid.spectral.plots import plot_attention_mass
from keras_laid.spectral.plots import plot_terms

__all__ = [
    "attention_mass",
    "plot_accuracy",
    "plot_attention_mass",
    "plot_terms",
]
