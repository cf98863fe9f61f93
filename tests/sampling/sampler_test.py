"""Tests of finemem_jax/sampling/sampler.py: the same request gives the same completion in any company."""

# No request here is refused, unless a test says so: every result has `ids`.
# pyright: reportAttributeAccessIssue=false

import dataclasses
import gc
import itertools
import random
import re

import jax
import numpy as np
import pytest

from finemem_jax.models import decoder, sharding
from finemem_jax.runtime import compilation
from finemem_jax.sampling.sampler import SamplerStats
from finemem_jax.types import Completion, Refusal, Request, random_key
from random_requests import (
    GROUP_PREFIXES,
    MULTIPLE,
    SHARED_PREFIX,
    TINY,
    make_sampler,
    random_params,
    random_requests,
)


@pytest.fixture(scope="module")
def params():
    return random_params(0)


@jax.jit
def _logits(params, tokens, length):
    (states,) = decoder.hidden_states(TINY, params, [tokens[None]], lengths=[length[None]])
    return states[0] @ params["embedding"].T


def logits_of(params, ids):
    """Logits at each place of a row, without a cache."""
    return np.asarray(_logits(params, np.pad(ids, (0, 48 - len(ids))), np.asarray(len(ids))))[: len(ids)]


@pytest.fixture(scope="module")
def requests():
    return random_requests(11)


@pytest.fixture(scope="module")
def completions(params, requests):
    return make_sampler(params).generate(requests)


def assert_same(got: list[Completion], expected: list[Completion]):
    assert [c.ids for c in got] == [c.ids for c in expected]
    assert [c.finish_reason for c in got] == [c.finish_reason for c in expected]
    for a, b in zip(got, expected, strict=True):
        # Rows computed together with others are summed in another order.
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=1e-4)


def assert_teacher_forced(params, request, completion):
    """The log-probabilities are those of a forward pass over prompt and completion together."""
    logits = logits_of(params, [*request.prompt_ids, *completion.ids])[len(request.prompt_ids) - 1 : -1]
    normalized = jax.nn.log_softmax(logits / (request.temperature or 1.0))
    expected = normalized[np.arange(len(completion.ids)), np.array(completion.ids)]
    np.testing.assert_allclose(completion.log_probs, expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------
# What is sampled
# --------------------------------------------------------------------------------------


def test_greedy_is_an_uncached_argmax_loop(params):
    requests = random_requests(6, seed=1, temperature=0.0)
    for request, completion in zip(requests, make_sampler(params).generate(requests), strict=True):
        ids = list(request.prompt_ids)
        for _ in range(request.max_new_tokens):
            ids.append(int(logits_of(params, ids)[-1].argmax()))
        assert list(completion.ids) == ids[len(request.prompt_ids) :]
        assert_teacher_forced(params, request, completion)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_log_probs_are_teacher_forced_ones(params, temperature):
    requests = random_requests(6, seed=2, temperature=temperature)
    for request, completion in zip(requests, make_sampler(params).generate(requests), strict=True):
        assert len(completion.ids) == len(completion.log_probs) == request.max_new_tokens
        assert_teacher_forced(params, request, completion)


def test_cut_distributions_do_not_depend_on_the_company(params):
    """top-k and top-p belong to a request: others in the same slots draw as if alone."""
    plain = random_requests(9, seed=3)
    mixed = [dataclasses.replace(r, top_k=(0, 3, 0)[i % 3], top_p=(1.0, 1.0, 0.5)[i % 3]) for i, r in enumerate(plain)]
    together, alone = make_sampler(params).generate(mixed), make_sampler(params).generate(plain)
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert a.log_probs == pytest.approx(a.raw_log_probs, abs=1e-5) if i % 3 == 0 else a.log_probs > a.raw_log_probs
        assert a.ids == b.ids or i % 3
    assert_same([make_sampler(params, num_slots=1).generate([r])[0] for r in mixed], together)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((1, 2, 1), marks=pytest.mark.slow), pytest.param((2, 1, 1), marks=pytest.mark.slow), (1, 1, 2)],
)
def test_weights_on_two_devices(params, requests, completions, sizes):
    placed = sharding.place(TINY, params, sharding.make_mesh(*sizes))
    assert_same(make_sampler(placed).generate(requests), completions)


def test_in_bfloat16(params):
    sampler = make_sampler(params, dtype="bfloat16")
    for request in (requests := random_requests(5)):
        (completion,) = sampler.generate([request])
        ids = request.prompt_ids + completion.ids
        exact = jax.nn.log_softmax(logits_of(params, ids[:-1]))[len(request.prompt_ids) - 1 :]
        # Eight bits of precision, and logits around 1.
        np.testing.assert_allclose(
            completion.log_probs, exact[np.arange(len(completion.ids)), list(completion.ids)], rtol=0, atol=0.1
        )
    assert {x.dtype.name for x in jax.tree.leaves(sampler.engine.weights)} == {"bfloat16"}
    assert_same(sampler.generate(requests), sampler.generate(requests))


def test_with_rounded_weights(params):
    requests = random_requests(20, seed=8, temperature=0.0)
    exact, rounded = make_sampler(params).generate(requests), make_sampler(params, int8=True).generate(requests)
    # The likeliest first token is nearly always the same.
    assert sum(a.ids[0] == b.ids[0] for a, b in zip(exact, rounded, strict=True)) >= 17
    assert any(a.log_probs[0] != b.log_probs[0] for a, b in zip(exact, rounded, strict=True))
    assert_same(make_sampler(params, num_slots=1, int8=True).generate(requests), rounded)


def pointers(params):
    """Where in memory the parts of all arrays are."""
    return [part.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for part in leaf.addressable_shards]


@pytest.mark.parametrize("sizes", [None, (1, 1, 1), (2, 1, 1), (1, 1, 2)])
def test_in_place(params, requests, completions, sizes):
    """The same ids from the trainer's own arrays, of which nothing is copied."""
    if sizes:
        params = sharding.place(TINY, params, sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)]))
    sampler = make_sampler(params, in_place=True)
    rest, layers = sampler.engine.weights
    assert pointers(rest | {"layers": layers}) == pointers(params)
    assert_same(sampler.generate(requests), completions)
    sampler.offload()
    assert sampler.engine.weights is None


def test_in_place_is_only_for_weights_of_the_sampler_s_dtype(params):
    with pytest.raises(ValueError, match="Weights of float32 .* in place in bfloat16; set sampler.dtype"):
        make_sampler(params, in_place=True, dtype="bfloat16")


def test_greedy_ignores_the_key(params, requests):
    sampler = make_sampler(params)
    greedy = [dataclasses.replace(request, temperature=0.0) for request in requests[:4]]
    other = [dataclasses.replace(request, key=(7, i)) for i, request in enumerate(greedy)]
    assert_same(sampler.generate(other), sampler.generate(greedy))


def test_another_key_draws_other_tokens(params, requests):
    long = dataclasses.replace(requests[0], max_new_tokens=12)
    sampled = make_sampler(params).generate([dataclasses.replace(long, key=(3, i)) for i in range(4)])
    assert len({completion.ids for completion in sampled}) == 4


def test_first_two_tokens_follow_the_models_distribution(params):
    # The first is drawn after the prefill, the second while decoding: by other code, and another draw of the key.
    n = 4000
    prompt = (*SHARED_PREFIX, 100, 101)
    requests = [Request(prompt, (6, 8), 2, 1.0, random_key("chi-square", i)) for i in range(n)]
    sampled = np.array([c.ids for c in make_sampler(params, num_slots=512).generate(requests)])

    vocab = TINY.vocab_size
    rows = np.concatenate([np.tile(prompt, (vocab, 1)), np.arange(vocab)[:, None]], axis=1)
    (states,) = jax.jit(decoder.hidden_states, static_argnums=0)(TINY, params, [rows], lengths=[np.full(vocab, 9)])
    first, second = (np.asarray(jax.nn.softmax(states[:, i] @ params["embedding"].T), np.float64) for i in (-2, -1))
    # P(second) = Σ over first of P(first) P(second | first); each of the rows continues one first token.
    for tokens, probabilities in [(sampled[:, 0], first[0]), (sampled[:, 1], first[0] @ second)]:
        counts, expected = np.bincount(tokens, minlength=vocab), n * probabilities
        # Pearson's statistic wants five expected draws a cell; the rare tokens share one.
        common = expected >= 5
        cells = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
        statistic, df = ((cells[0] - cells[1]) ** 2 / cells[1]).sum(), common.sum()
        assert df >= 20
        # Mean df, standard deviation sqrt(2 df); the keys are fixed, so this holds always or never.
        assert statistic < df + 5 * np.sqrt(2 * df)


# --------------------------------------------------------------------------------------
# The same request, the same completion
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2])
def test_number_of_slots_does_not_matter(params, requests, completions, num_slots):
    assert_same(make_sampler(params, num_slots=num_slots).generate(requests), completions)


@pytest.mark.parametrize("steps_per_call", [1, 64])
def test_steps_per_call_do_not_matter(params, requests, completions, steps_per_call):
    assert_same(make_sampler(params, steps_per_call=steps_per_call).generate(requests), completions)


def test_alone_or_in_company(params, requests, completions):
    sampler = make_sampler(params)
    assert_same([sampler.generate([request])[0] for request in requests[:5]], completions[:5])


def test_order_of_requests_does_not_matter(params, requests, completions):
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    assert_same(make_sampler(params).generate([requests[i] for i in order]), [completions[i] for i in order])


def test_a_sampler_can_be_used_again(params, requests, completions):
    # Caches are donated to the device; a second call must not find its shared prefix or group prefixes gone.
    sampler = make_sampler(params)
    for _ in range(2):
        assert_same(sampler.generate(requests), completions)


def test_the_same_request_twice(params, requests, completions):
    got = make_sampler(params).generate([requests[0], requests[1], requests[0]])
    assert_same(got, [*completions[:2], completions[0]])


@pytest.mark.parametrize("cuts", [(6, 11, 15), (6, 15), (6, 6, 15), (6, 14, 15), (6, 8, 11, 15)], ids=str)
def test_cuts_between_group_prefix_and_suffix_do_not_matter(params, cuts):
    prompt = (*SHARED_PREFIX, *GROUP_PREFIXES[1], 101, 102, 103, 104)
    request = Request(prompt, (6, 11, 15), 8, 1.0, (1, 2))
    sampler = make_sampler(params)
    assert_same(sampler.generate([dataclasses.replace(request, cuts=cuts)]), sampler.generate([request]))


@pytest.mark.parametrize("cuts", [(4, 11, 15)], ids=str)
def test_the_end_of_the_shared_prefix_does_not_matter(params, cuts):
    # "The completion depends on the prompt and on the key alone" (Request.key).
    prompt = (*SHARED_PREFIX, *GROUP_PREFIXES[1], 101, 102, 103, 104)
    request = Request(prompt, (6, 11, 15), 8, 1.0, (1, 2))
    sampler = make_sampler(params)
    assert_same(sampler.generate([dataclasses.replace(request, cuts=cuts)]), sampler.generate([request]))


def test_several_shared_prefixes_in_one_call(params, requests, completions):
    other = Request((*SHARED_PREFIX[::-1], *GROUP_PREFIXES[1], 104), (6, 11, 12), 6, 1.0, (1, 2))
    alone = make_sampler(params).generate([other])
    got = make_sampler(params).generate([requests[0], other, *requests[1:3]])
    assert_same(got, [completions[0], *alone, *completions[1:3]])


@pytest.fixture(scope="module")
def many():
    """300 requests, greedy and drawn, whole and cut distributions, over two shared prefixes."""
    rng = random.Random(5)
    plain = random_requests(300, seed=5)
    return [
        dataclasses.replace(
            request,
            prompt_ids=request.prompt_ids if i % 50 else (9, *request.prompt_ids[1:]),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_k=rng.choice((0, 0, 5)),
            top_p=rng.choice((1.0, 1.0, 0.8)),
        )
        for i, request in enumerate(plain)
    ]


@pytest.fixture(scope="module")
def of_many(params, many):
    return make_sampler(params, num_slots=16, end_ids=END).generate(many)


# Some completions are to stop early.
END = (7, 70, 170)


@pytest.mark.parametrize("num_slots", [1, 4, 16])
def test_many_requests_in_any_order_and_any_slots(params, many, of_many, num_slots):
    assert {completion.finish_reason for completion in of_many} == {"stop", "length"}
    order = random.Random(num_slots).sample(range(len(many)), len(many))
    got = make_sampler(params, num_slots=num_slots, end_ids=END).generate([many[i] for i in order])
    assert_same(got, [of_many[i] for i in order])


def test_many_requests_one_at_a_time(params, many, of_many):
    sampler = make_sampler(params, end_ids=END)
    assert_same([sampler.generate([request])[0] for request in many], of_many)


def test_many_requests_with_a_restart_half_way(params, many, of_many):
    """What was not collected is asked again, of a sampler that knows nothing of the first."""
    first = make_sampler(params, end_ids=END)
    request_ids = [first.submit(request) for request in many]
    results = {}
    while len(results) < len(many) // 2:
        results |= {request_ids.index(request_id): completion for request_id, completion in first.collect()}
    rest = [i for i in range(len(many)) if i not in results]
    random.Random(0).shuffle(rest)
    second = make_sampler(params, num_slots=3, end_ids=END)
    results |= dict(zip(rest, second.generate([many[i] for i in rest]), strict=True))
    assert_same([results[i] for i in range(len(many))], of_many)


@pytest.mark.slow
def test_twenty_thousand_requests(params):
    """Random lengths, stops and cancellations: none lost, none answered twice, and memory stays as it is."""
    rng = random.Random(0)
    sampler = make_sampler(params, num_slots=32, steps_per_call=4, end_ids=END)
    words = [tuple(rng.randrange(TINY.vocab_size) for _ in range(12)) for _ in range(40)]
    waiting, answered, cancelled, memory = set(), set(), set(), []
    total = 20_000
    sent = 0
    while sent < total or waiting:
        for _ in range(min(rng.randint(0, 40), total - sent)):
            ids = SHARED_PREFIX + rng.choice(words)[: rng.randint(1, 12)] + rng.choice(words)[: rng.randint(1, 12)]
            length = rng.choice((0, 1, rng.randint(1, 8))) if rng.random() < 0.1 else rng.randint(1, 8)
            cuts = (len(SHARED_PREFIX), rng.randint(len(SHARED_PREFIX), len(ids)), len(ids))
            waiting.add(sampler.submit(Request(ids, cuts, length, rng.random(), random_key("many", sent))))
            sent += 1
        for request_id in rng.sample(sorted(waiting), min(len(waiting), rng.choice((0, 0, 1, 3)))):
            assert sampler.cancel(request_id)
            waiting.remove(request_id)
            cancelled.add(request_id)
        for request_id, _ in sampler.collect():
            waiting.remove(request_id)  # Fails where it came twice, or was cancelled.
            answered.add(request_id)
        if sent >= total // 4 and len(memory) < 1 + 9 * sent // total:
            gc.collect()
            memory.append(resident_megabytes())
    assert sampler.pending == 0 and len(answered) + len(cancelled) == total and not answered & cancelled
    assert sampler.stats.requests == total and sampler.stats.refused > 100 and len(cancelled) > 100
    assert max(memory) - memory[0] < 20, memory


def resident_megabytes():
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


# --------------------------------------------------------------------------------------
# Ends
# --------------------------------------------------------------------------------------


def test_stop_tokens_end_a_completion(params, requests, completions):
    # Every token of some completion ends it in turn: what was drawn before is unchanged, and nothing follows.
    index = max(range(len(requests)), key=lambda i: len(set(completions[i].ids)))
    free = completions[index]
    for end in sorted(set(free.ids))[:4]:
        place = free.ids.index(end)
        (got,) = make_sampler(params, end_ids=(end,)).generate([requests[index]])
        assert got.ids == free.ids[: place + 1]
        np.testing.assert_allclose(got.log_probs, free.log_probs[: place + 1], rtol=0, atol=1e-4)
        assert got.finish_reason == "stop"


def test_stopped_slots_are_given_on(params, requests, completions):
    # Half of all tokens end a completion, so that slots free up at different times.
    ends = tuple(range(0, TINY.vocab_size, 2))
    got = make_sampler(params, num_slots=2, end_ids=ends).generate(requests)
    for completion, free in zip(got, completions, strict=True):
        stops = [i for i, token in enumerate(free.ids) if token in ends]
        assert completion.ids == (free.ids[: stops[0] + 1] if stops else free.ids)
        assert completion.finish_reason == ("stop" if stops else "length")
    assert {completion.finish_reason for completion in got} == {"stop", "length"}


def test_without_a_stop_token_the_length_ends_it(requests, completions):
    assert [len(completion.ids) for completion in completions] == [request.max_new_tokens for request in requests]
    assert {completion.finish_reason for completion in completions} == {"length"}


def test_one_new_token(params, requests, completions):
    short = [dataclasses.replace(request, max_new_tokens=1) for request in requests]
    got = make_sampler(params).generate(short)
    assert [completion.ids for completion in got] == [completion.ids[:1] for completion in completions]
    (stopped,) = make_sampler(params, end_ids=got[0].ids).generate(short[:1])
    assert stopped.ids == got[0].ids
    assert stopped.finish_reason == "stop"


def test_no_requests(params):
    sampler = make_sampler(params)
    assert sampler.generate([]) == []
    assert sampler.stats.requests == 0


# --------------------------------------------------------------------------------------
# Shared work
# --------------------------------------------------------------------------------------


def test_shared_prefixes_are_computed_once(params):
    # Three prompts on three group prefixes, one of them empty; the first prompt twice, with different keys.
    prompts = [
        (GROUP_PREFIXES[1], (101, 102)),
        (GROUP_PREFIXES[1], (101, 102)),
        (GROUP_PREFIXES[2], (101, 102)),
        ((), (103, 104, 105)),
    ]
    requests = [
        Request(SHARED_PREFIX + group + suffix, (6, 6 + len(group), 6 + len(group + suffix)), 3, 1.0, (0, i))
        for i, (group, suffix) in enumerate(prompts)
    ]
    sampler = make_sampler(params)
    sampler.generate(requests)
    # Shared prefix 6, group prefixes 5 + 9, suffixes 2 + 2 + 3; apart 4 * 6 + (5 + 5 + 9) + (2 + 2 + 2 + 3).
    assert sampler.stats.prefilled_tokens == 6 + (5 + 9) + (2 + 2 + 3)
    assert sampler.stats.prompt_tokens == 4 * 6 + (5 + 5 + 9) + (2 + 2 + 2 + 3)
    # Another call finds them all again, but for the states of last tokens, which the first draws need.
    sampler.take_stats()
    sampler.generate(requests)
    assert sampler.stats.prefilled_tokens == 3


def test_stats_count(params, requests, completions):
    sampler = make_sampler(params, num_slots=2)
    sampler.generate(requests)
    stats = sampler.take_stats()
    new_tokens = sum(len(completion.ids) for completion in completions)
    assert (stats.requests, stats.new_tokens) == (len(requests), new_tokens)
    # First tokens come from prefills; the others need a step of a slot each.
    assert stats.slot_tokens == new_tokens - len(requests)
    assert stats.slot_steps >= stats.slot_tokens
    assert 0 < stats.device_seconds <= stats.seconds
    assert stats.seconds > 0
    assert sampler.stats == SamplerStats()


def test_update_forgets_the_old_weights(params, requests):
    sampler = make_sampler(params)
    sampler.update(params, 3)
    assert {c.policy_version for c in sampler.generate(requests[:3])} == {3}
    sampler.take_stats()
    newer = random_params(1)
    sampler.update(newer, 4)
    got = sampler.generate(requests[:3])
    assert {c.policy_version for c in got} == {4}
    fresh = make_sampler(newer)
    assert_same(got, fresh.generate(requests[:3]))
    assert sampler.stats.prefilled_tokens == fresh.stats.prefilled_tokens
    for request, completion in zip(requests, got, strict=False):
        assert_teacher_forced(newer, request, completion)


# --------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------


GOOD = Request((1, 2, 3, 4), (2, 4), 3, 1.0, (0, 0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(prompt_ids=(1,) * 4096, cuts=(5, 4096), max_new_tokens=1), r"4096 prompt tokens.*4096 tokens.*lower"),
        (dict(prompt_ids=(1,) * 10, cuts=(5, 10), max_new_tokens=4087), r"lower rollout\.max_new_tokens"),
        (dict(prompt_ids=(), cuts=(0,)), "empty"),
        (dict(cuts=(4, 4)), "leave at least one token"),
        (dict(cuts=(3, 2, 4)), "must rise"),
        (dict(cuts=(2, 3)), "the prompt's length, 4"),
        (dict(cuts=()), "must rise"),
        (dict(prompt_ids=(1, 2, 3, TINY.vocab_size)), f"knows 0 to {TINY.vocab_size - 1}; use the tokenizer"),
        (dict(prompt_ids=(1, -1, 3, 4)), "token ids from -1"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(temperature=-0.1), "temperature must be 0"),
        (dict(temperature=float("nan")), "temperature must be 0"),
        (dict(temperature=float("inf")), "finite"),
        (dict(top_k=-1), "top_k must be 0 or above"),
        (dict(top_p=0.0), r"top_p in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p in \(0, 1\]"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_and_the_others_go_on(params, requests, completions, changes, reason):
    sampler = make_sampler(params)
    first, bad, last = sampler.generate([requests[0], dataclasses.replace(GOOD, **changes), requests[1]])
    assert isinstance(bad, Refusal)
    assert re.search(reason, bad.reason)
    assert_same([first, last], completions[:2])
    assert (sampler.stats.requests, sampler.stats.refused) == (3, 1)


def test_all_of_the_prompt_may_be_group_prefix(params):
    sampler = make_sampler(params)
    assert_same(sampler.generate([dataclasses.replace(GOOD, cuts=(2, 4, 4))]), sampler.generate([GOOD]))


def test_a_request_longer_than_any_before_makes_the_caches_grow(params, requests, completions):
    """While others are being served."""
    sampler = make_sampler(params, num_slots=2)
    long = Request(tuple(range(100, 170)), (6, 70), 40, 1.0, (5, 6))
    request_ids = [sampler.submit(request) for request in (requests[0], long, requests[1])]
    results = collected(sampler)
    assert_same([results[request_ids[0]], results[request_ids[2]]], [completions[0], completions[1]])
    assert_same([results[request_ids[1]]], make_sampler(params).generate([long]))


# --------------------------------------------------------------------------------------
# One by one
# --------------------------------------------------------------------------------------


def collected(sampler):
    """All results that are still to come, by request_id; each comes once."""
    results = {}
    while sampler.pending:
        for request_id, result in sampler.collect():
            assert request_id not in results
            results[request_id] = result
    return results


def test_requests_may_come_while_others_are_served(params, requests, completions):
    sampler = make_sampler(params, num_slots=2, steps_per_call=2)
    request_ids, results = [], {}
    for request in requests:
        request_ids.append(sampler.submit(request))
        results |= sampler.collect() if len(request_ids) % 3 == 0 else []
    results |= collected(sampler)
    assert_same([results[request_id] for request_id in request_ids], completions)
    assert sampler.collect() == []


def test_it_can_be_called_away_between_two_calls(params, requests, completions):
    """And by an exception too; whatever was pending still is, and comes out as if nothing had been."""
    sampler = make_sampler(params, num_slots=2, steps_per_call=1)
    request_ids = [sampler.submit(request) for request in requests]
    results, empty, turns = {}, 0, itertools.count()

    def between():
        if next(turns) % 3 == 0:
            raise KeyboardInterrupt
        return True

    sampler.poll = between
    while sampler.pending:
        try:
            done = sampler.collect()
        except KeyboardInterrupt:
            continue
        empty += not done
        results |= done
    assert_same([results[request_id] for request_id in request_ids], completions)
    assert empty > 3
    assert sampler.stats.new_tokens == sum(len(completion.ids) for completion in completions)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_is_cancelled_never_comes_and_disturbs_nobody(params, requests, completions, steps):
    sampler = make_sampler(params, num_slots=2, steps_per_call=1)
    request_ids = [sampler.submit(request) for request in requests]
    results = {}
    for _ in range(steps):
        results |= sampler.collect()
    # Whatever has not come yet: in a slot, or still waiting.
    taken_back = [request_id for request_id in request_ids if request_id not in results][:7:2]
    assert all(sampler.cancel(request_id) for request_id in taken_back)
    assert not any(sampler.cancel(request_id) for request_id in taken_back)
    results |= collected(sampler)
    assert set(results) == set(request_ids) - set(taken_back)
    kept = [i for i, request_id in enumerate(request_ids) if request_id in results]
    assert_same([results[request_ids[i]] for i in kept], [completions[i] for i in kept])


def test_what_was_collected_cannot_be_cancelled(params, requests):
    sampler = make_sampler(params)
    request_id = sampler.submit(requests[0])
    sampler.collect()
    assert not sampler.cancel(request_id) and not sampler.cancel(99)


def test_nothing_is_lost_to_an_update(params, requests):
    sampler = make_sampler(params)
    request_id = sampler.submit(requests[0])
    for call in (lambda: sampler.update(params, 1), sampler.offload, lambda: sampler.generate(requests)):
        with pytest.raises(ValueError, match="1 requests are pending; collect or cancel"):
            call()
    sampler.cancel(request_id)
    sampler.update(params, 1)


def test_shared_prefixes_take_turns(params, requests, completions):
    """Requests of two shared prefixes, one after the other: the prefix changes only when the other's are all served."""
    other = Request((*SHARED_PREFIX[::-1], *GROUP_PREFIXES[1], 104), (6, 11, 12), 6, 1.0, (1, 2))
    alone = make_sampler(params).generate([other])
    sampler = make_sampler(params)
    mixed = [request for pair in zip(requests[:4], [other] * 4, strict=True) for request in pair]
    got = sampler.generate(mixed)
    assert_same(got[::2], completions[:4])
    assert_same(got[1::2], alone * 4)
    assert sampler.stats.prefilled_tokens < sum(len(request.prompt_ids) for request in mixed) / 2


def test_an_endless_stream_of_one_shared_prefix_does_not_starve_another(params, requests, monkeypatch):
    monkeypatch.setattr("finemem_jax.sampling.sampler._PATIENCE", 3)
    sampler = make_sampler(params, num_slots=2)
    other = sampler.submit(Request((50, 51, 52), (1, 3), 1, 1.0, (1, 2)))
    results = {}
    i = 0
    for i in range(40):
        sampler.submit(requests[i % 5])
        results |= sampler.collect()
        if other in results:
            break
    assert i < 10


# --------------------------------------------------------------------------------------
# Compiled ahead
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [None, (1, 1, 1)])
def test_nothing_is_compiled_after_the_warm_up(params, requests, completions, mesh):
    """Whether the trainer's parameters are on a mesh or not."""
    if mesh:
        params = sharding.place(TINY, params, sharding.make_mesh(*mesh, devices=jax.devices()[:1]))
    sampler = make_sampler(params, num_slots=5, steps_per_call=3)
    shown = []
    sampler.warm_up(len(SHARED_PREFIX), 4 * MULTIPLE, lambda done, total: shown.append((done, total)))
    assert [done for done, _ in shown] == list(range(shown[0][1] + 1))
    rng = random.Random(0)
    for version in range(3):
        before = compilation.counts().programs
        order = [rng.choice(requests) for _ in range(rng.randint(10, 30))]
        expected = [completions[requests.index(request)] for request in order]
        assert_same(sampler.generate(order), expected)
        sampler.generate([dataclasses.replace(r, temperature=rng.random(), top_k=rng.randint(0, 9)) for r in order])
        # Slots are lengthened, from two pieces to three or four, or at once to four.
        for length in (2, 3)[version % 2 :]:
            sampler.generate([dataclasses.replace(r, max_new_tokens=length * MULTIPLE) for r in order[:7]])
        sampler.offload()
        assert compilation.counts().programs == before
        # What an update itself computes is not sampling.
        sampler.update(params, version)
    # The test would notice: another length needs another program.
    before = compilation.counts().programs
    sampler.generate([dataclasses.replace(requests[0], max_new_tokens=(6 if mesh else 4) * MULTIPLE)])
    assert compilation.counts().programs > before
