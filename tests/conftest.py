"""What holds for all tests: two CPU devices, no silent rank promotion, and the longest files first."""

import os
import pathlib

import simulated_devices

# Before JAX starts: two devices, so that sharding is exercised; one thread pool is enough for both.
os.environ["XLA_FLAGS"] = simulated_devices.xla_flags(2)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests that start programs of their own compile the same things again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

from finemem_jax.runtime import compilation

jax.config.update("jax_numpy_rank_promotion", "raise")

# Their few tests train models. One worker takes a file at a time, and would be left alone with them at the end.
_FIRST = ("train_test", "sweep_test", "main_test", "sharded_step_test", "experiments_test", "report_test")


def pytest_collection_modifyitems(items):
    """Runs the longest files first; the order of the rest stays."""
    order = {name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# Compiled programs take memory mappings, of which Linux gives a process 65,530 by default; far below, for safety.
_MOST_MAPPINGS = 15_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops the programs of the files so far before there are too many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > _MOST_MAPPINGS:
        compilation._programs.clear()
        jax.clear_caches()


@pytest.fixture(scope="session")
def source_dir() -> pathlib.Path:
    """Folder of original data files; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("FINEMEM_SOURCE_DIR", pathlib.Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no original data at {folder}; set FINEMEM_SOURCE_DIR to a folder that has some")
    return folder
