"""Trains a memory manager: the loop, and what is prepared for it."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable

import jax

from finemem_jax import build, input_pipeline
from finemem_jax.build import Components
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import evaluate
from finemem_jax.evaluation.held_out import read_evaluations
from finemem_jax.input_pipeline import Mixture
from finemem_jax.rl import learner
from finemem_jax.runtime import checkpoint
from finemem_jax.runtime.display import print_table
from finemem_jax.runtime.distributed import Processes
from finemem_jax.training.run import Run
from finemem_jax.training.trainer import Trainer


def train(
    config: Config, workdir: pathlib.Path, components: Components, *, train_streams: Mixture, test_streams: Mixture
) -> None:
    """Trains the manager, from the workdir's newest checkpoint if it has one.

    Where several processes train together, each calls this; the first one writes.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM (`Terminated`), once a checkpoint is saved.
        EndpointError: servers that answer questions do not; likewise.
        StopError: the host's memory or the gradients have gone beyond their bounds; likewise.
        PeerError: another process is missing or has failed.
        OSError: something cannot be written; checkpoints are as they were.
    """
    with Run(config, workdir, components, test_streams) as run:
        trainer = Trainer(config, components, interrupt=run.interrupt, watchdog=run.watchdog, phase=run.display.phase)
        batches = input_pipeline.batches(config, components.environment, train_streams, processes=components.processes)
        step = run.begin(trainer, batches)
        while step < config.train.num_steps and not run.out_of_time():
            trajectories = trainer.rollout(next(batches), step)  # G rollouts a stream: policy, memory, reader.
            rewards = trainer.reward(trajectories, step)  # Chunk reward, evidence credit, group advantage.
            losses = trainer.update(trajectories, rewards, step)  # GRPO.
            step += 1
            run.record(step, trajectories, rewards, losses)
        run.finish()


def prepare(
    config: Config, workdir: pathlib.Path, processes: Processes, stack: contextlib.ExitStack
) -> Callable[[], list[str]]:
    """Builds and checks all that a wrong setting or file can break; returns the training itself.

    Args:
        stack: Closes what was opened, when the program ends.

    Returns:
        A function that trains, shows the held-out scores before and after, and returns the lines to end with.

    Raises:
        ValueError: settings, files or workdir cannot be used as they are; nothing has been written.
    """
    # The workdir is claimed before the minutes of loading, and written to only if it is ours.
    checkpoint.check(workdir, config)
    components = build.build(config, workdir, processes)
    stack.callback(components.answering.close)
    train_streams = input_pipeline.streams(config, "train", components.environment)
    test_streams = input_pipeline.streams(config, "test", components.environment)
    build.check(config, components, train_streams, test_streams)
    kept = config.train.keep_checkpoints + config.train.keep_best
    shapes = learner.state_shapes(components.params, learner.make_optimizer(config.optimizer))
    warning = checkpoint.check_space(workdir, shapes, kept)
    if processes.is_first:
        checkpoint.claim(workdir, config)

    def work() -> list[str]:
        if processes.is_first:
            if warning:
                print(f"finemem_jax: {warning}", file=sys.stderr)
            print(_opening_line(config, workdir, components, train_streams, test_streams), flush=True)
        with processes.explaining():
            train(config, workdir, components, train_streams=train_streams, test_streams=test_streams)
        return _closing_lines(config, workdir) if processes.is_first else []

    return work


def _opening_line(
    config: Config, workdir: pathlib.Path, components: Components, train_streams: Mixture, test_streams: Mixture
) -> str:
    """What is about to be trained, on what."""
    of_processes = f" of {components.processes.count} processes" if components.processes.count > 1 else ""
    return (
        f"{config.experiment}: {components.model.num_parameters / 1e6:.0f}M parameters on {jax.device_count()} "
        f"{jax.devices()[0].platform} device(s){of_processes} · {config.data.name}: {len(train_streams)} training "
        f"and {len(test_streams)} held-out streams · workdir {workdir}"
    )


def _closing_lines(config: Config, workdir: pathlib.Path) -> list[str]:
    """Shows the table of evaluations; returns where to look next."""
    summaries = read_evaluations(workdir)
    names = [name for name in ("before", "after") if name in summaries] or list(summaries)[-1:]
    print_table(config.experiment, *evaluate.table({name: summaries[name] for name in names}))
    return [
        "± is one standard error over streams; the difference is paired, stream by stream.",
        f"metrics        {workdir}/metrics.jsonl   (tensorboard --logdir {workdir})",
        f"trajectories   {workdir}/trajectories/   every prompt, operation, reward and advantage",
        f"evaluation     {workdir}/evaluation.json, {workdir}/evaluations/",
        f"checkpoints    {workdir}/checkpoints/   the same command with a larger --config.train.num_steps goes on",
    ]
