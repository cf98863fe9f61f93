"""Tests of finemem_jax/rl/batching.py: every token can be found again, and padding is never trained on."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from finemem_jax.rl import batching
from finemem_jax.rl.batching import Group, Packing
from finemem_jax.runtime import compilation
from finemem_jax.types import Chunk, Completion, Memory, Step, Stream, Trajectory

PAD, LONGEST = 999, 12
SHARED_PREFIX = tuple(range(1, 8))


def a_step(draw, group_prefix, suffix=None, response=None):
    suffix = draw.randint(1, 9) if suffix is None else suffix
    response = draw.randint(0, LONGEST) if response is None else response

    def ids(n):
        return tuple(draw.randrange(10, 500) for _ in range(n))

    prompt = SHARED_PREFIX + group_prefix + ids(suffix)
    completion = Completion(ids(response), tuple(-draw.random() for _ in range(response)), "stop", 0)
    return Step(
        prompt, (len(SHARED_PREFIX), len(SHARED_PREFIX) + len(group_prefix), len(prompt)), completion, (), Memory()
    )


def some_groups(seed, count, size):
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        group_prefix = tuple(draw.randrange(10, 500) for _ in range(draw.randint(1, 20)))
        steps = tuple(a_step(draw, group_prefix) for _ in range(size))
        found.append(a_group(steps, [draw.gauss(0, 1) for _ in range(size)], stream=len(found)))
    return found


def a_group(steps, advantages, stream=0, **more):
    """Every token of a response with the same advantage."""
    per_token = tuple(np.full(len(s.completion.ids), a) for s, a in zip(steps, advantages, strict=True))
    return Group(stream, 0, tuple(steps), per_token, **({"trained": (True,) * len(steps)} | more))


def pack(groups, per_batch=2, multiple=4, **more):
    return [batch for batch, _ in batching.microbatches(groups, Packing(per_batch, multiple, LONGEST, PAD, **more))]


def rows_of(batch):
    """(prompt and response, response, log-probs, advantage) of every row that is trained on or has a group prefix."""
    rows = len(batch.suffix)
    per_group = rows // len(batch.group_prefix)
    for r in range(rows):
        b = r // per_group
        if (batch.suffix[r] == PAD).all():
            continue
        held, n = batch.rows.token_mask[r], batch.rows.token_mask[r].sum()
        np.testing.assert_array_equal(held, np.arange(LONGEST) < n)
        whole = (
            *batch.shared_prefix[b * len(batch.shared_prefix) // len(batch.group_prefix)],
            *batch.group_prefix[b, : batch.group_prefix_length[b]],
            *batch.suffix[r, : batch.suffix_length[r]],
        )
        in_suffix = batch.suffix[r, batch.response_start[r] : batch.suffix_length[r]]
        np.testing.assert_array_equal(in_suffix, batch.response[r, :n])
        yield whole, tuple(in_suffix), tuple(batch.rows.old_log_probs[r, :n]), tuple(batch.rows.advantages[r, :n])


@pytest.mark.parametrize(
    ("count", "size", "per_batch", "shares"),
    [(1, 2, 1, 1), (4, 3, 2, 1), (5, 2, 2, 2), (7, 4, 3, 3), (2, 2, 5, 1), (7, 2, 4, 2)],
)
def test_every_token_is_found_again(count, size, per_batch, shares):
    groups = some_groups(count, count, size)
    got = sorted(row for batch in pack(groups, per_batch, data_shards=shares) for row in rows_of(batch))
    wanted = sorted(
        (
            step.prompt_ids + step.completion.ids,
            step.completion.ids,
            tuple(np.float32(step.completion.log_probs)),
            tuple(np.float32(advantages)),
        )
        for group in groups
        for step, advantages in zip(group.steps, group.advantages, strict=True)
    )
    assert got == wanted


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_lengths_are_rounded_multiples(multiple):
    for batch in pack(some_groups(0, 6, 3), multiple=multiple):
        assert batch.shared_prefix.shape[1] == len(SHARED_PREFIX) // multiple * multiple
        assert batch.group_prefix.shape[1] == compilation.bucket(int(batch.group_prefix_length.max()), multiple)
        assert batch.suffix.shape[1] == compilation.bucket(int(batch.suffix_length.max()), multiple)
        assert batch.response.shape[1] == LONGEST


def test_a_missing_group_is_padding():
    *_, last = pack(some_groups(1, 3, 2), per_batch=2)
    assert last.group_prefix_length[1] == 0 and last.group_prefix_length[0] > 0
    assert not last.rows.token_mask[2:].any()
    assert (last.rows.advantages[2:] == 0).all()
    assert (last.suffix[2:] == PAD).all()
    # One token, not none: attention over nothing is nan, and nan times zero is nan.
    assert (last.suffix_length[2:] == 1).all()
    assert (last.response_start[2:] == 1).all()


def test_outside_of_masks_there_is_only_padding():
    for batch in pack(some_groups(2, 5, 3), per_batch=2):
        assert (batch.response[~batch.rows.token_mask] == PAD).all()
        assert (batch.rows.old_log_probs[~batch.rows.token_mask] == 0).all()
        assert (batch.rows.advantages[~batch.rows.token_mask] == 0).all()
        assert (batch.suffix[np.arange(batch.suffix.shape[1]) >= batch.suffix_length[:, None]] == PAD).all()
        assert (
            batch.group_prefix[np.arange(batch.group_prefix.shape[1]) >= batch.group_prefix_length[:, None]] == PAD
        ).all()


def test_response_starts_after_something():
    # The first response token is predicted from the suffix's token before it.
    assert all((batch.response_start >= 1).all() for batch in pack(some_groups(3, 6, 2)))


def test_the_order_of_groups_is_of_no_matter():
    draw = random.Random(4)
    groups = [a_group((a_step(draw, (9,) * n, 2, 3),) * 2, (n, -n)) for n in (5, 1, 30, 12, 7, 3)]
    for one, other in zip(pack(groups), pack(groups[::-1]), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_groups_of_like_length_share_a_batch():
    draw = random.Random(0)
    short, long = ((9,) * n for n in (3, 60))
    groups = [a_group((a_step(draw, group_prefix),) * 2, (1.0, -1.0)) for group_prefix in (long, short, long, short)]
    assert [batch.group_prefix.shape[1] for batch in pack(groups, multiple=8)] == [16, 80]


@pytest.mark.parametrize("seed", range(20))
def test_all_sizes_that_come_are_known_before(seed):
    """For prompts of at most 30 tokens beyond the shared prefix, of which rows share all but 13."""
    draw = random.Random(seed)
    packing = Packing(1, 4, LONGEST, PAD, max_shared_prefix=len(SHARED_PREFIX))
    known = batching.all_sizes(packing, 2, prompt=30, suffix=13)
    assert len(set(known)) == len(known)
    shared_prefix = len(SHARED_PREFIX) // 4 * 4
    groups = []
    for _ in range(8):
        own = draw.randint(1, 13)
        group_prefix = tuple(
            draw.choices(range(50, 90), k=draw.randint(0, 30 - (len(SHARED_PREFIX) - shared_prefix) - own))
        )
        steps = [a_step(draw, group_prefix, suffix=own, response=draw.randint(1, LONGEST)) for _ in range(2)]
        groups.append(a_group(tuple(steps), (1.0, -1.0)))
    for batch, _ in batching.microbatches(groups, packing):
        assert batch.shared_prefix.shape[1] == shared_prefix
        assert (2, batch.group_prefix.shape[1], batch.suffix.shape[1]) in known


def test_what_a_few_groups_happen_to_share_is_no_shared_prefix():
    group = a_group((a_step(random.Random(0), (20, 21, 22, 23, 24, 25), suffix=3, response=2),) * 2, (1.0, -1.0))
    shapes = [
        pack([group], 1, 2, max_shared_prefix=most)[0].shared_prefix.shape[1] for most in (None, len(SHARED_PREFIX))
    ]
    assert shapes[0] > shapes[1] == len(SHARED_PREFIX) // 2 * 2


def test_nothing_to_train_on():
    assert pack([]) == []


def shared_lengths(groups, multiple=4):
    """Tokens of shared prefix, of group prefixes, and in all, of one batch."""
    (batch,) = pack(groups, len(groups), multiple)
    whole = batch.shared_prefix.size + int(batch.group_prefix_length.sum()) + int(batch.suffix_length.sum())
    return batch.shared_prefix.shape[1], batch.group_prefix_length.tolist(), whole


def test_prefixes_are_found_by_token_ids():
    """However the prompts were built: `prompt_cuts` say where parts end, not what is equal."""
    draw = random.Random(0)
    one, other = a_step(draw, (20, 21), suffix=3, response=2), a_step(draw, (20, 21), suffix=3, response=2)
    pair = a_group((one, other), (1.0, -1.0))
    # Seven of the shared prefix and two of the group prefix, four of them cut off as a shared prefix.
    assert shared_lengths([pair]) == (8, [1], 9 + 2 * 5)
    # One whole prompt, as at the first step of a stream: all but its last token, which predicts the response.
    same = dataclasses.replace(other, prompt_ids=one.prompt_ids)
    assert shared_lengths([a_group((one, same), (1.0, -1.0))]) == (8, [3], 11 + 2 * 3)
    # Nothing in common, already at the first token.
    strange = dataclasses.replace(other, prompt_ids=(500, *other.prompt_ids[1:]))
    assert shared_lengths([a_group((one, strange), (1.0, -1.0))]) == (0, [0], 2 * 14)
    # A group whose rows share nothing leaves the others their branch.
    assert shared_lengths([pair, a_group((one, strange), (1.0, -1.0))]) == (0, [9, 0], 9 + 2 * 5 + 2 * 14)


def test_a_prompt_that_begins_another_shares_all_but_its_last_token():
    draw = random.Random(0)
    one = a_step(draw, (20, 21), suffix=3, response=2)
    longer = dataclasses.replace(one, prompt_ids=(*one.prompt_ids, 7, 7))
    assert shared_lengths([a_group((one, longer), (1.0, -1.0))], multiple=1) == (11, [0], 11 + 3 + 5)


def trajectories():
    """Two streams of 2 and 1 steps with two rollouts each."""
    draw = random.Random(1)
    found = []
    for name, length in (("a", 2), ("b", 1)):
        stream = Stream(name, "made up", (Chunk("c"),) * length)
        steps = [[a_step(draw, (40 + t,)) for t in range(length)] for _ in range(2)]
        found.append([Trajectory(stream, i, tuple(steps[i])) for i in range(2)])
    return found


ADVANTAGES = np.array([[[0.7, 0.0], [-0.7, 0.0]], [[0.5, 0.0], [-0.5, 0.0]]])  # [S, G, T]
PER_TOKEN = np.repeat(ADVANTAGES[..., None], LONGEST, -1)
ALIVE = np.array([[True, False], [True, False]])  # Step 1 of stream 1 does not exist.


def test_groups_pair_steps_with_their_advantages():
    given = trajectories()
    got = batching.groups(given, PER_TOKEN, ALIVE)
    assert [(group.stream, group.step) for group in got] == [(0, 0), (1, 0)]
    assert got[0].steps == (given[0][0].steps[0], given[0][1].steps[0])
    assert got[1].steps == (given[1][0].steps[0], given[1][1].steps[0])
    for group, values in zip(got, [(0.7, -0.7), (0.5, -0.5)], strict=True):
        for step, row, value in zip(group.steps, group.advantages, values, strict=True):
            np.testing.assert_array_equal(row, np.full(len(step.completion.ids), value))


def test_dead_groups_stay_if_asked_for_but_missing_steps_never_do():
    got = batching.groups(trajectories(), PER_TOKEN, np.ones_like(ALIVE))
    assert [(group.stream, group.step) for group in got] == [(0, 0), (0, 1), (1, 0)]


def test_all_groups_dead():
    assert batching.groups(trajectories(), PER_TOKEN, np.zeros((2, 2), bool)) == []


# --------------------------------------------------------------------------------------
# What each row is trained with
# --------------------------------------------------------------------------------------


def test_truncated_responses_are_not_trained_on():
    draw = random.Random(0)
    whole, cut = a_step(draw, (20, 21), 2, 3), a_step(draw, (20, 21), 2, 5)
    cut = dataclasses.replace(cut, completion=dataclasses.replace(cut.completion, finish_reason="length"))
    stream = Stream("a", "made up", (Chunk("c"),))
    given = [[Trajectory(stream, i, (step,)) for i, step in enumerate((whole, cut))]]
    values = np.ones((1, 2, 1, LONGEST))
    for drop, masked, count in ((False, [3, 5], 2), (True, [3, 0], 1)):
        groups = batching.groups(given, values, np.ones((1, 1), bool), drop_truncated=drop)
        (batch,) = pack(groups, per_batch=1)
        assert batch.rows.token_mask.sum(1).tolist() == masked
        assert batch.rows.share.sum() == count


@pytest.mark.parametrize("aggregation", ["row", "token", "stream", "constant"])
def test_rows_weigh_the_same_however_they_are_packed(aggregation):
    groups = [group._replace(stream=i // 2) for i, group in enumerate(some_groups(5, 6, 3))]
    totals = []
    for per_batch in (1, 2, 6):
        rows = [batch.rows for batch in pack(groups, per_batch, aggregation=aggregation)]
        weighted = sum((r.weight[:, None] * r.token_mask * r.advantages).sum() for r in rows)
        totals.append((weighted, sum(r.share.sum() for r in rows)))
    np.testing.assert_allclose(totals, [totals[0]] * 3, rtol=1e-5)


def test_log_probs_to_compare_with_are_aligned():
    draw = random.Random(0)
    steps = tuple(a_step(draw, (20, 21), 2, n) for n in (3, 5))
    old, reference, factors = (tuple(np.arange(n) + shift for n in (3, 5)) for shift in (10.0, 20.0, 30.0))
    group = a_group(steps, (1.0, -1.0), old_log_probs=old, reference_log_probs=reference, unclipped_factors=factors)
    (batch,) = pack([group], per_batch=1)
    for r, n in enumerate((3, 5)):
        np.testing.assert_array_equal(batch.rows.old_log_probs[r, :n], old[r])
        np.testing.assert_array_equal(batch.rows.reference_log_probs[r, :n], reference[r])
        np.testing.assert_array_equal(batch.rows.unclipped_factor[r, :n], factors[r])
        np.testing.assert_allclose(batch.rows.sampler_log_probs[r, :n], steps[r].completion.log_probs)
    plain = pack([a_group(steps, (1.0, -1.0))], per_batch=1)[0].rows
    assert plain.reference_log_probs is None and plain.unclipped_factor is None
    np.testing.assert_array_equal(plain.old_log_probs, plain.sampler_log_probs)


def test_batches_come_with_their_groups_in_order():
    groups = some_groups(6, 5, 2)
    for batch, packed in batching.microbatches(groups, Packing(2, 4, LONGEST, PAD)):
        for b, group in enumerate(packed):
            np.testing.assert_array_equal(
                batch.response[2 * b, : len(group.steps[0].completion.ids)], group.steps[0].completion.ids
            )
