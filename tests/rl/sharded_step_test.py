"""A training step on eight devices is the step of one: data, fsdp and tensor parallel, all and adapters alone."""

import pytest

import simulated_devices


@pytest.mark.parametrize("arguments", [[], pytest.param(["--all"], marks=pytest.mark.slow)], ids=["2x2x2", "more"])
def test_eight_devices_make_the_step_of_one(arguments):
    differences = simulated_devices.run_on_eight("rl/sharded_step.py", *arguments)
    assert len(differences) == (9 if arguments else 3)
    assert max(differences.values()) < 1e-5, differences
