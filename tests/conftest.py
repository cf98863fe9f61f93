"""What holds for all tests: two CPU devices, and no silent rank promotion."""

import os
import pathlib

# Before JAX starts: two devices, so that sharding is exercised; one thread pool is enough for both.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all the time of the tests is compiling; tests that start programs of their own compile the same things again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def source_dir() -> pathlib.Path:
    """Folder of original data files; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("FINEMEM_SOURCE_DIR", pathlib.Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no original data at {folder}; set FINEMEM_SOURCE_DIR to a folder that has some")
    return folder
