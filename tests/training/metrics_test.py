"""Tests of finemem_jax/training/metrics.py: figures worked by hand, and padding that counts for nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ragged
import small_trajectories as small
from finemem_jax.rl import rewards
from finemem_jax.rl.advantages import Normalizer
from finemem_jax.rl.batching import Group
from finemem_jax.rl.credit_rules import CreditConfig
from finemem_jax.runtime import compilation
from finemem_jax.sampling.sampler import SamplerStats
from finemem_jax.training import metrics
from finemem_jax.types import (
    Action,
    Chunk,
    Completion,
    Likelihood,
    Malformed,
    Memory,
    Operation,
    Outcome,
    Status,
    Step,
    Stream,
    Trajectory,
)
from small_trajectories import answer, answers, trajectory


def of_rewards(inputs):
    return metrics.of_rewards(inputs, *rewards.compute(inputs, CreditConfig(), Normalizer()))


def step(outcomes, num_ids=3, finish_reason="stop", log_prob=-1.0):
    completion = Completion((1,) * num_ids, (log_prob,) * num_ids, finish_reason, 0)
    return Step((1,), (0, 1), completion, tuple(outcomes), Memory())


def applied(action, status=Status.APPLIED):
    return Outcome(Operation(action, "a"), status)


def test_rewards_are_means_over_what_there_is():
    groups = ragged.thousand_groups(4)[:40]
    found = of_rewards(ragged.padded(groups))
    rollouts = [rollout for group in groups for rollout in group]
    steps = sum(len(rollout.operations) for rollout in rollouts)
    written = [valid for rollout in rollouts for operations in rollout.operations for valid in operations]
    assert found["operations/valid_fraction"] == pytest.approx(np.mean(written))
    assert found["operations/per_step"] == pytest.approx(len(written) / steps)
    assert found["data/chunks_per_stream"] == pytest.approx(steps / len(rollouts))
    asked = [np.mean([one.score for one in rollout.asked]) for rollout in rollouts if rollout.asked]
    assert found["reward/outcome"] == pytest.approx(np.mean(asked))
    assert 0 < found["reward/alive_groups"] <= 1


def test_padding_counts_for_nothing():
    groups = ragged.thousand_groups(4)[:40]
    plain = of_rewards(ragged.padded(groups))
    more = of_rewards(ragged.padded(groups, larger=2, garbage=np.random.default_rng(0)))
    # Masks of operations that are not there are all that a share of written ones could go wrong by.
    assert more == pytest.approx(plain)


def test_operations_are_shares_of_all_that_was_written():
    good = [applied(Action.INSERT), applied(Action.INSERT), applied(Action.DELETE)]
    bad = [applied(Action.UPDATE, Status.UNKNOWN_ID), Outcome(Malformed("x", "no JSON"), Status.MALFORMED)]
    steps = (step(good), step(bad, num_ids=6, finish_reason="length"), step([]))
    found = metrics.of_operations([[Trajectory(Stream("s", "synthetic", (Chunk("c"),) * 3), 0, steps)]])
    assert found["operations/memory_insert_fraction"] == 0.4
    assert found["operations/memory_delete_fraction"] == 0.2
    assert found["operations/memory_update_fraction"] == found["operations/skip_fraction"] == 0
    assert found["operations/unknown_id_fraction"] == found["operations/malformed_fraction"] == 0.2
    assert found["operations/duplicate_fraction"] == 0
    assert found["rollout/truncated_fraction"] == pytest.approx(1 / 3)
    assert found["rollout/response_tokens"] == 4


def test_samplers():
    manager = SamplerStats(
        new_tokens=60, prompt_tokens=200, prefilled_tokens=50, slot_steps=80, slot_tokens=60, seconds=3.0,
        device_seconds=2.5,
    )  # fmt: skip
    found = metrics.of_samplers(manager, SamplerStats(requests=7, seconds=1.0, device_seconds=0.75))
    assert found["time/new_tokens_per_second"] == 20
    assert found["sampler/prefilled_fraction"] == 0.25
    assert found["sampler/slot_occupancy"] == 0.75
    assert found["sampler/host_seconds"] == 0.75
    assert found["reader/questions_asked"] == 7
    assert all(np.isfinite(value) for value in metrics.of_samplers(SamplerStats(), SamplerStats()).values())


def test_the_sampler_is_compared_with_the_trainer():
    old = np.full(3, -1.25), np.array([-1.0, -1.0, -1.5])
    group = Group(0, 0, (step([]), step([])), (), (True, True), old_log_probs=old)
    found = metrics.of_sampler_difference([group], {})
    assert found == pytest.approx(
        {"policy/sampler_difference_mean": 1.25 / 6, "policy/sampler_difference_largest": 0.5}
    )
    # Where the trainer's were not computed apart, the first update has measured them.
    measured = {"policy/absolute_log_ratio": 0.1, "policy/largest_log_ratio": 0.2}
    plain = [group._replace(old_log_probs=None)]
    assert [*metrics.of_sampler_difference(plain, measured).values()] == [0.1, 0.2]
    assert metrics.of_sampler_difference([], {}) == {}


def test_a_program_is_counted_when_it_is_compiled():
    before = compilation.counts()
    assert metrics.of_compilation(before) == {"compile/programs": 0, "compile/seconds": 0}
    jax.block_until_ready(jax.jit(lambda x: 3 * x + 17)(jnp.ones(23)))
    assert metrics.of_compilation(before)["compile/programs"] >= 1
    assert metrics.of_compilation(before)["compile/seconds"] > 0


def test_likelihoods_and_scores_are_compared_by_rank():
    def rollout(source, *pairs, unscored=0):
        asked = [answer(score, likelihood=Likelihood(value, value > -1)) for value, score in pairs]
        one = trajectory([small.step(answers=asked[:1])], [*asked[1:], *[answer(None)] * unscored])
        return dataclasses.replace(one, stream=dataclasses.replace(one.stream, source=source))

    right = rollout("a", (-3.0, 0.0), (-2.0, 0.5), (-0.5, 1.0))
    wrong = rollout("b", (-3.0, 1.0), (-2.0, 0.5), (-1.0, 0.0), unscored=1)
    alike = rollout("c", (-3.0, 1.0), (-2.0, 1.0))
    found = metrics.of_answers([[right, wrong], [alike, rollout("d", (-1.0, None))]])
    assert found["likelihood/rank_correlation/a"] == pytest.approx(1)
    assert found["likelihood/rank_correlation/b"] == pytest.approx(-1)
    # Where all scores are the same, or there are none, there is nothing to compare.
    assert not {"likelihood/rank_correlation/c", "likelihood/rank_correlation/d"} & found.keys()
    assert found["likelihood/greedy_fraction"] == 1 / 9 and found["reader/unscored_fraction"] == 1 / 10
    assert metrics.of_answers([[trajectory([small.step()], answers(1.0))]]) == {"reader/unscored_fraction": 0}
    # Ties share a rank, as in Spearman's.
    ties = rollout("t", (-3.0, 0.0), (-2.0, 0.0), (-1.0, 1.0), (-0.5, 1.0))
    assert metrics.of_answers([[ties]])["likelihood/rank_correlation/t"] == pytest.approx(2 / 5**0.5)
