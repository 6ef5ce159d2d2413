"""Times training fed by `LongPrompts`, beside batches made beforehand.

    KERAS_BACKEND=jax python -m benchmarks.prompt_pipeline --family pali_gemma

Appends a row to `benchmarks/results/prompt_pipeline.csv`. Prompts are made of a
folder of JPEG files of different sizes, as a user has them, with images and
tokens of images as the real presets of the family have. The models are much
narrower than real ones, so that a step is shorter, and a slow pipeline shows
more. Both take turns, with one epoch each.
"""

import argparse
import csv
import functools
import pathlib
import tempfile

import keras
import keras_hub
import numpy as np
from PIL import Image

import keras_laid
from benchmarks import rows
from benchmarks.make_presets import sentence_piece
from benchmarks.measuring import Prepared
from benchmarks.measuring import ms_by_feeder
from keras_laid.backbones import several_images
from keras_laid.haystacks import read_examples

PATH = rows.RESULTS / "prompt_pipeline.csv"
KEY = ("backend", "family", "seed")
EXAMPLES = 48
SIZES = (1, 2, 4)
PROMPT, RESPONSES = "which number is on the card ?", ("one", "two", "three")
DECODER = dict(
    num_query_heads=4,
    num_key_value_heads=1,
    hidden_dim=128,
    intermediate_dim=256,
    head_dim=32,
)


def write_folder(folder, rng):
    """Writes photographs of 200 to 1,000 pixels a side, and their table."""
    with (folder / "examples.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["images", "prompt", "response"])
        for number in range(EXAMPLES):
            height, width = rng.integers(200, 1000, size=2)
            coarse = rng.integers(256, size=(8, 8, 3), dtype="uint8")
            image = Image.fromarray(coarse).resize((width, height))
            image.save(folder / f"{number}.jpg")
            response = RESPONSES[number % len(RESPONSES)]
            table.writerow([f"{number}.jpg", PROMPT, response])


def tokenizer(cls, **kwargs):
    proto = sentence_piece(
        [PROMPT, *RESPONSES],
        model_type="word",
        hard_vocab_limit=False,
        **kwargs,
    )
    return cls(proto=proto)


def pali_gemma():
    """A function that makes a model, with the images of PaliGemma."""
    preprocessor = keras_hub.models.PaliGemmaCausalLMPreprocessor(
        tokenizer(keras_hub.models.PaliGemmaTokenizer),
        keras_hub.layers.PaliGemmaImageConverter(
            image_size=(224, 224), scale=1 / 127.5, offset=-1.0
        ),
        sequence_length=32,
    )

    def make():
        backbone = keras_hub.models.PaliGemmaBackbone(
            **DECODER,
            vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
            num_layers=2,
            image_size=224,
            vit_patch_size=14,
            vit_num_heads=2,
            vit_hidden_dim=64,
            vit_num_layers=2,
            vit_intermediate_dim=128,
        )
        return several_images(
            keras_hub.models.PaliGemmaCausalLM(
                backbone=backbone, preprocessor=preprocessor
            )
        )

    return make


def gemma_3():
    """A function that makes a model, with the images of Gemma 3."""
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(
        tokenizer=tokenizer(
            keras_hub.models.Gemma3Tokenizer,
            user_defined_symbols=[
                "<start_of_image>",
                "<end_of_image>",
                "<img>",
                "<start_of_turn>",
                "<end_of_turn>",
                "\n\n",
            ],
        ),
        image_converter=keras_hub.layers.Gemma3ImageConverter(
            image_size=(896, 896), scale=1 / 127.5, offset=-1.0
        ),
        num_vision_tokens_per_image=256,
    )

    def make():
        backbone = keras_hub.models.Gemma3Backbone(
            **DECODER,
            vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
            num_layers=6,
            image_size=896,
            use_query_key_norm=True,
            use_sliding_window_attention=True,
            sliding_window_size=512,
            vision_encoder=keras_hub.models.Gemma3VisionEncoder(
                image_size=896,
                patch_size=14,
                pool_size=4,
                num_layers=1,
                num_heads=1,
                hidden_dim=32,
                intermediate_dim=64,
                output_dim=DECODER["hidden_dim"],
            ),
        )
        return keras_hub.models.Gemma3CausalLM(
            backbone=backbone, preprocessor=preprocessor
        )

    return make


FAMILIES = {"pali_gemma": pali_gemma, "gemma_3": gemma_3}


def measure(family, steps, epochs, seed):
    """Medians of a step's milliseconds, by what feeds it."""
    keras.utils.set_random_seed(seed)
    make = FAMILIES[family]()
    teacher, student = make(), make()
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher, student
    )
    distiller.compile(keras.optimizers.AdamW(1e-4))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_folder(folder, np.random.default_rng(seed))
        prompts = keras_laid.LongPrompts(
            read_examples(folder / "examples.csv"),
            student.preprocessor,
            sizes=SIZES,
            num_prompts=2 * steps,
            batch_size=2,
            seed=seed,
        )
        feeders = {"prepared": Prepared(prompts), "long_prompts": prompts}
        return ms_by_feeder(
            functools.partial(distiller.fit, verbose=0), feeders, steps, epochs
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--steps", type=int, default=6, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=5, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    row = dict(
        backend=keras.backend.backend(), family=args.family, seed=args.seed
    )
    if rows.is_done(PATH, row, KEY):
        return
    ms = measure(args.family, args.steps, args.epochs, args.seed)
    row |= dict(
        ms_prepared=round(ms["prepared"], 2),
        ms_long_prompts=round(ms["long_prompts"], 2),
        ratio=round(ms["long_prompts"] / ms["prepared"], 3),
        steps=args.steps,
        epochs=args.epochs,
        commit=rows.commit(),
        **rows.versions(),
    )
    print(row)
    rows.append_row(PATH, row)


if __name__ == "__main__":
    main()
