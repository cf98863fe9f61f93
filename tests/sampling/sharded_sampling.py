"""Requests served on eight simulated devices, compared with one device; run by sharded_sampling_test.py.

XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=.:tests python tests/sampling/sharded_sampling.py [--all]
"""

import json
import random
import sys

import numpy as np

import random_requests
from finemem_jax.models import sharding
from finemem_jax.runtime import compilation

# Data × fsdp × tensor, and how weights lie.
WHOLE, PARTS, IN_PLACE = {"whole_weights": True}, {"whole_weights": False}, {"in_place": True}
MESHES = [((2, 2, 2), WHOLE)]
if "--all" in sys.argv:
    MESHES += [((2, 2, 2), PARTS), ((1, 8, 1), WHOLE), ((8, 1, 1), WHOLE), ((1, 4, 2), PARTS), ((4, 1, 2), WHOLE)]
    MESHES += [((2, 2, 2), IN_PLACE), ((4, 1, 2), IN_PLACE)]


def serve(params, requests, num_slots, **how):
    """All completions, collected while requests come; the sampler's counts; how many programs that compiled."""
    sampler = random_requests.make_sampler(params, num_slots, steps_per_call=4, **how)
    sampler.warm_up(len(random_requests.SHARED_PREFIX), 2 * random_requests.MULTIPLE)
    compiled = compilation.counts().programs
    rng, results, request_ids = random.Random(1), {}, []
    for request in requests:
        request_ids.append(sampler.submit(request))
        if rng.random() < 0.1:
            results |= sampler.collect()
    while sampler.pending:
        results |= sampler.collect()
    return [results[request_id] for request_id in request_ids], sampler.stats, compilation.counts().programs - compiled


def main():
    params, requests = random_requests.random_params(0), random_requests.random_requests(60)
    expected, alone, _ = serve(params, requests, 16)
    found = {}
    for sizes, how in MESHES:
        mesh = sharding.make_mesh(*sizes)
        # 16 slots are shared out over data and fsdp; 3 cannot be.
        for num_slots in (16, 3) if (sizes, how) == MESHES[0] else (16,):
            got, stats, compiled = serve(sharding.place(random_requests.TINY, params, mesh), requests, num_slots, **how)
            found[f"{sizes} {how} slots={num_slots}"] = {
                "same_ids": [c.ids for c in got] == [c.ids for c in expected],
                "log_probs": max(
                    float(np.abs(np.subtract(a.log_probs, b.log_probs)).max())
                    for a, b in zip(got, expected, strict=True)
                ),
                "prefilled": stats.prefilled_tokens / alone.prefilled_tokens,
                "compiled": compiled,
                "of_all": stats.prefilled_tokens / stats.prompt_tokens,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
