"""YaRN: longer prompts by interpolating rotary frequencies, untrained."""

import contextlib
import functools
import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import Literal

import keras
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.backbones import decoder
from keras_laid.backbones.compiled import compiled_apart
from keras_laid.typing import Tensor


@contextlib.contextmanager
def yarn(
    model: keras.Model,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: Literal["index", "turns"] = "index",
) -> Iterator[None]:
    """Scope in which a model's rotary embeddings are interpolated by YaRN.

    A frequency that turns fewer than `beta_slow` times over `original_length`
    is divided by `factor`, and one that turns more than `beta_fast` times is
    kept. For a frequency between the two, the share that is kept follows a
    ramp. Queries and keys are multiplied by `0.1 * ln(factor) + 1` each.
    Nothing is trained. With `factor=1` no output changes, bit for bit.

    There are two ramps. With `ramp="index"`, as in the authors' program and
    later ones, the ramp is linear in the index of the frequency, between whole
    indices, and never starts before the highest frequency, which is therefore
    always kept. With `ramp="turns"`, as in the paper's equation, the ramp is
    linear in turns. The two differ most where `original_length` is short: if no
    frequency turns `beta_fast` times, the equation keeps none completely.

    Decoder layers with a sliding window are not changed: they see no further in
    a longer prompt. Positions of any kind, cached decoding, gains and
    `keras_laid.self_extend` work inside. Attach and fold gains outside the
    scope.

    Every Keras model that runs the same backbone changes with it, whatever was
    done with that model before: a distiller, a
    `keras_laid.MultiImagePaliGemmaCausalLM`, a functional or subclassed model
    of your own. Inside the scope, the functions of these models for `fit`,
    `evaluate`, `predict` and `generate` are traced again; on exit, the models
    get back their earlier functions. keras_laid records models when they are
    created. Models from before its import are looked up once, among the objects
    of Python's garbage collector.

    Some functions and models are not found. They keep what they were traced
    with, so create them inside the scope: functions that you compile yourself,
    by `jax.jit`, `tf.function` or `torch.compile`; a model that holds the
    backbone neither as a layer nor as an attribute, as in the function of a
    `keras.layers.Lambda`; and models from before the import of keras_laid, if
    `gc.freeze` was called before the first scope. On exit the model is as it
    was before, even if the body raises an error.

    Args:
        model: A `keras_hub.models.CausalLM` or its backbone, of a family that
            `keras_laid.backbones.attention_layers` knows, whose layers with
            full attention rotate all features of a head by one set of
            frequencies; or a `keras_laid.MultiImagePaliGemmaCausalLM`.
        factor: Float of at least 1, the length of the longest prompt divided by
            `original_length`.
        original_length: Positive integer, the length in tokens, images
            included, of the longest prompt of the model's training.
        beta_fast: Float greater than `beta_slow`, in turns over
            `original_length`: frequencies with more turns are kept. Defaults to
            `32.0`.
        beta_slow: Float greater than 0, in turns over `original_length`:
            frequencies with fewer turns are divided by `factor`. Defaults to
            `1.0`.
        ramp: `"index"`, the ramp of the authors' program, as in
            `keras_hub.layers.RotaryEmbedding` with `rope_type="yarn"`, or
            `"turns"`, the ramp of the paper's equation. Defaults to `"index"`.

    Raises:
        TypeError: On entry, if an argument has the wrong type.
        ValueError: On entry, if the model's family is unknown, if the model has
            no layer without a sliding window, rotates a part of the features
            (Gemma 4, Qwen 3.5), has Phi-3's frequencies for long contexts or
            frequencies that are scaled already, or if an argument is out of its
            range. The model is then unchanged.

    Example:

    ```python
    student = keras_hub.models.PaliGemmaCausalLM.from_preset("my_preset")
    with keras_laid.yarn(student, factor=4.0, original_length=8192):
        student.generate({"images": images, "prompts": prompts})
    ```

    Reference:
     - [Peng et al., 2023](https://arxiv.org/abs/2309.00071), "NTK-by-parts"
       interpolation and the attention temperature, and their
       [program](https://github.com/jquesnelle/yarn).
    """
    _check_arguments(factor, original_length, beta_fast, beta_slow, ramp)
    ropes = [layer.rotary for layer in decoder.plainly_rotated(model)]
    for rope in ropes:
        _check_unscaled(rope)
    temperature = 0.1 * math.log(factor) + 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiled_apart(model))
        for rope in ropes:
            shares = functools.partial(
                SHARES_KEPT[ramp],
                original_length=original_length,
                beta_fast=beta_fast,
                beta_slow=beta_slow,
                max_wavelength=rope.max_wavelength,
            )
            frequencies = functools.partial(
                interpolated_frequencies, rope._get_inverse_freq, factor, shares
            )
            cos_and_sin = functools.partial(
                scaled_cos_and_sin, rope._compute_cos_sin_embedding, temperature
            )
            for name, function in (
                ("_get_inverse_freq", frequencies),
                ("_compute_cos_sin_embedding", cos_and_sin),
            ):
                stack.enter_context(
                    decoder.replaced_method(rope, name, function)
                )
        yield


def interpolated_frequencies(
    get_inverse_freq: Callable[[int], Tensor],
    factor: float,
    shares_kept: Callable[[Tensor], Tensor],
    features: int,
) -> Tensor:
    """Inverse frequencies in radians a token, of shape `(features // 2,)`."""
    frequency = get_inverse_freq(features)
    # (1 - kept) / factor + kept, so that a factor of 1 is 1 exactly.
    return frequency * (1 - (1 - shares_kept(frequency)) * (1 - 1 / factor))


def shares_kept_by_turns(
    frequency: Tensor,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    max_wavelength: float,
) -> Tensor:
    """The share of each frequency that is kept, by the paper's equation."""
    del max_wavelength
    turns = original_length * frequency / (2 * math.pi)
    return ops.clip((turns - beta_slow) / (beta_fast - beta_slow), 0, 1)


def shares_kept_by_index(
    frequency: Tensor,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    max_wavelength: float,
) -> Tensor:
    """The share of each frequency that is kept, by the authors' program."""
    count = frequency.shape[0]

    def index_of(turns: float) -> float:
        wavelength = original_length / (2 * math.pi * turns)
        return count * math.log(wavelength) / math.log(max_wavelength)

    first = max(math.floor(index_of(beta_fast)), 0)
    last = min(math.ceil(index_of(beta_slow)), 2 * count - 1)
    index = ops.arange(count, dtype="float32")
    return 1 - ops.clip((index - first) / max(last - first, 0.001), 0, 1)


SHARES_KEPT = {"index": shares_kept_by_index, "turns": shares_kept_by_turns}


def scaled_cos_and_sin(
    compute: Callable[..., tuple[Tensor, Tensor]],
    scale: float,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Cosines and sines times `scale`.

    The product is taken in float32 and rounded once: bfloat16 would round
    `scale` too.
    """
    return tuple(
        ops.cast(ops.cast(x, "float32") * scale, x.dtype)
        for x in compute(*args, **kwargs)
    )


def _check_arguments(
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    ramp: str,
) -> None:
    check_choice("ramp", ramp, SHARES_KEPT)
    check_number("factor", factor, "[1, inf)")
    check_integer("original_length", original_length)
    check_number("beta_fast", beta_fast, "(0, inf)")
    check_number("beta_slow", beta_slow, "(0, inf)")
    if beta_slow >= beta_fast:
        raise ValueError(
            "`beta_slow` must be less than `beta_fast`. "
            f"Received: beta_fast={beta_fast}, beta_slow={beta_slow}"
        )


def _check_unscaled(rope: keras.layers.Layer) -> None:
    if rope.scaling_factor != 1 or rope.rope_type != "linear":
        raise ValueError(
            "The model's rotary embeddings must be unscaled. "
            f"Received: rope_type={rope.rope_type!r}, "
            f"scaling_factor={rope.scaling_factor}"
        )
    if "_get_inverse_freq" in vars(rope):
        raise ValueError(
            "`yarn` scopes of one model cannot be nested. Received: a model "
            "inside a `yarn` scope. Leave that scope first."
        )
