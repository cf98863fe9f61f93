"""A training step on eight devices is the step of one: data, fsdp and tensor parallel, all and adapters alone."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [[], pytest.param(["--all"], marks=pytest.mark.slow)], ids=["2x2x2", "more"])
def test_eight_devices_make_the_step_of_one(arguments):
    """In a process of its own: how many devices there are is fixed when JAX starts."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    script = pathlib.Path(__file__).with_name("sharded_step.py")
    flags["PYTHONPATH"] = str(script.parents[1])
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == (9 if arguments else 3)
    assert max(differences.values()) < 1e-5, differences
