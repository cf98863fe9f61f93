"""Evaluates a manager on held-out streams while it trains, and keeps the results in the workdir."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from finemem_jax import input_pipeline
from finemem_jax.build import Components
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import evaluate
from finemem_jax.input_pipeline import Mixture
from finemem_jax.rl import records
from finemem_jax.rl.method import rollout_options
from finemem_jax.runtime import files
from finemem_jax.runtime.display import Display


class HeldOut:
    """Evaluations of one run: greedy rollouts on all held-out streams, shared out among the processes.

    Each stands in `evaluation.json` under its name ("before", "step 40", "after"), its trajectories in `evaluations/`;
    one that is there for the same training step is not made again.
    """

    def __init__(
        self, config: Config, workdir: pathlib.Path, components: Components, *, streams: Mixture, display: Display
    ):
        """Evaluates nothing yet.

        Args:
            streams: All held-out streams, fitted to the environment.
            display: Is told what is going on, and the results.
        """
        self._config, self._workdir, self._components = config, workdir, components
        self._streams, self._display = streams, display

    def evaluate(self, name: str, step: int) -> None:
        """Plays all held-out streams with the manager as it is, unless that was done.

        Args:
            name: Of the evaluation.
            step: Training steps behind the manager's weights.
        """
        components = self._components
        if components.processes.broadcast(read_evaluations(self._workdir).get(name, {}).get("step") == step):
            return
        self._display.phase(f"evaluating on held-out streams ({name})")
        components.reset()
        options = rollout_options(self._config, evaluation=True, constraint=components.constraint)
        mine = [
            self._streams[i] for i in range(components.processes.index, len(self._streams), components.processes.count)
        ]
        trajectories = input_pipeline.interleave(
            components.processes.all_gather(
                evaluate.run(mine, options, components.players, key=(self._config.seed, "evaluate"))
            )
        )
        # What evaluation generated must not count among the next training step's tokens.
        components.manager.take_stats()
        components.answering.take_stats()
        components.answering.take_metrics()
        if not components.processes.is_first:
            return
        lines = (records.evaluated(trajectory, components.tokenizer.decode) for trajectory in trajectories)
        files.write_records(self._workdir / "evaluations" / f"{name.replace(' ', '_')}.jsonl.gz", lines)
        found = read_evaluations(self._workdir)
        found |= {name: {"step": step, **evaluate.summary(trajectories, components.environment)}}
        files.replace_text(self._workdir / "evaluation.json", json.dumps(found, indent=1) + "\n")
        means = found[name]["estimates"]
        shown = " · ".join(
            f"{title} {means[metric]['mean']:.3f}" for metric, title in evaluate.METRICS.items() if means[metric]["n"]
        )
        self._display.say(f"held-out, {name}: {shown}")

    def evaluate_if_due(self, step: int) -> None:
        """Evaluates after every `train.evaluate_every` training steps."""
        every = self._config.train.evaluate_every
        if step and every and step % every == 0:
            self.evaluate(f"step {step}", step)

    @property
    def ranks_checkpoints(self) -> bool:
        """Whether the best checkpoints are those that are best on held-out streams."""
        train = self._config.train
        return train.keep_best > 0 and train.best_metric.removeprefix("-").startswith("evaluation/")

    def newest(self) -> dict[str, float]:
        """Means of the newest evaluation, as "evaluation/…"; {} if there is none. The same in all processes."""
        evaluations = sorted(read_evaluations(self._workdir).values(), key=lambda one: one["step"])
        estimates = self._components.processes.broadcast(evaluations[-1]["estimates"] if evaluations else {})
        return {f"evaluation/{name}": one["mean"] for name, one in estimates.items() if one["mean"] is not None}


def read_evaluations(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the workdir's `evaluation.json`, by names of evaluations; empty if there is none."""
    return files.read_json(workdir / "evaluation.json", "delete it to evaluate again")
