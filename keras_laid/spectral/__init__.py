"""Where attention goes, as numbers and as pictures.

`import keras_laid` does not import this module, since matplotlib is slow to
import: use `from keras_laid import spectral`.
"""

from keras_laid.backbones.rotary_frequencies import rotary_wavelengths
from keras_laid.spectral.attention_mass import attention_by_distance
from keras_laid.spectral.attention_mass import attention_mass
from keras_laid.spectral.frequency_shares import frequency_shares
from keras_laid.spectral.head_activations import classify_heads
from keras_laid.spectral.head_activations import head_activations
from keras_laid.spectral.intervals import Interval
from keras_laid.spectral.intervals import mean_with_interval
from keras_laid.spectral.learned_weights import head_mixtures
from keras_laid.spectral.learned_weights import rotary_gains
from keras_laid.spectral.plots import plot_attention_mass
from keras_laid.spectral.retrieval_plots import plot_retrieval_heads
from keras_laid.spectral.spectra import Spectrum
from keras_laid.spectral.spectra import band_agreement
from keras_laid.spectral.spectra import low_frequency_share
from keras_laid.spectral.spectra import power_spectrum
from keras_laid.spectral.spectra import signal_agreement
from keras_laid.spectral.spectra_plots import plot_band_agreement
from keras_laid.spectral.spectra_plots import plot_frequency_shares
from keras_laid.spectral.spectra_plots import plot_gains
from keras_laid.spectral.spectra_plots import plot_head_activations
from keras_laid.spectral.spectra_plots import plot_head_mixtures
from keras_laid.spectral.spectra_plots import plot_intervals
from keras_laid.spectral.spectra_plots import plot_spectra

__all__ = [
    "Interval",
    "Spectrum",
    "attention_by_distance",
    "attention_mass",
    "band_agreement",
    "classify_heads",
    "frequency_shares",
    "head_activations",
    "head_mixtures",
    "low_frequency_share",
    "mean_with_interval",
    "plot_attention_mass",
    "plot_band_agreement",
    "plot_frequency_shares",
    "plot_gains",
    "plot_head_activations",
    "plot_head_mixtures",
    "plot_intervals",
    "plot_retrieval_heads",
    "plot_spectra",
    "power_spectrum",
    "rotary_gains",
    "rotary_wavelengths",
    "signal_agreement",
]
