"""Requests served by eight devices get what one would give them: data, fsdp and tensor parallel."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [[], pytest.param(["--all"], marks=pytest.mark.slow)], ids=["2x2x2", "more"])
def test_eight_devices_draw_what_one_draws(arguments):
    """In a process of its own: how many devices there are is fixed when JAX starts."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    script = pathlib.Path(__file__).with_name("sharded_sampling.py")
    flags["PYTHONPATH"] = str(script.parents[1])
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == (7 if arguments else 2)
    for name, one in found.items():
        assert one["same_ids"] and one["log_probs"] < 1e-4, (name, one)
        # Shares compute prefixes apart; still most of what prompts have in common is computed once.
        assert one["prefilled"] < 4 and one["of_all"] < 0.6, (name, one)
