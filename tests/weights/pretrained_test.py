"""Tests of finding weights, above all those that another run has trained."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import smoke_run
from finemem_jax.models import lora, sharding
from finemem_jax.weights import pretrained

ONE_STEP = {"train.num_steps": 1, "data.num_test": 1, "data.num_train": 4}


@pytest.fixture(scope="module", params=[0, 2], ids=["all parameters", "adapters"])
def run(request, tmp_path_factory):
    """A workdir, and the config that trained it for a step."""
    workdir = tmp_path_factory.mktemp("run")
    settings = smoke_run.config(**ONE_STEP, **{"lora.rank": request.param})
    smoke_run.run(workdir, settings)
    return workdir, settings


def saved_params(workdir):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return jax.device_get(checkpointer.restore(workdir / "checkpoints" / "1" / "state")["params"])


def from_run(workdir, **changes):
    return smoke_run.config(**{"model.weights": str(workdir), "model.name": "auto"} | changes)


def mesh():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # By the test's own reading.
def test_a_run_goes_on_from_what_another_has_trained(run):
    """Adapters arrive merged, so that the next run may train all parameters, or adapters of its own."""
    workdir, settings = run
    found = pretrained.find(from_run(workdir))
    assert found.model == pretrained.find(settings).model
    got, saved = found.params(mesh()), saved_params(workdir)
    if settings.lora.rank:
        base = pretrained.find(settings).params(mesh())
        saved = lora.merge(pretrained.shape(settings), lora.combine(base, saved))
    jax.tree.map(np.testing.assert_array_equal, got, saved)
    began = pretrained.find(settings).params(mesh())
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(began), strict=True))


def test_parameters_are_cast_and_placed(run):
    devices = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
    got = pretrained.find(from_run(run[0], **{"model.param_dtype": "bfloat16"})).params(devices)
    assert {x.dtype.name for x in jax.tree.leaves(got)} == {"bfloat16"}
    assert got["layers"]["gate"].sharding.num_devices == 2


def test_another_shape_is_refused(run):
    with pytest.raises(ValueError, match="model.name"):
        pretrained.find(from_run(run[0], **{"model.name": "smollm2_135m"}))


def test_a_broken_workdir_is_named(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "copy")
    (workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read .* --workdir of a whole run"):
        pretrained.find(from_run(workdir))
    (workdir / "config.json").write_text(json.dumps({"model.name": "tiny", "model.weights": str(workdir)}))
    with pytest.raises(ValueError, match="began with its own weights"):
        pretrained.find(from_run(workdir))
    shutil.copy(run[0] / "config.json", workdir)
    shutil.rmtree(workdir / "checkpoints" / "1")
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        pretrained.find(from_run(workdir)).params(mesh())


def test_other_parameters_than_the_config_says_are_refused(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "copy")
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | {"lora.rank": 3}))
    with pytest.raises(
        ValueError, match=r"model.weights=.*other parameters .*: params\[.*\] is .* in the checkpoint, and "
    ):
        pretrained.find(from_run(workdir)).params(mesh())
