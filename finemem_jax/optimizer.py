"""The optimizer, from optax: clipped AdamW with linear warm-up."""

from __future__ import annotations

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """See `config.default().optimizer` for what each means."""

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    b1: float
    b2: float
    clip_norm: float


def make(options: OptimizerOptions) -> optax.GradientTransformation:
    """AdamW after clipping by global norm; the learning rate rises over the first `warmup_steps` updates."""
    # The first update already learns: a schedule from 0 would waste a whole rollout batch on it.
    first = options.learning_rate / (options.warmup_steps + 1)
    schedule = optax.linear_schedule(first, options.learning_rate, options.warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(schedule, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay),
    )
