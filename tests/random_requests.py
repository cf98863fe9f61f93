"""Random requests to a tiny model that share prefixes; shared by the tests of samplers."""

import random

from finemem_jax.config import sections
from finemem_jax.models import decoder, presets
from finemem_jax.sampling.sampler import Sampler
from finemem_jax.types import Request, random_key

TINY = presets.preset("tiny")
# Compiling is nearly all the time that these tests take: the lengths below fall into few buckets.
MULTIPLE = 16
# Never drawn, since the model has no such token.
NO_END = (TINY.vocab_size,)
SHARED_PREFIX = (11, 12, 13, 14, 15, 16)
GROUP_PREFIXES = ((), (21, 22, 23, 24, 25), (31, 32, 33, 34, 35, 36, 37, 38, 39))


def random_params(seed):
    # Wider than `init`'s embedding, so that some tokens are likelier than others, and greedy ones clearly so.
    params = decoder.init(TINY, seed)
    return params | {"embedding": params["embedding"] * 15}


def random_requests(num_requests, seed=0, temperature=1.0):
    """Requests over one shared prefix and three group prefixes, of ragged lengths."""
    rng = random.Random(seed)
    requests = []
    for i in range(num_requests):
        group_prefix = rng.choice(GROUP_PREFIXES)
        suffix = tuple(rng.randrange(100, 256) for _ in range(rng.randint(1, 8)))
        cuts = (len(SHARED_PREFIX), len(SHARED_PREFIX + group_prefix), len(SHARED_PREFIX + group_prefix + suffix))
        key = random_key("request", seed, i)
        requests.append(Request(SHARED_PREFIX + group_prefix + suffix, cuts, rng.randint(1, 12), temperature, key))
    return requests


def make_sampler(params, num_slots=4, steps_per_call=5, end_ids=NO_END, **settings):
    own = sections.Sampler(num_slots=num_slots, steps_per_call=steps_per_call, prefill_tokens=MULTIPLE, **settings)
    return Sampler(TINY, params, end_ids, settings=own)
