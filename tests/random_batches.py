"""Random batches of rows for a tiny model, and the sums of their gradients; shared by tests."""

import random

import jax.numpy as jnp
import numpy as np
import optax

from finemem_jax.models import decoder, presets
from finemem_jax.rl import batching, learner
from finemem_jax.rl.grpo import ObjectiveOptions, Rows
from finemem_jax.types import Completion, Memory, Step

MODEL = presets.preset("tiny")
OPTIONS = learner.LearnerOptions(MODEL, decoder.Compute(), ObjectiveOptions())
ONE = jnp.float32(1.0)
SGD = optax.sgd(1.0)


def make_batch(
    params, seed=0, groups=2, size=4, shared_prefix=5, group_prefix=6, suffix=12, response=6
) -> batching.Batch:
    """Random rows whose old log-probabilities are the model's own."""
    rng = np.random.default_rng(seed)
    rows = groups * size

    def tokens(*shape):
        return rng.integers(0, MODEL.vocab_size, shape).astype(np.int32)

    start = rng.integers(1, 5, rows).astype(np.int32)
    length = rng.integers(1, response + 1, rows).astype(np.int32)
    suffixes, responses = tokens(rows, suffix), tokens(rows, response)
    for r in range(rows):
        suffixes[r, start[r] : start[r] + length[r]] = responses[r, : length[r]]
    batch = batching.Batch(
        shared_prefix=tokens(1, shared_prefix),
        shared_prefix_length=np.array([shared_prefix], np.int32),
        group_prefix=tokens(groups, group_prefix),
        group_prefix_length=rng.integers(2, group_prefix + 1, groups).astype(np.int32),
        suffix=suffixes,
        suffix_length=start + length,
        response_start=start,
        response=responses,
        rows=Rows(
            token_mask=np.arange(response) < length[:, None],
            advantages=np.repeat(rng.normal(size=(rows, 1)), response, axis=1).astype(np.float32),
            old_log_probs=np.zeros((rows, response), np.float32),
            weight=(1 / length).astype(np.float32),
            share=np.ones(rows, np.float32),
        ),
    )
    old = np.asarray(learner.score(params, batch, ONE, options=OPTIONS))
    return batch._replace(rows=batch.rows._replace(old_log_probs=old, sampler_log_probs=old))


def learner_of(optimizer=SGD, options=OPTIONS, base_params=None):
    return learner.Learner(base_params or {}, ONE, options, optimizer)


def accumulated(params, batches, options=OPTIONS):
    sums = learner.zero_sums(params, options=options)
    for batch in batches:
        sums = learner.accumulate(learner_of(options=options), params, sums, batch)
    return sums


def random_rows(seed, groups=3, size=4):
    """Groups whose rows share prompts of random lengths with each other: all, some, or not a token.

    Log-probabilities are about those of random weights, log(1 / 384).
    """
    draw = random.Random(seed)

    def ids(n):
        return tuple(draw.randrange(MODEL.vocab_size) for _ in range(n))

    static, found = ids(draw.choice([0, 5, 9])), []
    for g in range(groups):
        chunk, memory = ids(draw.choice([0, 3, 7])), ids(draw.randint(1, 4))
        steps = []
        for _ in range(size):
            prompt = static + chunk + (memory if draw.random() < 0.5 else ids(draw.randint(1, 4)))
            prompt = ids(len(prompt)) if draw.random() < 0.1 else prompt
            response = ids(draw.randint(1, 6))
            completion = Completion(response, tuple(draw.gauss(-5.95, 0.1) for _ in response), "stop", 0)
            steps.append(Step(prompt, (len(prompt),), completion, (), Memory()))
        advantages = tuple(np.full(len(step.completion.ids), draw.gauss(0, 1)) for step in steps)
        found.append(batching.Group(g, 0, tuple(steps), advantages, (True,) * size))
    return found
