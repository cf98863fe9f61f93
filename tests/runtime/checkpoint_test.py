"""Tests of finemem_jax/runtime/checkpoint.py."""

import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.rl import learner
from finemem_jax.runtime import checkpoint, checksums
from finemem_jax.runtime.checkpoint import Retention


def state(value=1.0):
    return learner.init({"a": jnp.full((2, 3), value), "b": {"c": jnp.arange(4.0)}}, optax.adam(1e-3))


def test_round_trip(tmp_path):
    with checkpoint.Checkpoints(tmp_path, Retention(2)) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state(7.0), {"next_index": 5})
    with checkpoint.Checkpoints(tmp_path, Retention(2)) as checkpoints:
        restored, step, position = checkpoints.restore(state(0.0))
    assert (step, position) == (3, {"next_index": 5})
    assert isinstance(restored, learner.TrainState)
    jax.tree.map(np.testing.assert_array_equal, restored, state(7.0))


def test_keeps_the_newest(tmp_path):
    with checkpoint.Checkpoints(tmp_path, Retention(2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "3"]


def test_saving_a_step_twice_is_harmless(tmp_path):
    with checkpoint.Checkpoints(tmp_path, Retention(2)) as checkpoints:
        checkpoints.save(1, state(), {})
        checkpoints.save(1, state(), {})
        assert checkpoints.latest == 1


# Reads that Orbax gives up when the first of them fails still come to an end, after their event loop has.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def steps_in(tmp_path):
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith("."))


def save(tmp_path, *steps, **options):
    with checkpoint.Checkpoints(tmp_path, Retention(3), **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(float(step)), {"next_index": step})


def restored(tmp_path):
    """Step, value and position of what is restored, and what was said."""
    said = []
    with checkpoint.Checkpoints(tmp_path, Retention(3), say=said.append) as checkpoints:
        found, step, position = checkpoints.restore(state(0.0))
    jax.tree.map(np.testing.assert_array_equal, found, state(float(step)))
    assert position == {"next_index": step}
    return step, said


def files_of(tmp_path, step):
    """Files of a checkpoint, largest first."""
    files = [path for path in (tmp_path / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: (-path.stat().st_size, path))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 0x10
    path.write_bytes(data)


def test_every_file_may_be_cut_short(tmp_path):
    save(tmp_path / "whole", 1, 2)
    went_back = 0
    for number in range(len(files_of(tmp_path / "whole", 2))):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        path = files_of(folder, 2)[number]
        os.truncate(path, path.stat().st_size // 2)
        # Some files say nothing that is needed. What comes back is right in any case (`restored` looks).
        step, said = restored(folder)
        assert (step == 1) == bool(said)
        went_back += step == 1
        if step == 1:
            assert said[0].startswith("CHECKPOINT 2 IS BROKEN: ") and "broken-2.0" in said[1]
            assert steps_in(folder) == ["1", "broken-2.0"]
            # The run goes on, and writes that checkpoint again.
            save(folder, 2)
            assert restored(folder) == (2, [])
    assert went_back >= 4


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bits(tmp_path, seed):
    save(tmp_path / "whole", 1, 2)
    draw = random.Random(seed)
    data = [n for n, path in enumerate(files_of(tmp_path / "whole", 2)) if path.parent.name == "d"]
    for number in range(10):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        path = files_of(folder, 2)[draw.choice(data)]
        flip(path, draw.randrange(10_000))
        step, said = restored(folder)
        assert (step == 1) == bool(said)


def test_arrays_that_are_not_what_was_saved(tmp_path):
    """Even where each file is whole: as if another checkpoint's arrays had come under this one's name."""
    save(tmp_path, 1, 2, 3)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "3" / "state")
    shutil.copytree(folder / "2" / "state", folder / "3" / "state")
    like = {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}}
    with pytest.raises(ValueError, match=r"checkpoint 3 in .* is broken: params.a is not what was saved"):
        checkpoint.load_params(tmp_path, like)
    step, said = restored(tmp_path)
    assert step == 2 and "params.a" in said[0]
    assert checkpoint.load_params(tmp_path, like)["a"][0, 0] == 2
    (folder / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint 2 in .* is broken: .*Move its folder away"):
        checkpoint.load_params(tmp_path, like)


def test_none_is_good(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    for _ in range(2):  # Nothing was moved: nobody shall begin from the start without knowing.
        with pytest.raises(ValueError, match=r"none of the checkpoints in .*2: .*1: .*another --workdir"):
            restored(tmp_path)
    assert steps_in(tmp_path) == ["1", "2"]


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    right = checksums.checksums
    monkeypatch.setattr(checksums, "checksums", lambda tree: right(tree) | {"params.a": "float32 17"})
    with pytest.raises(checkpoint.CheckpointError, match="params.a reads back as something else.*no older one"):
        save(tmp_path, 1)
    monkeypatch.setattr(checksums, "checksums", right)
    save(tmp_path, 2)
    assert restored(tmp_path) == (2, [])


@pytest.mark.parametrize(("metric", "best"), [("score", "2"), ("-score", "3")])
def test_keeps_the_best(tmp_path, metric, best):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.3, 5: float("nan"), 6: 0.6}
    with checkpoint.Checkpoints(tmp_path, Retention(1, 1, metric)) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state(), {}, metrics={"score": score})
        checkpoints.save(7, state(), {}, metrics=None)
        with pytest.raises(ValueError, match=r"train.best_metric='-?score'.*one of these.*: other"):
            checkpoints.save(8, state(), {}, metrics={"other": 1.0})
    assert steps_in(tmp_path) == [best, "7"]


def test_config_and_versions_are_saved_and_compared(tmp_path, monkeypatch):
    save(tmp_path, 1, config={"seed": 7})
    about = json.loads((tmp_path / "checkpoints" / "1" / "about" / "metadata").read_text())
    assert about["config"] == {"seed": 7} and about["versions"]["jax"] == jax.__version__
    monkeypatch.setattr(checkpoint, "versions", lambda: about["versions"] | {"jax": "99.0"})
    step, (said,) = restored(tmp_path)
    assert step == 1 and f"jax {jax.__version__} → 99.0" in said


def test_checkpoints_without_checksums_are_read(tmp_path):
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "about")
    assert restored(tmp_path) == (1, [])


def test_space(tmp_path, monkeypatch):
    shapes = jax.eval_shape(lambda: jnp.zeros((1024, 1024)))
    assert checkpoint.check_space(tmp_path, shapes, 2) == ""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=70 * 2**20))
    assert "may not fit" in checkpoint.check_space(tmp_path, shapes, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(ValueError, match=r"takes 0.0 GiB.*free some space"):
        checkpoint.check_space(tmp_path, shapes, 2)


def test_nothing_to_restore(tmp_path):
    with checkpoint.Checkpoints(tmp_path, Retention(2)) as checkpoints, pytest.raises(FileNotFoundError):
        checkpoints.restore(state())


def test_claim_and_check(tmp_path):
    config = Config()
    checkpoint.check(tmp_path / "new", config)
    checkpoint.claim(tmp_path / "new", config)
    checkpoint.check(tmp_path / "new", config)
    # How long a run is may change; what it does may not.
    config = config_lib.changed(config, {"train.num_steps": config.train.num_steps + 1})
    checkpoint.check(tmp_path / "new", config)
    config = config_lib.changed(config, {"credit.beta": 0.25})
    with pytest.raises(ValueError, match=r"credit.beta: 0.5 → 0.25(.|\n)*continue_workdir=True"):
        checkpoint.check(tmp_path / "new", config)
    config = config_lib.changed(config, {"train.continue_workdir": True})
    checkpoint.check(tmp_path / "new", config)


def test_unusable_workdir(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.check(tmp_path / "file", Config())
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.check(tmp_path, Config())
