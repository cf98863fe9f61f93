"""Tests of finemem_jax/runtime/watchdog.py: what ends a run before it does harm, and what is left behind."""

import json

import numpy as np
import pytest

import smoke_run
from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.runtime import watchdog
from finemem_jax.runtime.distributed import Processes
from finemem_jax.runtime.watchdog import StopError, Watchdog


def guard(tmp_path, **changes):
    config = config_lib.changed(Config(), {f"train.{name}": value for name, value in changes.items()})
    return Watchdog(config, tmp_path)


def test_only_updates_in_a_row_count(tmp_path):
    watch = guard(tmp_path, max_skipped_updates=3)
    batch = [{"tokens": np.arange(4)}]
    for step, skipped in enumerate([1, 1, 0, 1, 1, 0]):
        watch.observe(step, batch, {"loss/skipped_updates": float(skipped)})
        watch.check(Processes())
        assert watch.skipped_in(step) == skipped
    assert not (tmp_path / "dumps").exists()
    for _ in range(3):
        watch.observe(7, batch, {"loss/skipped_updates": 1.0})
        watch.observe(7, [], {})  # Where there was nothing to learn from.
    assert watch.skipped_in(7) == 3
    with pytest.raises(StopError, match=r"3 updates in a row .*dumps/step_000008\. Lower optimizer.learning_rate"):
        watch.check(Processes())
    np.testing.assert_array_equal(np.load(tmp_path / "dumps" / "step_000008" / "000.npz")["tokens"], np.arange(4))


def test_memory(tmp_path):
    assert 0.01 < guard(tmp_path).memory() < 1000
    guard(tmp_path, max_memory_gigabytes=1000.0).check(Processes())
    with pytest.raises(StopError, match=r"GiB of the host's memory, more than train.max_memory_gigabytes=0.001"):
        guard(tmp_path, max_memory_gigabytes=0.001).check(Processes())


def test_gradients_that_are_not_finite(tmp_path, monkeypatch):
    """One learns nothing from them, and after a few the run ends, with its last good weights saved."""
    monkeypatch.setattr(watchdog.Watchdog, "memory", lambda _: 0.0)
    changes = {
        "train.num_steps": 30, "train.max_skipped_updates": 2, "train.evaluate_first": False, "reader.kind": "evidence",
        # An update so large makes numbers that no float32 can hold.
        "optimizer.learning_rate": 1e38, "optimizer.warmup_steps": 0,
    }  # fmt: skip
    with pytest.raises(StopError, match="not finite"):
        smoke_run.run(tmp_path, smoke_run.config(**changes))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss/skipped_updates"] for line in lines[-2:]] == [1.0, 1.0]
    assert 3 <= len(lines) < 30
    assert list((tmp_path / "dumps" / f"step_{len(lines):06d}").glob("*.npz"))
    assert (tmp_path / "checkpoints" / str(len(lines))).is_dir()
