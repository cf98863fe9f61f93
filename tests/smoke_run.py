"""Runs the smoke experiment in this process; shared by tests of programs."""

import contextlib
import pathlib

from experiments import smoke
from finemem_jax import build, input_pipeline
from finemem_jax import config as config_lib
from finemem_jax.runtime import checkpoint
from finemem_jax.training import train


def config(**changes):
    """The smoke config with dotted settings changed: config(**{"train.num_steps": 2})."""
    return config_lib.changed(config_lib.parse(smoke.get_config()), changes)


def prepare(settings, workdir=None):
    """What `main` prepares before it calls `train`."""
    parts = build.build(settings, workdir)
    splits = [input_pipeline.streams(settings, split, parts.environment) for split in ("train", "test")]
    return parts, *splits


def run(workdir: pathlib.Path, settings) -> None:
    """Trains in `workdir`."""
    checkpoint.check(workdir, settings)
    parts, train_streams, test_streams = prepare(settings, workdir)
    with contextlib.closing(parts.answering):
        checkpoint.claim(workdir, settings)
        train.train(settings, workdir, parts, train_streams=train_streams, test_streams=test_streams)
