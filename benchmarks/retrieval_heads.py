"""How much each head of the embedded teacher looks at the needle.

    KERAS_BACKEND=jax python -m benchmarks.retrieval_heads

Appends a row for each head to `benchmarks/results/retrieval_heads.csv`, with
the numbers that `keras_laid.find_retrieval_heads` measures on questions about
five images. The two seeds share no question. Seeds that already have rows are
skipped.
"""

import keras_hub
import numpy as np

import keras_laid
from benchmarks import rows

PATH = rows.RESULTS / "retrieval_heads.csv"
SEEDS = (0, 1)
BATCHES, BATCH_SIZE, IMAGES = 25, 40, 5
STATISTICS = ("mass", "sharpness", "selectivity", "needle")


def main():
    teacher = keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm(
        keras_hub.models.PaliGemmaCausalLM.from_preset(
            keras_laid.presets.TEACHER
        )
    )
    for seed in SEEDS:
        if rows.is_done(PATH, dict(seed=seed), ["seed"]):
            continue
        questions = keras_laid.Haystacks(
            keras_laid.Digits("train"),
            teacher.preprocessor,
            BATCHES * BATCH_SIZE,
            sizes=(IMAGES,),
            batch_size=BATCH_SIZE,
            seed=seed,
        )
        found = keras_laid.find_retrieval_heads(
            teacher, questions, batches=BATCHES
        )
        print(found.table(count=16), flush=True)
        for layer, head in np.ndindex(found.score.shape):
            statistics = {
                name: round(
                    float(getattr(found.by_rows["text"], name)[layer, head]), 4
                )
                for name in STATISTICS
            }
            rows.append_row(
                PATH,
                dict(
                    seed=seed,
                    layer=layer,
                    head=head,
                    **statistics,
                    chosen=(layer, head) in found.heads,
                    questions=BATCHES * BATCH_SIZE,
                    images=IMAGES,
                    commit=rows.commit(),
                    **rows.versions(),
                ),
            )


if __name__ == "__main__":
    main()
