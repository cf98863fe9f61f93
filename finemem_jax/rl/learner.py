"""Updates the policy: train state, gradients of one micro-batch, one optimizer update. Pure and jitted.

Knows nothing of text, rollouts or rewards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from finemem_jax.config.sections import Optimizer
from finemem_jax.models import decoder, log_probs, lora, sharding
from finemem_jax.models.decoder import Compute, Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.rl import grpo
from finemem_jax.rl.batching import Batch
from finemem_jax.rl.grpo import ObjectiveOptions
from finemem_jax.runtime import compilation
from finemem_jax.runtime.compilation import Call


@dataclasses.dataclass(frozen=True)
class LearnerOptions:
    """Static settings of an update; part of the compilation key."""

    model: DecoderConfig
    compute: Compute
    objective: ObjectiveOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """What stays the same from update to update.

    A pytree, so that jitted functions take it whole: arrays are its leaves, the rest is part of the compilation key.

    Attributes:
        base_params: What is not trained: with LoRA the model itself, otherwise {}.
        temperature: Of the sampled responses, whose log-probabilities are computed at it.
    """

    base_params: Params
    temperature: Any
    options: LearnerOptions = dataclasses.field(metadata={"static": True})
    optimizer: optax.GradientTransformation = dataclasses.field(metadata={"static": True})


class TrainState(NamedTuple):
    """What training changes. With LoRA `params` are the adapters alone (`lora.split`)."""

    params: Params
    opt_state: Any
    updates: jax.Array


class Sums(NamedTuple):
    """Sums over micro-batches."""

    gradients: Params
    objective: grpo.Objective
    diagnostics: grpo.Diagnostics


def init(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    where: Any = state_shardings(params, optimizer)
    opt_state = jax.jit(optimizer.init, out_shardings=where.opt_state)(params)
    return TrainState(params, opt_state, sharding.put(np.zeros((), np.int32), where.updates))


def state_shapes(params: Params, optimizer: optax.GradientTransformation) -> Any:
    """Shapes of what training changes: the trained parameters, and what the optimizer keeps of them.

    Args:
        params: All parameters, adapters included.
    """
    return jax.eval_shape(lambda trained: (trained, optimizer.init(trained)), lora.split(params)[1])


def state_shardings(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns where a state lives: moments are sharded like their parameters; all else is on every device.

    Args:
        params: Arrays, or their shapes with shardings.
    """
    shardings = jax.tree.map(lambda x: x.sharding, params)
    some = jax.tree.leaves(shardings)[0]
    everywhere = NamedSharding(some.mesh, PartitionSpec()) if isinstance(some, NamedSharding) else some
    placed = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    where: Any = everywhere
    return TrainState(shardings, placed, where)


def response_log_probs(
    options: LearnerOptions, params: Params, batch: Batch, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes log π_θ and entropy of every response token, [R, A] each; meaningless where the mask is 0."""
    hidden = decoder.hidden_states(
        options.model,
        params,
        [batch.shared_prefix, batch.group_prefix, batch.suffix],
        lengths=[batch.shared_prefix_length, batch.group_prefix_length, batch.suffix_length],
        compute=options.compute,
    )[-1]
    # The state at one position predicts the token at the next; only predicted positions meet the output head.
    rows, width = batch.response.shape
    positions = jnp.minimum((batch.response_start - 1)[:, None] + jnp.arange(width)[None], hidden.shape[1] - 1)
    states = jnp.take_along_axis(hidden, positions[:, :, None], axis=1).reshape(rows * width, -1)
    head = decoder.output_head(options.model, params)
    chosen, entropy = log_probs.token_log_probs(
        states,
        head.astype(states.dtype),
        batch.response.reshape(-1),
        temperature=temperature,
        plan=log_probs.Plan(mesh=options.compute.mesh),
    )
    return chosen.reshape(rows, width), entropy.reshape(rows, width)


@functools.partial(jax.jit, static_argnames="options")
def score(params: Params, batch: Batch, temperature: jax.Array, *, options: LearnerOptions) -> jax.Array:
    """Computes log π of every response token, [R, A], without gradients: of the old policy, or of a reference.

    Args:
        params: All of them, adapters included.
    """
    return response_log_probs(options, params, batch, temperature)[0]


@functools.partial(jax.jit, static_argnames="options")
def zero_sums(params: Params, *, options: LearnerOptions) -> Sums:
    """Returns the sums over no micro-batch. Gradients are summed in float32, whatever the parameters are stored in."""
    zero = jnp.zeros(())
    diagnostics = grpo.Diagnostics(*(zero for _ in grpo.Diagnostics._fields))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    return Sums(_as_stored(options, zeros), grpo.Objective(zero, zero), diagnostics)


@functools.partial(jax.jit, donate_argnames="sums")
def accumulate(learner: Learner, params: Params, sums: Sums, batch: Batch) -> Sums:
    """Adds one micro-batch to `sums`: the gradient with respect to `params`, those that are trained."""
    options = learner.options

    def loss(params: Params) -> tuple[Any, tuple[grpo.Objective, grpo.Diagnostics]]:
        chosen, entropy = response_log_probs(
            options, lora.combine(learner.base_params, params), batch, learner.temperature
        )
        objective, diagnostics = grpo.clipped_objective(chosen, entropy, batch.rows, options.objective)
        return -objective.numerator, (objective, diagnostics)

    gradients, (objective, diagnostics) = jax.grad(loss, has_aux=True)(params)
    new = Sums(_as_stored(options, gradients), objective, diagnostics)
    largest = jnp.maximum(sums.diagnostics.largest_log_ratio, diagnostics.largest_log_ratio)
    total = jax.tree.map(jnp.add, sums, new)
    return total._replace(diagnostics=total.diagnostics._replace(largest_log_ratio=largest))


def _as_stored(options: LearnerOptions, gradients: Params) -> Params:
    """Splits gradients over the mesh as their parameters are: each device keeps only what it will update."""
    mesh = options.compute.mesh
    if mesh is None or mesh.size == 1:
        return gradients
    wanted = lora.split(sharding.param_shardings(options.model, mesh))[1]
    return jax.lax.with_sharding_constraint(gradients, wanted)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def apply(state: TrainState, sums: Sums, *, optimizer: optax.GradientTransformation) -> tuple[TrainState, jax.Array]:
    """Does one optimizer update with the mean gradient; returns the new state and the gradient's norm.

    The division by the objective's denominator happens here, after all micro-batches, so that how rows were split
    changes nothing. Where gradient or objective are not finite, the state stays as it is.
    """
    gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.objective.denominator, 1), sums.gradients)
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.global_norm(gradients)
    updated = state._replace(params=params, opt_state=opt_state, updates=state.updates + 1)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums.objective.numerator)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state), norm


def warm_up(learner: Learner, state: TrainState, batches: Iterable[Batch], *, say: Callable[[int, int], None]) -> None:
    """Compiles what `update` needs for batches of these shapes.

    Args:
        batches: Shapes with shardings.
        say: See `compilation.prepare_all`.
    """
    options = learner.options
    zero: Any = compilation.prepare(zero_sums, state.params, options=options)
    shapes = jax.eval_shape(functools.partial(zero_sums, options=options), state.params)
    sums = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, zero.output_shardings
    )
    calls = [Call((apply, state, sums), {"optimizer": learner.optimizer})]
    calls += [Call((accumulate, learner, state.params, sums, batch), {}) for batch in batches]
    compilation.prepare_all(calls, say)


def update(learner: Learner, state: TrainState, batches: Iterable[Batch]) -> tuple[TrainState, dict[str, float]]:
    """Does one optimizer update over several micro-batches; no batch leaves the state as it is.

    Returns:
        The new state, and metrics; "loss/skipped_updates" is 1 where the gradient was not finite, and the state is as
        it was.
    """
    sums = None
    for batch in batches:
        if sums is None:
            sums = compilation.call(zero_sums, state.params, options=learner.options)
        sums = compilation.call(accumulate, learner, state.params, sums, batch)
        # Not all at once: whoever makes the batches may give the update up between two of them.
        jax.block_until_ready(sums.diagnostics.tokens)
    if sums is None:
        return state, {}
    objective, diagnostics = sums.objective, sums.diagnostics
    state, norm = compilation.call(apply, state, sums, optimizer=learner.optimizer)
    tokens = max(float(diagnostics.tokens), 1.0)
    finite = math.isfinite(float(norm)) and math.isfinite(float(objective.numerator))
    return state, {
        "loss/skipped_updates": float(not finite),
        "loss/objective": float(objective.numerator) / max(float(objective.denominator), 1.0),
        "loss/gradient_norm": float(norm),
        "loss/clipped_fraction": float(diagnostics.clipped) / tokens,
        "loss/entropy": float(diagnostics.entropy) / tokens,
        "policy/log_ratio": float(diagnostics.log_ratio) / tokens,
        "policy/absolute_log_ratio": float(diagnostics.absolute_log_ratio) / tokens,
        "policy/largest_log_ratio": float(diagnostics.largest_log_ratio),
        "policy/trained_tokens": float(diagnostics.tokens),
        "policy/kl_to_start": float(diagnostics.kl) / tokens,
        "policy/importance_weight": float(diagnostics.importance) / tokens,
    }


def make_optimizer(options: Optimizer) -> optax.GradientTransformation:
    """Returns AdamW after clipping by global norm; the learning rate rises over the first `warmup_steps` updates."""
    # The first update already learns: a schedule from 0 would waste a whole rollout batch on it.
    first = options.learning_rate / (options.warmup_steps + 1)
    schedule = optax.linear_schedule(first, options.learning_rate, options.warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(schedule, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay),
    )
