"""Distils a pair of presets by a recipe.

    KERAS_BACKEND=jax python -m keras_laid.distill recipe.toml

Writes to the recipe's folder `output`: the state of training, from which the
same command resumes; `losses.csv` and `terms.png`; the accuracy before and
after, with plots, if the recipe has an `[evaluation]`; and `student`, a plain
KerasHub preset.
"""

import argparse

from keras_laid.distill.recipe import read_recipe
from keras_laid.distill.run import distill


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m keras_laid.distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a TOML file")
    recipe = read_recipe(parser.parse_args().recipe)
    accuracy = distill(recipe)
    print(f"\nThe student's preset and all results are in {recipe.output}")
    for name, by_size in accuracy.items():
        cells = "  ".join(f"{size}: {a:.3f}" for size, a in by_size.items())
        print(f"{name:<8} accuracy by images  {cells}")


if __name__ == "__main__":
    main()
