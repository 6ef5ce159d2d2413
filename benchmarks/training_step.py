"""One training step: ours, `keras.distillation.Distiller`'s, and plain SFT.

    KERAS_BACKEND=jax python -m benchmarks.training_step
    KERAS_BACKEND=jax python -m benchmarks.training_step --dtype bfloat16 \\
        --width 2048 --layers 18 --tokens 8192 --rematerialize \\
        --linear_memory pallas  # On a GPU.

Appends rows to `benchmarks/results/training_step.csv`: the time of a step, and
the memory that it takes beyond weights and optimizer. Student and teacher have
the shape of PaliGemma, by default with a quarter of its width, four layers and
its whole vocabulary. Each method runs in a separate process; rounds of all
methods alternate, and a row is the median of a method's rounds. The
floating-point operations of a step are counted from the shapes, without
recomputation; `utilisation` is their share of what the device can do.

- `keras_laid`: attention, logits and supervised terms.
- `retrieval`: the retrieval term in place of the attention term, with three
  heads of the teacher and eight segments of equal length.
- `without_attention`: only logits and supervised terms, to see what the other
  terms cost.
- `keras_distiller`: logits, features of the last layer, and labels.
- `sft`: only labels, as KerasHub trains.
- `teacher_forward`: only the teacher's logits. The sum of `sft` and
  `teacher_forward` is the least that distillation can cost.
"""

import argparse
import json

import keras
import keras_hub
import numpy as np

import keras_laid
from benchmarks import measuring
from benchmarks import rows
from benchmarks.markdown import markdown_table
from keras_laid import distillation
from keras_laid.ops.attention_output import IMPLEMENTATIONS

PATH = rows.RESULTS / "training_step.csv"
BACKEND = keras.backend.backend()
OURS = ("keras_laid", "retrieval", "without_attention")
SEGMENTS = 8
METHODS = (*OURS, "keras_distiller", "sft", "teacher_forward")
IMAGE_TOKENS = 256
# Cost of the teacher's and the student's passes, in units of a forward pass.
PASSES = {
    "keras_laid": 1 + 3,
    "retrieval": 1 + 3,
    "without_attention": 1 + 3,
    "keras_distiller": 1 + 3,
    "sft": 3,
    "teacher_forward": 1,
}
# Dense bfloat16 operations per second, as the maker states them.
PEAK = {"H100": 989e12, "H200": 989e12}


def make_model(args):
    """A `PaliGemmaCausalLM` with random weights."""
    backbone = keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=args.vocabulary,
        image_size=224,
        num_layers=args.layers,
        num_query_heads=8,
        num_key_value_heads=1,
        hidden_dim=args.width,
        intermediate_dim=16 * args.width,
        head_dim=args.width // 8,
        vit_patch_size=14,
        vit_num_heads=4,
        vit_hidden_dim=args.width // 2,
        vit_num_layers=args.layers,
        vit_intermediate_dim=2 * args.width,
    )
    return keras_hub.models.PaliGemmaCausalLM(
        backbone=backbone, preprocessor=None
    )


def operations(method, args):
    """Floating-point operations of a step, in the decoder and its logits."""
    width, tokens = args.width, args.tokens
    # Queries and outputs, one head of keys and values, gated feedforward.
    weights = 2 * width**2 + 2 * width * (width // 8) + 3 * width * 8 * width
    per_token = args.layers * (2 * weights + 4 * tokens * width)
    logits = 2 * args.response * width * args.vocabulary
    return PASSES[method] * (tokens * per_token + logits)


def make_batch(args):
    """One image, a prompt, and a response that counts."""
    rng = np.random.default_rng(0)
    length = args.tokens - IMAGE_TOKENS
    token_ids = rng.integers(args.vocabulary, size=(1, length), dtype="int32")
    response = np.arange(length)[None] >= length - args.response
    x = {
        "images": rng.normal(size=(1, 224, 224, 3)).astype("float32"),
        "token_ids": token_ids,
        "padding_mask": np.ones((1, length), "int32"),
        "response_mask": response.astype("int32"),
        "segments": np.arange(args.tokens)[None] * SEGMENTS // args.tokens + 1,
    }
    return x, token_ids, response.astype("float32")


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def with_logits(model):
    """A plain Keras model: KerasHub's own takes raw text."""
    backbone = model.backbone
    # As in KerasHub's `CausalLM`, but without the rows of images.
    logits = backbone.token_embedding(
        backbone.output[:, IMAGE_TOKENS:], reverse=True
    )
    return keras.Model(backbone.input, logits)


def make_terms(method, args):
    """The terms that a method adds to those of logits and labels."""
    if method == "retrieval":
        heads = [(args.layers // 2, head) for head in range(3)]
        return [
            distillation.RetrievalMatching(
                teacher_heads=heads, num_segments=SEGMENTS
            )
        ]
    if method == "keras_laid":
        return [distillation.AttentionMatching(0.03)]
    return []


def make_step(method, args):
    """A function without arguments that takes one step and waits."""
    batch = make_batch(args)
    optimizer = keras.optimizers.AdamW(1e-5)
    if method == "teacher_forward":
        teacher = with_logits(make_model(args))
        return forward_of(teacher, batch[0])
    if method == "sft":
        trained = with_logits(make_model(args))
        trained.compile(optimizer, cross_entropy())
    elif method == "keras_distiller":
        student, teacher = (with_logits(make_model(args)) for _ in range(2))
        last = f"decoder_block_{args.layers - 1}"
        trained = keras.distillation.Distiller(
            teacher=teacher,
            student=student,
            distillation_losses=[
                keras.distillation.LogitsDistillation(
                    loss=keras.losses.KLDivergence()
                ),
                keras.distillation.FeatureDistillation(
                    loss="mse",
                    teacher_layer_name=last,
                    student_layer_name=last,
                ),
            ],
            distillation_loss_weights=[1.0, 1.0],
        )
        trained.compile(optimizer=optimizer, loss=cross_entropy())
    else:
        student, teacher = make_model(args), make_model(args)
        trained = keras_laid.DistanceWeightedAttentionDistillation(
            teacher=teacher,
            student=student,
            distance_weighting=keras_laid.DistanceWeighting(
                strength=4.0, schedule="constant"
            ),
            terms=[*make_terms(method, args), distillation.NextTokens()],
        )
        trained.compile(
            optimizer,
            rematerialize=args.rematerialize,
            # `True`, `False`, or a name.
            linear_memory={"True": True, "False": False}.get(
                args.linear_memory, args.linear_memory
            ),
        )
    optimizer.build(trained.trainable_variables)
    return lambda: trained.train_on_batch(*batch)


def forward_of(model, x):
    if BACKEND == "jax":
        import jax

        variables = [
            [v.value for v in each]
            for each in (
                model.trainable_variables,
                model.non_trainable_variables,
            )
        ]
        forward = jax.jit(
            lambda variables, x: model.stateless_call(
                *variables, x, training=False
            )[0]
        )
        return lambda: jax.block_until_ready(forward(variables, x))
    if BACKEND == "torch":
        import torch

        def step():
            with torch.no_grad():
                model(x, training=False)
            measuring.wait()

        return step
    import tensorflow as tf

    forward = tf.function(lambda x: model(x, training=False), jit_compile=True)
    return lambda: forward(x).numpy()[0, 0, 0]


def measure(method, args):
    """Milliseconds of a step and its mebibytes, in this process."""
    keras.config.set_dtype_policy(args.dtype)
    step = make_step(method, args)
    before = measuring.held_bytes()
    step()
    step_bytes = measuring.peak_bytes() - before
    return {
        "ms": measuring.median_ms(step, args.repeats),
        "peak_mib": round(step_bytes / 2**20, 1),
    }


def training_step():
    """Time and memory of our step, relative to those of others."""
    lines = []
    for backend in rows.BACKENDS:
        ours, keras_distiller, sft, teacher = (
            rows.only(
                "training_step", backend=backend, tokens=1024, method=method
            )
            for method in (
                "keras_laid",
                "keras_distiller",
                "sft",
                "teacher_forward",
            )
        )
        parts = float(sft["ms"]) + float(teacher["ms"])
        cells = (
            rows.ratio("ms", ours, keras_distiller),
            float(ours["ms"]) / parts,
            rows.ratio("peak_mib", ours, keras_distiller),
        )
        lines.append(
            [rows.BACKENDS[backend], *(f"{cell:.2f}" for cell in cells)]
        )
    header = [
        "",
        "time, over Keras's distiller",
        "over fine-tuning and teacher",
        "memory, over Keras's distiller",
    ]
    return markdown_table(header, lines)


def retrieval_step():
    """What the retrieval term adds to a step, in rows of one run."""
    lines = []
    for backend in ("jax", "torch"):
        term = rows.only("training_step", backend=backend, method="retrieval")
        without = rows.only(
            "training_step",
            backend=backend,
            method="without_attention",
            commit=term["commit"],
        )
        cells = [
            f"{rows.ratio(c, term, without):.3f}" for c in ("ms", "peak_mib")
        ]
        lines.append([rows.BACKENDS[backend], *cells])
    header = ["", "time with the retrieval term, over without", "memory"]
    return markdown_table(header, lines)


def linear_memory():
    """Time and memory of a step, by the arguments of `compile`."""
    labels = {
        ("False", "False"): "as KerasHub computes it",
        ("True", "False"): "`linear_memory`",
        ("True", "True"): "`linear_memory`, `rematerialize`",
    }
    lines = []
    for (linear, rematerialize), label in labels.items():
        cells = [label]
        for backend in ("jax", "torch"):
            setting = {"backend": backend, "tokens": 4096}
            row = rows.only(
                "training_step",
                linear_memory=linear,
                rematerialize=rematerialize,
                **setting,
            )
            plain = rows.only("training_step", linear_memory=False, **setting)
            cells += [
                "1" if row == plain else f"{rows.ratio('ms', row, plain):.2f}",
                f"{float(row['peak_mib']):,.0f}",
            ]
        lines.append(cells)
    header = ["", "JAX: time", "memory, MiB", "PyTorch: time", "memory, MiB"]
    return markdown_table(header, lines)


TABLES = {
    "training_step": training_step,
    "retrieval_step": retrieval_step,
    "linear_memory": linear_memory,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=257152)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rematerialize", action="store_true")
    parser.add_argument(
        "--linear_memory",
        nargs="?",
        const="True",
        default="False",
        choices=["True", "False", *(i.name for i in IMPLEMENTATIONS)],
        help="with or without the name of an implementation",
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", help="measure only this, print it")
    parser.add_argument(
        "--missing", action="store_true", help="skip rows of this commit"
    )
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    settings = {
        name: getattr(args, name)
        for name in (
            "tokens",
            "response",
            "layers",
            "width",
            "vocabulary",
            "dtype",
            "repeats",
        )
    }
    flags = [
        part for name in settings for part in (f"--{name}", settings[name])
    ]
    flags += ["--linear_memory", args.linear_memory]
    if args.rematerialize:
        flags.append("--rematerialize")
    provenance = measuring.provenance()
    columns = {
        method: {
            "backend": BACKEND,
            "method": method,
            **settings,
            # Other methods do not have these options.
            "rematerialize": args.rematerialize and method in OURS,
            "linear_memory": method in OURS and args.linear_memory,
        }
        for method in args.methods
    }
    measured = {
        method: []
        for method, row in columns.items()
        if not (
            args.missing
            and rows.is_done(PATH, row | provenance, [*row, "device", "commit"])
        )
    }
    for _ in range(args.rounds):
        for method, rounds in measured.items():
            rounds.append(
                measuring.in_new_process(
                    "benchmarks.training_step", ["--one", method, *flags]
                )
            )
            print(method, rounds[-1], flush=True)
    for method, rounds in measured.items():
        ms, peak_mib = (
            float(np.median([each[name] for each in rounds]))
            for name in ("ms", "peak_mib")
        )
        per_second = operations(method, args) / ms * 1e3
        peak = next(
            (PEAK[name] for name in PEAK if name in provenance["device"]), None
        )
        row = {
            **columns[method],
            "rounds": args.rounds,
            "ms": ms,
            "peak_mib": peak_mib,
            "tokens_per_s": round(args.tokens / ms * 1e3, 1),
            "tflops_per_s": round(per_second / 1e12, 4),
            "utilisation": peak and round(per_second / peak, 3),
            **provenance,
        }
        rows.append_row(PATH, row)


if __name__ == "__main__":
    main()
