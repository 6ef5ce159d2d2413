"""Makes the tables and figures of the project's texts from its rows.

    python -m benchmarks.report

Fills the tables between marks such as `<!-- training_step -->`, and draws the
figures in `benchmarks/results/`. Trains and measures nothing: the other modules
of this folder make the rows.
"""

import pathlib

import keras_laid
from benchmarks import attention_divergence
from benchmarks import rows
from benchmarks import text_windows
from benchmarks.markdown import fill
from benchmarks.markdown import marks
from benchmarks.tables import make_tables
from benchmarks.window_extension import plots as study
from benchmarks.window_extension.tables import SIZES

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = (
    "README.md",
    "benchmarks/mutation_testing.md",
    "benchmarks/text_windows.md",
    "benchmarks/window_extension.md",
    "keras_laid/distillation/README.md",
    "keras_laid/ops/attention_divergence/README.md",
    "keras_laid/ops/attention_output/README.md",
    "keras_laid/ops/logits_divergence/README.md",
    "keras_laid/presets/digits_single_image/README.md",
    "keras_laid/presets/digits_student/README.md",
    "keras_laid/presets/digits_teacher/README.md",
)


def filled(text, tables):
    """The text, with each of its tables made from the rows."""
    for name in marks(text):
        text = fill(text, name, tables[name])
    return text


def draw_guide():
    """Draws the README's picture: the guide's accuracy on its first seed."""
    row = rows.only("guide_runs", method="guide", seed=0)
    accuracy = {
        model: {size: float(row[f"{model}_{size}"]) for size in SIZES}
        for model in ("teacher", "before", "logits", "after")
    }
    windows = {
        model: keras_laid.effective_window(by_size).window
        for model, by_size in accuracy.items()
    }
    keras_laid.haystacks.plot_accuracy(
        rows.RESULTS / "accuracy.png", accuracy, windows, trained_on=20
    )


def main():
    tables = make_tables()
    for name in TEXTS:
        path = ROOT / name
        path.write_text(filled(path.read_text(), tables))
    draw_guide()
    attention_divergence.draw()
    study.draw()
    text_windows.draw()


if __name__ == "__main__":
    main()
