"""Requests served by eight devices get what one would give them: data, fsdp and tensor parallel."""

import pytest

import simulated_devices


@pytest.mark.parametrize("arguments", [[], pytest.param(["--all"], marks=pytest.mark.slow)], ids=["2x2x2", "more"])
def test_eight_devices_draw_what_one_draws(arguments):
    found = simulated_devices.run_on_eight("sampling/sharded_sampling.py", *arguments)
    assert len(found) == (9 if arguments else 2)
    for name, one in found.items():
        assert one["same_ids"] and one["log_probs"] < 1e-4 and not one["compiled"], (name, one)
        # Shares compute prefixes apart; still most of what prompts have in common is computed once.
        assert one["prefilled"] < 4 and one["of_all"] < 0.6, (name, one)
