"""Makes one training step: rolls out, rewards, and updates the policy.

Three calls a step, in the paper's order; checkpoints, signals and metrics on file are `training.run`'s.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax import build, input_pipeline
from finemem_jax.build import Components
from finemem_jax.config.sections import Config
from finemem_jax.memory.build import prompt_lengths
from finemem_jax.models import logical_axes, lora, sharding
from finemem_jax.models.decoder import Params
from finemem_jax.reading.answering import chunk_share
from finemem_jax.rl import batching, learner, rewards, rollout
from finemem_jax.rl.advantages import Advantages
from finemem_jax.rl.batching import Batch, Group
from finemem_jax.rl.credit_rules import RewardInputs, Rewards
from finemem_jax.rl.learner import Learner, LearnerOptions, TrainState
from finemem_jax.rl.method import Method, reward_sizes, rollout_options, with_likelihoods
from finemem_jax.runtime import compilation
from finemem_jax.runtime.preemption import Interrupt
from finemem_jax.runtime.watchdog import Watchdog
from finemem_jax.training import metrics
from finemem_jax.types import Stream, Trajectory

# Groups of trajectories: groups[s][i] is rollout i of stream s.
Groups = list[list[Trajectory]]
# Log-probabilities of responses under some weights, by (stream, step): an array for each rollout of the group.
LogProbs = dict[tuple[int, int], tuple[np.ndarray, ...]]


class StepRewards(NamedTuple):
    """What the trajectories of a training step earned.

    Attributes:
        inputs: What was measured on them, as arrays.
        rewards: r_t and its terms.
        advantages: A_t, the rewards compared within their groups.
        reference_log_probs: Of every response under the starting weights; {} where nothing is compared with these.
    """

    inputs: RewardInputs
    rewards: Rewards
    advantages: Advantages
    reference_log_probs: LogProbs


class Trainer:
    """Trains a policy, step by step.

    Everything random follows from the seed and the step, so that a step made again gives the same. Where several
    processes train together, each rolls out its share of the streams; from then on all do the same with all of them.

    Attributes:
        method: Credit rule, comparison and objective.
        learner: What stays the same from update to update.
        packing: How responses are packed for updates.
        reference_params: The starting weights without adapters, if anything is compared with them.
        state: The parameters that are trained, and the optimizer's.
        remark: What a user should know of how updates are computed; "" for nothing.
    """

    def __init__(
        self,
        config: Config,
        components: Components,
        *,
        interrupt: Interrupt | None = None,
        watchdog: Watchdog | None = None,
        phase: Callable[[str], None] = lambda _: None,
    ):
        """Takes over the components' parameters: the sampler holds its own copy, the optimizer replaces these.

        Args:
            interrupt: Where a step may be given up; None for nowhere.
            watchdog: Is shown every update.
            phase: Is told what the step is at.

        Raises:
            ValueError: method, attention or mesh cannot be as they are set.
        """
        self._config, self._components = config, components
        self._interrupt = interrupt or Interrupt(components.processes)
        self._watchdog, self._phase = watchdog, phase
        self.method = Method.from_config(config)
        self._sizes, self._sampling = reward_sizes(config), rollout_options(config, evaluation=False)
        compute, self.remark = build.compute(config, components.mesh)
        base_params, trained = lora.split(components.params)
        self.learner = Learner(
            base_params,
            np.float32(config.rollout.temperature),
            LearnerOptions(components.model, compute, self.method.objective),
            learner.make_optimizer(config.optimizer),
        )
        self.packing = batching.Packing(
            num_groups=config.train.groups_per_microbatch,
            length_multiple=config.train.length_multiple,
            max_response=config.rollout.max_new_tokens,
            pad_id=components.tokenizer.end_ids[0],
            aggregation=config.objective.aggregation,
            data_shards=logical_axes.size(components.mesh, logical_axes.ROWS),
            max_shared_prefix=prompt_lengths(config, components.environment).shared_prefix,
        )
        self.reference_params = self._starting_weights(trained)
        self.state: TrainState = learner.init(trained, self.learner.optimizer)
        self._costs: dict[str, float] = {}

    def _starting_weights(self, trained: Params) -> Params | None:
        """What KL terms measure from: the frozen base of the adapters, or a copy as large as the model."""
        if not (self._config.objective.kl_weight or self._config.credit.kl_weight):
            return None
        return self.learner.base_params if self._config.lora.rank else jax.tree.map(jnp.copy, trained)

    @property
    def params(self) -> Params:
        """All parameters of the policy, adapters beside what they adapt."""
        return lora.combine(self.learner.base_params, self.state.params)

    @property
    def scores_policy(self) -> bool:
        """Whether π_old must be computed by the trainer.

        The sampler's log-probabilities are the policy's own only where it may draw any token, with the very weights.
        """
        cut = self._config.rollout.top_k > 0 or self._config.rollout.top_p < 1
        return self._config.objective.importance_cap > 0 or self._config.sampler.int8 or cut

    @property
    def reference_options(self) -> LearnerOptions:
        """As `options`, for the starting weights, which have no adapters."""
        return dataclasses.replace(self.learner.options, model=lora.without(self.learner.options.model))

    def sync_manager(self, step: int) -> None:
        """Gives the manager's sampler the policy's weights, as those after so many training steps."""
        self._components.manager.update(build.policy_params(self._components, self.params), step)

    # ----------------------------------------------------------------------------------
    # Roll out
    # ----------------------------------------------------------------------------------

    def rollout(self, streams: Sequence[Stream], step: int) -> Groups:
        """Rolls out each stream G times: the manager writes chunk by chunk, the reader answers from what it wrote.

        Args:
            streams: This process's share of the batch, fitted to the environment.
            step: Training steps done before this one.

        Returns:
            The groups of all processes, in the order in which one process alone would have them.
        """
        self._phase(f"step {step + 1}: rollouts and reader")
        components = self._components
        # Samplers start as they do in a run that goes on from here: what is sampled is then the same to the last bit.
        components.reset()
        options = with_likelihoods(self._config, self._sampling, step)
        mine = rollout.run(streams, options, components.players, (self._config.seed, "train", step))
        spent = components.manager.take_stats(), components.answering.take_stats(), components.answering.take_metrics()
        shards, managers, readers, others = zip(*components.processes.all_gather((mine, *spent)), strict=True)
        samplers = metrics.of_samplers(metrics.together(managers), metrics.together(readers))
        self._costs = samplers | metrics.mean(others)
        # From here on all processes do the same: what one gave up alone, the others would wait for.
        self._interrupt.updating = components.processes.count > 1
        return input_pipeline.interleave(shards)

    # ----------------------------------------------------------------------------------
    # Reward
    # ----------------------------------------------------------------------------------

    def reward(self, trajectories: Groups, step: int) -> StepRewards:
        """Turns answers and operations into rewards: the chunk reward, the evidence's credit, the group advantages."""
        reference = self._reference_log_probs(trajectories)
        kl = _kl_of_steps(trajectories, reference) if self._config.credit.kl_weight else None
        method, count_tokens = self.method, self._components.environment.count_tokens
        inputs = rewards.to_arrays(trajectories, count_tokens, kl, sizes=self._sizes, needs=method.rule.needs)
        credit = dataclasses.replace(method.credit, likelihood_share=chunk_share(self._config, step))
        return StepRewards(inputs, *rewards.compute(inputs, credit, method.normalizer), reference)

    def _reference_log_probs(self, trajectories: Groups) -> LogProbs:
        """log π_ref of every response, those of groups without a gradient too; {} where no reference is needed."""
        if self.reference_params is None:
            return {}
        shape = (len(trajectories), len(trajectories[0]), max(len(group[0].steps) for group in trajectories))
        nothing = np.zeros((*shape, self._config.rollout.max_new_tokens), np.float32)
        groups = batching.groups(trajectories, nothing, np.ones(shape[::2], bool))
        return self._log_probs(self.reference_options, self.reference_params, groups)

    def _log_probs(self, options: LearnerOptions, params: Params, groups: Sequence[Group]) -> LogProbs:
        """log π of all response tokens of some groups, under given weights."""
        found: LogProbs = {}
        for batch, packed in batching.microbatches(groups, self.packing):
            self._interrupt.check_together()
            arguments = params, self._place(batch), self.learner.temperature
            scored = compilation.call(learner.score, *arguments, options=options)
            rows = iter(sharding.whole(scored))
            for group in packed:
                found[group.stream, group.step] = tuple(next(rows)[: len(step.completion.ids)] for step in group.steps)
        return found

    # ----------------------------------------------------------------------------------
    # Update
    # ----------------------------------------------------------------------------------

    def update(self, trajectories: Groups, step_rewards: StepRewards, step: int) -> dict[str, float]:
        """Updates the policy by GRPO, and gives the manager its new weights.

        Until the first optimizer update, the step can be given up (`interrupt`), and nothing has changed. After it the
        step is finished, and whoever records it says so (`Interrupt.updating`).

        Returns:
            Metrics of the rollouts' costs, of the objective, and of how long it took.
        """
        groups = self._groups(trajectories, step_rewards)
        self._phase(f"step {step + 1}: update")
        began = time.monotonic()
        losses: dict[str, float] = {}
        # The sampler's copy is about to be out of date, and the update needs the memory.
        self._components.manager.offload()
        for number, minibatch in enumerate(self._minibatches(groups, step)):
            batches = self._until_updating(minibatch) if number == 0 else minibatch
            self.state, measured = learner.update(self.learner, self.state, batches)
            if self._watchdog is not None:
                self._watchdog.observe(step, minibatch, measured)
            losses = metrics.of_sampler_difference(groups, measured) | losses | measured
        self.sync_manager(step + 1)
        return losses | self._costs | {"time/update_seconds": time.monotonic() - began}

    def _groups(self, trajectories: Groups, step_rewards: StepRewards) -> list[Group]:
        """The groups to train on, with all that the objective compares the policy with."""
        alive = step_rewards.advantages.alive
        advantages, factors = rewards.per_token(trajectories, step_rewards.advantages, self._sizes.tokens)
        groups = batching.groups(
            trajectories,
            advantages,
            alive if self._config.objective.drop_dead_groups else np.ones_like(alive),
            drop_truncated=self._config.objective.drop_truncated,
            unclipped_factors=factors if self.method.credit.type_factor_on == "unclipped" else None,
        )
        if self._config.objective.kl_weight:
            reference = step_rewards.reference_log_probs
            groups = [group._replace(reference_log_probs=reference[group.stream, group.step]) for group in groups]
        if self.scores_policy:
            old = self._log_probs(self.learner.options, self.params, groups)
            groups = [group._replace(old_log_probs=old[group.stream, group.step]) for group in groups]
        return groups

    def _until_updating(self, minibatch: Iterable[Batch]) -> Iterator[Batch]:
        """The micro-batches of a step's first update, which can be given up as long as it only adds up gradients."""
        for batch in minibatch:
            self._interrupt.check_together()
            yield batch
        self._interrupt.check_together()
        self._interrupt.updating = True

    def _minibatches(self, groups: Sequence[Group], step: int) -> Iterator[list[Batch]]:
        """The optimizer updates of one training step, each as a list of micro-batches. At least one, maybe empty."""
        for epoch in range(self._config.train.epochs):
            shuffled = list(groups)
            random.Random(f"{self._config.seed}/{step}/{epoch}").shuffle(shuffled)
            size = max(1, math.ceil(len(shuffled) / self._config.train.minibatches))
            for start in range(0, max(len(shuffled), 1), size):
                packed = batching.microbatches(shuffled[start : start + size], self.packing)
                yield [self._place(batch) for batch, _ in packed]

    def _place(self, batch: Batch) -> Batch:
        """A batch on the devices, its groups spread over those that share out rows."""
        mesh = self._components.mesh
        return jax.tree.map(lambda array: sharding.put(array, sharding.rows(mesh, len(array))), batch)


def _kl_of_steps(trajectories: Groups, reference: LogProbs) -> list[list[list[float]]]:
    """[s][i][t]: Σ over a response's tokens of log π_old - log π_ref, the k1 estimate of the KL divergence, in nats."""
    return [
        [
            [sum(step.completion.log_probs) - float(reference[s, t][i].sum()) for t, step in enumerate(one.steps)]
            for i, one in enumerate(rollouts)
        ]
        for s, rollouts in enumerate(trajectories)
    ]
