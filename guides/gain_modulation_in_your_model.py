"""
Title: Rotary gains in your own model
Author: The keras_laid authors
Date created: 2026/11/23
Last modified: 2026/11/23
Description: A gain per rotary frequency, in plain Keras and in KerasHub.
Accelerator: None
"""

"""
## Introduction

The attention logit of a query and a key is a sum over the frequencies of the
rotary embedding. High frequencies tell neighbouring positions apart, low ones
tell near from far. `GainModulatedRotaryEmbedding` multiplies each frequency's
part by a trainable gain. These few numbers in each layer say at what distances
a model looks.

This guide drops the layer into a small Keras model, then attaches gains to a
causal language model of KerasHub, trains only the gains, and folds them into
its weights. The result is a plain KerasHub preset.

Without arguments it runs in two minutes on two CPU cores. The same file takes a
real preset:

```shell
KERAS_BACKEND=jax python guides/gain_modulation_in_your_model.py \\
    --preset llama3.2_1b
```

## Setup
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")  # Or "tensorflow" or "torch".

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_laid
from keras_laid import spectral

parser = argparse.ArgumentParser()
parser.add_argument("--preset", help="a causal language model of KerasHub")
parser.add_argument("--steps", type=int, default=300, help="in each training")
parser.add_argument("--output", default="runs/gain_modulation_in_your_model")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--quick", action="store_true", help="a check in a minute, not a result"
)
args = parser.parse_args()
if args.quick:
    args.steps = 100

output = pathlib.Path(args.output)
output.mkdir(parents=True, exist_ok=True)
keras.utils.set_random_seed(args.seed)

"""
## The task

Each sequence has the same passage of random tokens twice. In the second copy
each token can be predicted: it is the token `passage` positions earlier. All
other tokens are random, and do not count. For a longer window, `before` more
random tokens come first.
"""

passage, batch_size = 16, 32


def repeated_passages(count, vocabulary_size, seed, before=0):
    length = before + 2 * passage
    tokens = np.random.default_rng(seed).integers(
        vocabulary_size, size=(count, length), dtype="int32"
    )
    tokens[:, -passage:] = tokens[:, -2 * passage : -passage]
    counted = np.arange(1, length) >= length - passage
    weights = np.tile(counted.astype("float32"), (count, 1))
    return tokens[:, :-1], tokens[:, 1:], weights


def compile_model(model, learning_rate):
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )


"""
## In a plain Keras model

One layer of attention, with queries and keys passed through the same
`GainModulatedRotaryEmbedding`. It takes the arguments of
`keras_hub.layers.RotaryEmbedding`, and equals it before training.
"""

vocabulary_size, num_heads, head_dim = 32, 2, 32


def heads(name):
    return keras.layers.EinsumDense(
        "btm,mhd->bthd",
        output_shape=(None, num_heads, head_dim),
        bias_axes="hd",
        bias_initializer="random_normal",
        name=name,
    )


rotary = keras_laid.GainModulatedRotaryEmbedding(max_wavelength=100)
tokens = keras.Input((None,), dtype="int32")
x = keras.layers.Embedding(vocabulary_size, num_heads * head_dim)(tokens)
query, key, value = heads("query")(x), heads("key")(x), heads("value")(x)
attended = ops.dot_product_attention(
    rotary(query), rotary(key), value, is_causal=True
)
logits = keras.layers.EinsumDense(
    "bthd,hdv->btv", output_shape=(None, vocabulary_size), name="logits"
)(attended)
model = keras.Model(tokens, logits)

inputs, labels, weights = repeated_passages(
    args.steps * batch_size, vocabulary_size, args.seed
)
print("A plain Keras model, trained as a whole:", flush=True)
compile_model(model, learning_rate=0.01)
history = model.fit(
    inputs,
    labels,
    sample_weight=weights,
    batch_size=batch_size,
    validation_data=repeated_passages(256, vocabulary_size, args.seed + 1),
)
plain_accuracy = history.history["val_accuracy"][-1]

"""
The picture shows the gains over the wavelength of their frequency. High
frequencies tell the sought token from its neighbours.
"""

frequencies = head_dim // 2
exponents = np.arange(frequencies) / frequencies
wavelengths = 2 * np.pi * rotary.max_wavelength**exponents
gains = ops.convert_to_numpy(rotary.gains())
spectral.plot_gains(output / "gains.png", wavelengths, {0: gains})

"""
## In a model of KerasHub

Any causal language model that reads text and whose family keras_laid knows will
do. Without `--preset`, this guide briefly trains a small Llama in place of a
pretrained model.

The guide compiles a `keras.Model` of the same layers, which takes token ids;
the language model itself would pass its inputs to the tokenizer.
"""


def to_inputs(tokens):
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


def compiled(causal_lm, learning_rate=1e-3):
    model = keras.Model(causal_lm.input, causal_lm.output)
    compile_model(model, learning_rate)
    return model


def fit(causal_lm, learning_rate, seed, before=0):
    tokens, labels, weights = repeated_passages(
        args.steps * batch_size,
        causal_lm.backbone.vocabulary_size,
        seed,
        before,
    )
    compiled(causal_lm, learning_rate).fit(
        to_inputs(tokens),
        labels,
        sample_weight=weights,
        batch_size=batch_size,
    )


def accuracy(causal_lm):
    tokens, labels, weights = long_test
    metrics = compiled(causal_lm).evaluate(
        to_inputs(tokens), labels, sample_weight=weights, return_dict=True
    )
    return metrics["accuracy"]


def logits_of(causal_lm):
    logits = causal_lm(to_inputs(long_test[0][:8]))
    return ops.convert_to_numpy(ops.cast(logits, "float32"))


def difference(logits, expected):
    """The largest difference, as a share of the largest logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


if args.preset:
    causal_lm = keras_hub.models.CausalLM.from_preset(args.preset)
else:
    causal_lm = keras_hub.models.LlamaCausalLM(
        backbone=keras_hub.models.LlamaBackbone(
            vocabulary_size=vocabulary_size,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=64,
            intermediate_dim=64,
        )
    )
    print("A small Llama, trained as a whole:", flush=True)
    fit(causal_lm, learning_rate=0.01, seed=args.seed + 2)

"""
The model is frozen before it gets its gains, so that nothing else is trained.
The window is twice as long as the small Llama has seen; the far tokens distract
it.
"""

long_test = repeated_passages(
    256, causal_lm.backbone.vocabulary_size, args.seed + 3, before=2 * passage
)
accuracy_before = accuracy(causal_lm)
causal_lm.backbone.trainable = False
keras_laid.attach_gain_modulation(causal_lm)
print("Only its gains trained, in a longer window:", flush=True)
fit(causal_lm, learning_rate=0.03, seed=args.seed + 4, before=2 * passage)
accuracy_after = accuracy(causal_lm)
spectral.plot_gains(
    output / "gains_of_causal_lm.png",
    spectral.rotary_wavelengths(causal_lm),
    spectral.rotary_gains(causal_lm),
)

"""
## Back to a plain model

Folding multiplies the gains into the weights that make queries and keys. The
logits stay the same, up to rounding. So do the logits of the preset, which
KerasHub reads back from disk as a plain model.
"""

gained = logits_of(causal_lm)
keras_laid.fold_gain_modulation(causal_lm)
folded = difference(logits_of(causal_lm), gained)
preset = str(output / "preset")
causal_lm.save_to_preset(preset)
reloaded = keras_hub.models.CausalLM.from_preset(preset)
results = {
    "accuracy": {
        "plain": plain_accuracy,
        "before": accuracy_before,
        "after": accuracy_after,
    },
    "difference": {
        "folded": folded,
        "reloaded": difference(logits_of(reloaded), gained),
    },
    "class": type(reloaded.backbone).__name__,
    "settings": vars(args),
}
(output / "results.json").write_text(json.dumps(results, indent=2))

"""
## Conclusion

One line replaces a rotary embedding in your model, and one line attaches gains
to a model of KerasHub. Gains are few numbers, and cost nothing once they are
folded. With a teacher, they are one part of long-window anchoring distillation:
see `guides/distill_paligemma.py`.
"""

print(f"\nPlots, results.json and the preset are in {output}/\n")
print(f"accuracy of the plain model: {plain_accuracy:.2f}")
print(
    "accuracy in the longer window: "
    f"{accuracy_before:.2f} before, {accuracy_after:.2f} with gains"
)
print(
    "largest difference of a logit, of the largest: "
    f"{folded:.1e} folded, {results['difference']['reloaded']:.1e} reloaded"
)
