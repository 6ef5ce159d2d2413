"""Sets up what every test depends on."""

import gc
import os
import pathlib
from importlib.metadata import version

# Tests compute little, and two processes share two cores: more threads would
# wait for each other.
for variable in (
    "OMP_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
):
    os.environ.setdefault(variable, "1")

if not pathlib.Path("/dev/nvidia0").exists():
    # Triton reads this when it is imported, which torch may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Tests spend more time compiling than running. XLA ends the process at an
    # unknown flag, and JAX 0.11 no longer has the flag of fusion emitters.
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_multi_thread_eigen=false",
    ]
    if os.environ.get("KERAS_BACKEND") != "jax" or version("jax") < "0.11":
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

import hypothesis
import keras
import pytest

if keras.backend.backend() == "jax":
    import jax

    # Tests compile the same few small models over and over.
    cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# The same examples in each run; HYPOTHESIS_PROFILE=thorough tries more.
for name, count in (("quick", 4), ("thorough", 30)):
    hypothesis.settings.register_profile(
        name,
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure(config):
    keras.config.disable_interactive_logging()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # Addresses differ between processes, so workers would collect other names.
    if addresses := [each.nodeid for each in items if " at 0x" in each.nodeid]:
        raise pytest.UsageError(f"Names must not hold addresses: {addresses}")
    for item in items:
        for mark in item.iter_markers("extra_large_but_on"):
            if keras.backend.backend() not in mark.args:
                item.add_marker("extra_large")
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="takes long: `make test-all`")
    for item in items:
        if "extra_large" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    # Keras collects garbage for each layer that it quantizes. Skip all objects
    # that exist by now.
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(1337)
