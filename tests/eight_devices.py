"""Runs a script of the tests on eight simulated devices; shared by the tests of what is sharded."""

import json
import os
import pathlib
import subprocess
import sys


def run(script, *arguments):
    """What a script prints last, as JSON. In a process of its own: how many devices there are is fixed early."""
    path = pathlib.Path(__file__).parent / script
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    flags["PYTHONPATH"] = os.pathsep.join([str(path.parents[2]), str(path.parents[1])])
    command = [sys.executable, path, *arguments]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
