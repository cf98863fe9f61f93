"""Compiles before the first step what training will need in any later one, whatever lengths come by then."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import numpy as np

from finemem_jax.build import Components
from finemem_jax.config.sections import Config
from finemem_jax.memory import build
from finemem_jax.models import sharding
from finemem_jax.rl import batching, learner, rewards
from finemem_jax.rl.batching import Batch
from finemem_jax.rl.method import Method, reward_sizes
from finemem_jax.runtime import checksums, compilation
from finemem_jax.runtime.compilation import Call
from finemem_jax.training.trainer import Trainer
from finemem_jax.types import Chunk, Completion, Malformed, Memory, Outcome, Status, Step, Stream, Trajectory

# Responses with more are rare, and some rules' arrays for them would take gigabytes.
_MOST_OPERATIONS = 64


def updates(config: Config, components: Components, trainer: Trainer, say: Callable[[str], None]) -> None:
    """Compiles all micro-batches that there can be, the optimizer, and the checksums of checkpoints.

    Args:
        say: Shows a line about it, in place of the last one.
    """

    def progress(done: int, total: int) -> None:
        say(f"compiling what updates are computed with: {done} of {total} programs")

    reference, factors = bool(config.objective.kl_weight), trainer.method.credit.type_factor_on == "unclipped"
    lengths, packing = build.prompt_lengths(config, components.environment), trainer.packing
    shared_prefix = [0] * packing.shared_prefix_length(lengths.shared_prefix)
    prompt = lengths.shared_prefix - len(shared_prefix) + lengths.text + lengths.view
    sizes = batching.all_sizes(packing, config.rollout.group_size, prompt=prompt, suffix=lengths.view)

    def place(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding.rows(components.mesh, len(array)))

    def batches(with_reference: bool, with_factors: bool) -> list[Batch]:
        """Lists the shapes of all micro-batches, and where they are."""
        given = {"with_reference": with_reference, "with_factors": with_factors}
        return [jax.tree.map(place, batching.blank(packing, shared_prefix, size, **given)) for size in sizes]

    learner.warm_up(trainer.learner, trainer.state, batches(reference, factors), say=progress)
    checksums.prepare(trainer.state)  # Checkpoints'.
    # Log-probabilities without gradients: of the starting weights, and of the policy where the sampler's do not count.
    scored = []
    if trainer.reference_params is not None:
        scored.append((trainer.reference_options, trainer.reference_params, batches(False, False)))
    if trainer.scores_policy:
        scored.append((trainer.learner.options, trainer.params, batches(reference, factors)))
    calls = [
        Call((learner.score, params, batch, trainer.learner.temperature), {"options": options})
        for options, params, shapes in scored
        for batch in shapes
    ]
    if calls:
        compilation.prepare_all(calls, progress)


def credit_kernels(config: Config, method: Method) -> None:
    """Compiles rewards, comparisons and their spreading over tokens, for up to so many operations in a response."""
    sizes, most = reward_sizes(config), min(config.rollout.max_new_tokens, _MOST_OPERATIONS)
    counts = itertools.takewhile(lambda n: n < 2 * most, (sizes.operations * 2**i for i in itertools.count()))
    for count in counts:
        nothing = Outcome(Malformed("", ""), Status.MALFORMED)
        step = Step((), (), Completion((), (), "stop", 0), (nothing,) * count, Memory())
        stream = Stream("", "", (Chunk(""),))
        groups = [[Trajectory(stream, i, (step,)) for i in range(config.rollout.group_size)]]
        groups *= config.rollout.streams_per_step
        kl = [[[0.0]] * len(group) for group in groups] if config.credit.kl_weight else None
        inputs = rewards.to_arrays(groups, len, kl, sizes=sizes, needs=method.rule.needs)
        _, advantages = rewards.compute(inputs, method.credit, method.normalizer)
        rewards.per_token(groups, advantages, sizes.tokens)
