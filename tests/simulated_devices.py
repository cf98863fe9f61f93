"""Simulated devices, and the cheapest of XLA's ways to compile for CPUs; shared by tests that start programs."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

_TESTS = pathlib.Path(__file__).parent
# Nearly all the time of the tests is compiling, and their arrays are small. Without LLVM's optimizations a training
# step compiles in half the time, and without MLIR's fusion emitters in a fifth of that. Releases of jaxlib from 0.11
# on have no other emitters, and refuse flags that they do not know.
_FAST_COMPILATION = ["--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")


def xla_flags(num_devices: int) -> str:
    """Returns flags for so many CPU devices, beside those of the environment, which are not overruled."""
    given = os.environ.get("XLA_FLAGS", "")
    fast = [flag for flag in _FAST_COMPILATION if flag.partition("=")[0] not in given]
    return " ".join([given, *fast, f"--xla_force_host_platform_device_count={num_devices}"]).strip()


def environment(num_devices: int, **variables: str) -> dict[str, str]:
    """Returns the environment of a program that has so many devices, and imports helpers of the tests."""
    path = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    return os.environ | {"XLA_FLAGS": xla_flags(num_devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | variables


def run_on_eight(script: str, *arguments: str):
    """Returns what a script prints last, read as JSON. In a process of its own: JAX counts its devices only once."""
    command = [sys.executable, str(_TESTS / script), *arguments]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
