"""Tests of finemem_jax/checkpoint.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finemem_jax import checkpoint, learner
from finemem_jax import config as config_lib


def state(value=1.0):
    return learner.init({"a": jnp.full((2, 3), value), "b": {"c": jnp.arange(4.0)}}, optax.adam(1e-3))


def test_round_trip(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state(7.0), {"next_index": 5})
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        restored, step, position = checkpoints.restore(state(0.0))
    assert (step, position) == (3, {"next_index": 5})
    assert isinstance(restored, learner.TrainState)
    jax.tree.map(np.testing.assert_array_equal, restored, state(7.0))


def test_keeps_the_newest(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "3"]


def test_saving_a_step_twice_is_harmless(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state(), {})
        checkpoints.save(1, state(), {})
        assert checkpoints.latest == 1


def test_nothing_to_restore(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints, pytest.raises(FileNotFoundError):
        checkpoints.restore(state())


def test_claim_and_check(tmp_path):
    config = config_lib.default()
    checkpoint.check(tmp_path / "new", config)
    checkpoint.claim(tmp_path / "new", config)
    checkpoint.check(tmp_path / "new", config)
    # How long a run is may change; what it does may not.
    config.train.num_steps += 1
    checkpoint.check(tmp_path / "new", config)
    config.credit.beta = 0.25
    with pytest.raises(ValueError, match=r"credit.beta: 0.5 → 0.25(.|\n)*continue_workdir=True"):
        checkpoint.check(tmp_path / "new", config)
    config.train.continue_workdir = True
    checkpoint.check(tmp_path / "new", config)


def test_unusable_workdir(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.check(tmp_path / "file", config_lib.default())
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.check(tmp_path, config_lib.default())
