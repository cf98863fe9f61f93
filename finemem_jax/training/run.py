"""Surrounds training with what keeps it safe: display, metrics, checkpoints, signals, limits, evaluations."""

from __future__ import annotations

import contextlib
import pathlib
import resource
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from finemem_jax import build, config
from finemem_jax.build import Components
from finemem_jax.clients.endpoint import EndpointError
from finemem_jax.config.sections import Config
from finemem_jax.evaluation.held_out import HeldOut
from finemem_jax.input_pipeline import Mixture, TrainingOrder
from finemem_jax.rl import records
from finemem_jax.runtime import compilation, files
from finemem_jax.runtime.checkpoint import Checkpoints, Retention
from finemem_jax.runtime.display import Display
from finemem_jax.runtime.distributed import StoppedByPeer
from finemem_jax.runtime.metric_writer import MetricWriter
from finemem_jax.runtime.preemption import Interrupt
from finemem_jax.runtime.watchdog import StopError, Watchdog
from finemem_jax.training import metrics, precompile
from finemem_jax.training.trainer import Groups, StepRewards, Trainer


class Run:
    """One training run in a workdir. A context manager: whatever ends the run, what it has learned is saved.

    Ctrl-C, SIGTERM, servers that do not answer and broken limits leave the `with` block as exceptions; on the way out
    the last whole training step is saved, and the same command goes on from there.

    Attributes:
        display: Shows progress.
        interrupt: Where work looks for signals.
        watchdog: Stops the run on gradients that stay non-finite, or when memory runs out.
    """

    def __init__(self, settings: Config, workdir: pathlib.Path, components: Components, test_streams: Mixture):
        """Opens nothing yet.

        Args:
            test_streams: Held-out streams, for evaluations.
        """
        self._config, self._workdir, self._components = settings, workdir, components
        self._processes = components.processes
        self._began = time.monotonic()
        self.display = Display(settings.train.num_steps, silent=not self._processes.is_first)
        self.interrupt = Interrupt(self._processes)
        self.watchdog = Watchdog(settings, workdir)
        self._held_out = HeldOut(settings, workdir, components, streams=test_streams, display=self.display)
        self._out_of_time = False
        # Of the last whole training step: what is saved when something ends the run.
        self._trainer: Trainer | None = None
        self._step, self._position, self._metrics = 0, {}, {}

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.display)
            self._checkpoints = stack.enter_context(self._open_checkpoints())
            silent = not self._processes.is_first
            self._metric_writer = stack.enter_context(MetricWriter(self._workdir, silent=silent))
            stack.enter_context(self.interrupt)
            stack.enter_context(_polling(self._components, self.interrupt.check))
            # The last in is the first out: it saves while all others are still open.
            stack.push(self._save_if_stopped)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def _open_checkpoints(self) -> Checkpoints:
        train, settings = self._config.train, config.flatten(self._config)
        retention = Retention(train.keep_checkpoints, train.keep_best, train.best_metric)
        return Checkpoints(self._workdir, retention, say=self.display.say, processes=self._processes, config=settings)

    def begin(self, trainer: Trainer, batches: TrainingOrder) -> int:
        """Restores the newest checkpoint, compiles, and makes the evaluation that is due.

        Args:
            trainer: Takes over what the checkpoint holds; from now on its state is what is saved.
            batches: Goes on with the batch after the checkpoint's last one.

        Returns:
            How many training steps are done.
        """
        if trainer.remark:
            self.display.say(trainer.remark)
        step, position = 0, batches.get_state()
        if self._checkpoints.latest is not None:
            trainer.state, step, position = self._checkpoints.restore(trainer.state)
            batches.set_state(position)
            self.display.say(f"continuing {self._workdir} after step {step}")
        self._metric_writer.rewind(step)
        trainer.sync_manager(step)
        self._compiled = compilation.counts()
        self._trainer, self._batches, self._step, self._position = trainer, batches, step, position

        build.warm_up(self._config, self._components, self._compiling)
        if self._config.train.precompile:
            precompile.updates(self._config, self._components, trainer, self._compiling)
            precompile.credit_kernels(self._config, trainer.method)
        if step == 0 and self._config.train.evaluate_first:
            self._held_out.evaluate("before", step)
        elif step < self._config.train.num_steps:
            # A run that was killed in the middle of an evaluation makes up for it.
            self._held_out.evaluate_if_due(step)
        self._step_began = time.monotonic()
        return step

    def _compiling(self, line: str) -> None:
        self.interrupt.check()
        self.display.phase(line)

    def out_of_time(self) -> bool:
        """Whether `train.stop_after_seconds` have passed, in the eyes of all processes."""
        return self._out_of_time

    def record(self, step: int, trajectories: Groups, rewards: StepRewards, losses: dict[str, float]) -> None:
        """Writes down a training step, and saves and evaluates where that is due.

        Args:
            step: Training steps done, this one included.
            losses: What `Trainer.update` returned.

        Raises:
            StopError: memory or gradients have gone beyond their bounds.
            CheckpointError: a checkpoint could not be written.
        """
        self._step, self._position = step, self._batches.get_state()
        # From here on the step counts; until here it could not be given up.
        self.interrupt.updating = False
        train = self._config.train
        self._metrics = self._measure(step, trajectories, rewards, losses)
        self._write(step, trajectories, rewards)
        limit = train.stop_after_seconds
        self._out_of_time = limit > 0 and self._processes.broadcast(time.monotonic() - self._began > limit)
        is_last = step == train.num_steps or self._out_of_time
        if is_last or step % train.checkpoint_every == 0:
            if self._held_out.ranks_checkpoints and not is_last:
                self._held_out.evaluate_if_due(step)
            self._save()
        self.watchdog.check(self._processes)
        if not is_last:
            self._held_out.evaluate_if_due(step)
        elif step < train.num_steps:
            self.display.say(f"stopping after step {step}: train.stop_after_seconds={limit} have passed")
        self._step_began = time.monotonic()

    def finish(self) -> None:
        """Evaluates the manager as it has become."""
        self._held_out.evaluate("after", self._step)

    def _measure(
        self, step: int, trajectories: Groups, rewards: StepRewards, losses: dict[str, float]
    ) -> dict[str, float]:
        """All metrics of a step, by name."""
        found = metrics.of_rewards(*rewards[:3]) | metrics.of_operations(trajectories)
        found |= losses | metrics.of_answers(trajectories) | metrics.of_compilation(self._compiled)
        self._compiled = compilation.counts()
        found["loss/skipped_updates"] = self.watchdog.skipped_in(step - 1)
        found["time/step_seconds"] = time.monotonic() - self._step_began
        found["memory/peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found["memory/host_gigabytes"] = self.watchdog.memory()
        return found

    def _write(self, step: int, trajectories: Groups, rewards: StepRewards) -> None:
        """Trajectories first: a step that stands in metrics.jsonl has them."""
        if self._processes.is_first:
            decode = self._components.tokenizer.decode
            lines = records.trajectories(
                trajectories, rewards.inputs, rewards.rewards, advantages=rewards.advantages, decode=decode
            )
            files.write_records(self._workdir / "trajectories" / f"step_{step:06d}.jsonl.gz", lines)
        self._metric_writer.write(step - 1, self._metrics)
        self.display.step(step - 1, self._metrics)

    def _save(self) -> None:
        """Saves the last whole step."""
        assert self._trainer is not None
        # A step of this process is needed to rank a checkpoint, and an evaluation where these rank.
        ranking = None
        if self._metrics:
            evaluated = self._held_out.newest()
            if evaluated or not self._held_out.ranks_checkpoints:
                ranking = self._metrics | evaluated
        self._checkpoints.save(self._step, self._trainer.state, self._position, metrics=ranking)

    def _save_if_stopped(self, _: object, error: BaseException | None, __: object) -> None:
        """On the way out by a signal, a silent server or a broken limit: saves, and says how to go on."""
        if self._trainer is None or not isinstance(error, (KeyboardInterrupt, EndpointError, StopError)):
            return
        if not isinstance(error, (StoppedByPeer, StopError)):
            # The others wait for this process somewhere; these two have reached all of them already.
            self._processes.stop(f"{type(error).__name__} {error}".strip())
        self._save()
        stopped = {EndpointError: "no answer", StopError: "stopped"}.get(type(error), "interrupted")
        self.display.say(f"{stopped}: step {self._step} is saved; the same command continues from there")


@contextlib.contextmanager
def _polling(components: Components, check: Callable[[], None]) -> Iterator[None]:
    """Has all that work on rollouts look for Ctrl-C and SIGTERM again and again."""
    components.manager.poll = check
    components.answering.set_poll(check)
    try:
        yield
    finally:
        components.manager.poll = lambda: None
        components.answering.set_poll(lambda: None)
