"""Spectra of signals over distance, and how two models agree in them.

A signal is an array of shape `(..., distances)`, such as
`attention_by_distance` returns. Frequencies are in cycles per step of distance:
per token, or per image.
"""

import itertools
from collections.abc import Sequence
from typing import Literal
from typing import NamedTuple

import keras
import numpy as np
from numpy.typing import ArrayLike

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_increasing
from keras_laid.arguments import check_number
from keras_laid.spectral.attention_mass import attention_by_distance
from keras_laid.typing import Tensor

HEADS = ("mean", "best")
# Energy below this share of a signal's energy is only rounding of float32.
ROUNDING = 1e-12


class Spectrum(NamedTuple):
    """Energy of signals by frequency.

    Attributes:
        frequency: Float array of shape `(distances // 2 + 1,)`, from 0 to 0.5
            cycles per step.
        power: Float array of shape `(..., distances // 2 + 1)`, not negative.
    """

    frequency: np.ndarray
    power: np.ndarray


def power_spectrum(signal: ArrayLike) -> Spectrum:
    """Energy of signals by frequency, one-sided.

    Normalised so that Parseval's theorem holds: the sum over frequencies is the
    sum of the squares of the signal. No window is applied, so that a signal
    whose ends differ leaks towards high frequencies, as `1 / frequency ** 2`.

    Args:
        signal: Array of shape `(..., distances)`.

    Returns:
        A `Spectrum`, a named tuple `(frequency, power)`.

    Raises:
        ValueError: If there are fewer than two distances, or a value is not
            finite.
    """
    frequency, coefficients = _coefficients(signal)
    return Spectrum(frequency, np.abs(coefficients) ** 2)


def low_frequency_share(signal: ArrayLike, cutoff: float) -> np.ndarray:
    """Share of a signal's energy at low frequencies: `0 < frequency <= cutoff`.

    The constant part, at frequency 0, is left out of both energies: it depends
    only on how much attention there is. Attention to one needle has a flat
    spectrum, so that its share is about `2 * cutoff`, the share of frequencies
    that are low. Attention that changes slowly, for example one that decays
    over the whole window, gives almost 1. The share says nothing about how much
    attention there is: compare `power_spectrum` too.

    Args:
        signal: Array of shape `(..., distances)`.
        cutoff: Float in `[1 / distances, 0.5]`, in cycles per step of distance.

    Returns:
        A float array of shape `(...)` of shares in `[0, 1]`; NaN where the
        signal is constant, as that of a head that attends evenly.

    Raises:
        ValueError: If `cutoff` is out of its range, or if there are fewer than
            two distances.
    """
    frequency, power = power_spectrum(signal)
    check_number("cutoff", cutoff, "(0, 0.5]")
    if cutoff < frequency[1]:
        raise ValueError(
            "`cutoff` must be in [1 / distances, 0.5], in cycles per step of "
            f"distance. Received: cutoff={cutoff}, distances="
            f"{np.shape(signal)[-1]}. Pass a higher cutoff or a longer signal."
        )
    low = (frequency > 0) & (frequency <= cutoff)
    varying = power[..., 1:].sum(axis=-1)
    varying = _nan_if_rounding(varying, power.sum(axis=-1))
    return power[..., low].sum(axis=-1) / varying


def signal_agreement(
    one: ArrayLike, other: ArrayLike, bands: Sequence[float]
) -> np.ndarray:
    """Cosine of two signals, band by band.

    Both signals are filtered to a band. The cosine of the filtered signals is 1
    where they rise and fall together, 0 where they have nothing in common, and
    -1 where one rises as the other falls. It depends on where attention goes,
    not on how much there is: scaling a signal changes nothing.

    Args:
        one: Array of shape `(..., distances)`, the first signal.
        other: Array of shape `(..., distances)`, the second signal. It has as
            many distances as `one`; the other axes broadcast.
        bands: Increasing sequence of frequencies in `[0, 0.5]`. Band `i` is
            `bands[i] < frequency <= bands[i + 1]`, so frequency 0 is in no
            band.

    Returns:
        A float array of shape `(..., len(bands) - 1)` in `[-1, 1]`; NaN where a
        signal has no energy in the band.

    Raises:
        ValueError: If the signals differ in length, if a band holds no
            frequency of the signals, or if there are fewer than two distances.
    """
    check_increasing("bands", bands, "[0, 0.5]")
    if np.shape(one)[-1:] != np.shape(other)[-1:]:
        raise ValueError(
            "The signals must have as many distances as each other. Received: "
            f"signals of shapes {np.shape(one)} and {np.shape(other)}. "
            "Give both models the same inputs."
        )
    frequency, one = _coefficients(one)
    _, other = _coefficients(other)
    cosines = []
    for low, high in itertools.pairwise(bands):
        band = (frequency > low) & (frequency <= high)
        if not band.any():
            raise ValueError(
                "Each of `bands` must hold a frequency of the signals, which "
                f"are {frequency[1]:.4g} apart, up to 0.5. "
                f"Received: a band from {low} to {high}. Pass wider bands."
            )
        cosines.append(_cosine(one, other, band))
    return np.stack(cosines, axis=-1)


def band_agreement(
    teacher: keras.Model,
    student: keras.Model,
    inputs: dict[str, Tensor],
    bands: Sequence[float],
    teacher_layers: Sequence[int] = (-1,),
    student_layers: Sequence[int] = (-1,),
    per: Literal["token", "image"] = "token",
    heads: Literal["mean", "best"] = "mean",
) -> np.ndarray:
    """How the attention of two models agrees over distance, band by band.

    This is `signal_agreement` of the models' `attention_by_distance`, for each
    example. The models may have different numbers of heads. With
    `heads="mean"`, the means over heads and layers are compared; sharp heads
    count most in these. With `heads="best"`, each teacher head is compared with
    the student head whose signal is most similar over the batch, and the mean
    over teacher heads is returned. Heads are matched once for all examples and
    bands: a match for each of them would raise the agreement by chance.

    Args:
        teacher: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        student: A model of one of these classes, with as many tokens for an
            image as the teacher.
        inputs: Dictionary of tensors, one batch of inputs for both models,
            without `"positions"`.
        bands: Increasing sequence of frequencies in `[0, 0.5]`, in cycles per
            token or image (see `per`). Band `i` is
            `bands[i] < frequency <= bands[i + 1]`.
        teacher_layers: Sequence of integers, indices of the teacher's decoder
            layers with full attention. Defaults to `(-1,)`, the last layer.
        student_layers: Sequence of integers, indices of the student's decoder
            layers with full attention. Defaults to `(-1,)`, the last layer.
        per: `"token"` or `"image"`, the unit of distance. Defaults to
            `"token"`.
        heads: `"mean"` to compare the models as a whole, or `"best"` to compare
            single heads, which the mean hides. Defaults to `"mean"`.

    Returns:
        A float array of shape `(batch, len(bands) - 1)` in `[-1, 1]`; NaN where
        attention has no energy in the band.

    Raises:
        ValueError: In the cases of `attention_by_distance` and
            `signal_agreement`, or if `heads` is another word.
    """
    check_choice("heads", heads, HEADS)
    one, other = (
        _heads_of_layers(attention_by_distance(model, inputs, layers, per))
        for model, layers in (
            (teacher, teacher_layers),
            (student, student_layers),
        )
    )
    if heads == "mean":
        return signal_agreement(one.mean(axis=1), other.mean(axis=1), bands)
    other = other[:, _best_match(one, other)]
    return signal_agreement(one, other, bands).mean(axis=1)


def _heads_of_layers(signal: np.ndarray) -> np.ndarray:
    """`(batch, layers, heads, ...)` to `(batch, layers * heads, ...)`."""
    return signal.reshape(signal.shape[0], -1, signal.shape[-1])


def _best_match(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each head of `one`, the index of the most similar head of `other`."""
    whole = signal_agreement(one[:, :, None], other[:, None], (0.0, 0.5))
    return np.nan_to_num(whole[..., 0], nan=-1.0).mean(axis=0).argmax(axis=1)


def _coefficients(signal: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, and coefficients whose squares are energies."""
    signal = np.asarray(signal, "float64")
    count = signal.shape[-1] if signal.ndim else 0
    if count < 2:
        raise ValueError(
            "`signal` must have two distances or more. Received: "
            f"signal.shape={signal.shape}. Pass haystacks of more images."
        )
    if not np.isfinite(signal).all():
        raise ValueError(
            "`signal` must be finite. Received: "
            f"{np.sum(~np.isfinite(signal))} of {signal.size} values that are "
            "not"
        )
    frequency = np.fft.rfftfreq(count)
    # Each frequency except 0 and 0.5 stands for its negative too.
    sides = np.where((frequency == 0) | (frequency == 0.5), 1, 2)
    return frequency, np.fft.rfft(signal) * np.sqrt(sides / count)


def _cosine(one: np.ndarray, other: np.ndarray, band: np.ndarray) -> np.ndarray:
    """Cosine of coefficients of shape `(..., frequencies)` within a band."""
    energies = [
        _nan_if_rounding(
            (np.abs(x[..., band]) ** 2).sum(axis=-1),
            (np.abs(x) ** 2).sum(axis=-1),
        )
        for x in (one, other)
    ]
    product = (one[..., band] * other[..., band].conj()).real.sum(axis=-1)
    return np.clip(product / np.sqrt(energies[0] * energies[1]), -1, 1)


def _nan_if_rounding(energy: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.where(energy > ROUNDING * total, energy, np.nan)
