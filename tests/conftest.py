"""Sets up what every test depends on."""

import pathlib

import keras
import pytest

if keras.backend.backend() == "jax":
    import jax

    # Tests compile the same few small models over and over.
    cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config):
    keras.config.disable_interactive_logging()


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="trains for minutes: `make test-all`")
    for item in items:
        if "extra_large" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(1337)
