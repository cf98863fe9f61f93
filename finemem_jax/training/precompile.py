"""Compiles before the first step what training will need in any later one, whatever lengths come by then."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax

from finemem_jax.build import Components
from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.memory import build
from finemem_jax.models import logical_axes, sharding
from finemem_jax.models.decoder import Params
from finemem_jax.rl import batching, learner, rewards
from finemem_jax.rl.batching import Batch
from finemem_jax.rl.learner import LearnerOptions, TrainState
from finemem_jax.rl.method import Method, reward_sizes
from finemem_jax.runtime import checksums, compilation
from finemem_jax.runtime.compilation import Call
from finemem_jax.types import Chunk, Completion, Malformed, Memory, Outcome, Status, Step, Stream, Trajectory

# Responses with more are rare, and some rules' arrays for them would take gigabytes.
_MOST_OPERATIONS = 64


def updates(
    config: Config,
    parts: Components,
    options: LearnerOptions,
    tx: optax.GradientTransformation,
    frozen: Params,
    state: TrainState,
    scored: Sequence[tuple[LearnerOptions, Params, bool]],
    say: Callable[[str], None],
) -> None:
    """All micro-batches that there can be, the optimizer, and the checksums of checkpoints.

    Args:
        scored: What else computes log-probabilities: options, parameters, and whether a reference is compared with.
        say: Shows a line about it, in place of the last one.
    """

    def progress(done, total):
        say(f"compiling what updates are computed with: {done} of {total} programs")

    reference, factors = (
        bool(config.objective.kl_weight),
        checks.rule_args(config).type_factor_on == "unclipped",
    )
    temperature = config.rollout.temperature
    learner.warm_up(options, tx, frozen, state, _batches(config, parts, reference, factors), temperature, progress)
    checksums.prepare(state)  # Checkpoints'.
    calls = [
        Call((learner.score, params, batch, np.float32(temperature)), {"options": its_options})
        for its_options, params, compared in scored
        for batch in _batches(config, parts, reference and compared, factors and compared)
    ]
    if calls:
        compilation.prepare_all(calls, progress)


def _batches(config: Config, parts, with_reference, with_factors) -> list[Batch]:
    """Shapes of all micro-batches, and where they are."""
    multiple, max_response = config.train.length_multiple, config.rollout.max_new_tokens
    lengths = build.prompt_lengths(config, parts.environment)
    trunk = batching.trunk_length(lengths.trunk, multiple)
    prompt = lengths.trunk - trunk + lengths.text + lengths.view
    blank = functools.partial(
        batching.blank,
        [[0] * trunk] * logical_axes.size(parts.mesh, logical_axes.ROWS),
        config.train.groups_per_microbatch,
        config.rollout.group_size,
        max_response=max_response,
        pad_id=0,
        with_reference=with_reference,
        with_factors=with_factors,
    )

    def place(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding.rows(parts.mesh, len(array)))

    sizes = batching.all_sizes(prompt, lengths.view, max_response, multiple)
    return [jax.tree.map(place, blank(sizes=size)) for size in sizes]


def credit(config: Config, method: Method) -> None:
    """Rewards, comparisons and their spreading over tokens, for up to so many operations in a response."""
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
