"""Tests of finemem_jax/advantages.py: against slow loops, its laws, and by hand."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
import ragged
from ragged import Asked, Evidence, Rollout

from finemem_jax import advantages, rules
from finemem_jax.grpo import Normaliser
from finemem_jax.rules import Settings, Variant

GROUP = 3
PAPER, PLAIN = Settings(), Normaliser()
OTHER = Settings(0.3, 2.0, 0.7, -0.1, 0.4, 0.2, 0.05, 0.5, 0.2, 3.0, -4.0)


def compared(inputs, settings=PAPER, normaliser=PLAIN, **variant):
    chosen = Variant(**variant)
    _, channels = ragged.float64(rules.step_rewards, inputs, settings, chosen)
    return ragged.float64(lambda x, s: advantages.compare(x, channels, s, chosen, normaliser), inputs, settings)


@pytest.fixture(scope="module")
def groups():
    return ragged.thousand_groups(GROUP)


@pytest.fixture(scope="module")
def inputs(groups):
    return ragged.padded(groups)


def slow_advantages(groups, rule, settings, per_operation=False):
    """{(s, g, t): (A of the step, [A of each operation])}, standardised by the statistics module."""
    used = rules.RULES[rule]
    found = {}
    for s, group in enumerate(groups):
        parts = [ragged.slow_parts(rule, r, settings, chunk=used.chunk, content="content" in used.needs) for r in group]
        for t in range(group[0].num_steps):
            together = range(group[0].num_steps) if used.group == "stream" else [t]
            rewards = [parts[g][0][u] for g in range(len(group)) for u in together]
            middle, scale = statistics.fmean(rewards), statistics.stdev(rewards) + 1e-6
            if per_operation:
                spread = [
                    statistics.fmean((own - middle) ** 2 for own in (parts[g][1][u] or [parts[g][0][u]]))
                    for g in range(len(group))
                    for u in together
                ]
                scale = math.sqrt(sum(spread) / (len(spread) - 1)) + 1e-6
            for g in range(len(group)):
                step = (parts[g][0][t] - middle) / scale
                found[s, g, t] = step, [(o - middle) / scale for o in parts[g][1][t]]
    return found


@pytest.mark.parametrize("per_operation", [False, True], ids=["steps", "operations"])
@pytest.mark.parametrize("rule", ["full", "shapley", "mem_alpha", "step_gain"])
def test_advantages_agree_with_a_slow_loop(groups, inputs, rule, per_operation):
    some = [group for group in groups if group[0].num_steps > 1][:200]
    got = compared(ragged.padded(some), OTHER, rule=rule, per_operation=per_operation)
    for (s, g, t), (step, operations) in slow_advantages(some, rule, OTHER, per_operation).items():
        if not got.alive[s, t]:
            assert got.step[s, g, t] == 0
            continue
        assert got.step[s, g, t] == pytest.approx(step, abs=1e-7)
        if per_operation:
            np.testing.assert_allclose(got.operation[s, g, t, : len(operations)], operations, atol=1e-7)
        else:
            np.testing.assert_allclose(got.operation[s, g, t, : len(operations)], step, atol=1e-7)


def test_operations_average_to_their_step(inputs):
    got = compared(inputs, rule="full", per_operation=True)
    count = inputs.written.sum(-1)
    average = got.operation.sum(-1) / np.maximum(count, 1)
    np.testing.assert_allclose(average[count > 0], got.step[count > 0], atol=1e-9)


def test_the_better_operation_of_a_response_has_the_larger_advantage():
    # Both responses write two lines; in the first the second line is malformed. As steps: 1/2 against 1, so -, +.
    good, half = (Rollout(((True, second),), ((),), stream_tokens=10) for second in (True, False))
    got = compared(ragged.padded([[half, good]]), per_operation=True)
    first, second = got.operation[0, 0, 0, :2]
    assert second < got.step[0, 0, 0] < 0 < first
    np.testing.assert_allclose(got.operation[0, 1, 0, :2], got.step[0, 1, 0])


@pytest.mark.parametrize("rule", [name for name in rules.RULES if name != "hindsight_top"])
def test_a_constant_for_every_rollout_changes_nothing(groups, rule):
    # Compression adds the same to every rollout's reward here: all keep as much.
    some = [[dataclasses.replace(r, memory_tokens=50) for r in group] for group in groups[:100]]
    used = dict(rule=rule)
    a = compared(ragged.padded(some), Settings(compression_weight=0.0), **used)
    b = compared(ragged.padded(some), Settings(compression_weight=3.0), **used)
    if rules.RULES[rule].weighs_types:
        return  # The factor of a response is its own, so weighed advantages no longer add up to 0 (CREDIT: ADRPO).
    np.testing.assert_allclose(a.step, b.step, rtol=0, atol=1e-7)


def test_advantages_of_a_group_sum_to_zero(inputs):
    for channels in (False, True):
        got = compared(inputs, standardize_channels=channels)
        np.testing.assert_allclose(got.step.sum(1), 0, atol=1e-9)


def test_equal_rollouts_teach_nothing(groups):
    for rule in rules.RULES:
        if rule in ("hindsight_top", "mem_alpha"):  # These compare operations with others, and steps with other steps.
            continue
        got = compared(ragged.padded([[group[0]] * GROUP for group in groups[:50]]), rule=rule)
        assert not got.step.any() and not got.alive.any(), rule


def test_a_single_rollout_teaches_nothing(groups):
    got = compared(ragged.padded([group[:1] for group in groups[:50]]))
    assert not got.step.any() and not got.alive.any()


def test_channels_are_standardised_before_they_are_weighed():
    # Format 0, 1/2, 1 and compression 0.9, 0.8, 0.7: each is -1, 0, 1 or its opposite once standardised, so with equal
    # weights they cancel. Summed raw, format would win.
    rollouts = [
        Rollout((valid,), ((),), memory_tokens=tokens, stream_tokens=100)
        for valid, tokens in [((False, False), 10), ((False, True), 20), ((True, True), 30)]
    ]
    settings = Settings(compression_weight=1.0)
    x = ragged.padded([rollouts])
    np.testing.assert_allclose(compared(x, settings, standardize_channels=True).step[0, :, 0], 0, atol=1e-5)
    assert compared(x, settings).step[0, 2, 0] > 0.9


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("outcome", Settings(compression_weight=0.0)),  # The rule leaves the chunk reward out.
        ("full", Settings(compression_weight=0.0, chunk_weight=0.0)),
    ],
)
def test_a_group_lives_by_what_counts(rule, settings):
    # Chunk scores and memory lengths differ, and neither has a weight: there is nothing to learn from this group.
    rollouts = [
        Rollout(((True,),), ((Asked(score),),), memory_tokens=tokens, stream_tokens=100)
        for score, tokens in [(0.0, 10), (1.0, 30)]
    ]
    x = ragged.padded([rollouts])
    for channels in (False, True):
        got = compared(x, settings, rule=rule, standardize_channels=channels)
        assert not got.step.any() and not got.alive.any()
    heavier = settings._replace(compression_weight=0.01)
    assert compared(x, heavier, rule=rule, standardize_channels=True).alive[0, 0]


def test_std_floor_and_no_std_by_hand():
    # Rewards 1, 0.9, 0.8 from compression alone: std 0.1. With a floor of 0.5: ±0.1/0.5. Without: ±0.1.
    rollouts = [Rollout(((),), ((),), memory_tokens=tokens, stream_tokens=100) for tokens in (0, 10, 20)]
    settings, x = Settings(compression_weight=1.0), ragged.padded([rollouts])
    floor = compared(x, settings, Normaliser(std_floor=0.5)).step[0, :, 0]
    np.testing.assert_allclose(floor, [0.2, 0, -0.2], atol=1e-5)
    none = compared(x, settings, Normaliser(scale="none")).step[0, :, 0]
    np.testing.assert_allclose(none, [0.1, 0, -0.1], atol=1e-12)


def test_hindsight_by_hand():
    # Two rollouts answer one question, 1 and 0: A_j = ±1/√2. Its gold evidence is in chunk 0; the item that rollout 0
    # retrieved was written at step 1. S(0) = A_j, S(1) = 0.1 A_j. Nothing else differs.
    def one(score):
        asked = Asked(score, (Evidence(1, 0),), (0,), (False,), (0.0,))
        return Rollout(((True,), (True,)), ((), ()), (asked,), memory_tokens=5, stream_tokens=10)

    got = compared(ragged.padded([[one(1.0), one(0.0)]]), rule="hindsight")
    a = 1 / math.sqrt(2)
    np.testing.assert_allclose(got.step[0, :, :2], [[a, 0.1 * a], [-a, -0.1 * a]], atol=1e-5)
    assert got.alive[0, :2].all() and not got.alive[0, 2:].any()


def test_hindsight_top_keeps_the_better_half():
    def one(score):
        asked = Asked(score, (Evidence(0, 0),), (), (False,), (0.0,))
        return Rollout(
            ((True,),), ((),), (asked,), kinds=((0,),), actions=((0,),), verdicts=((None,),), stream_tokens=10
        )

    got = compared(ragged.padded([[one(1.0), one(0.0)]]), rule="hindsight_top")
    np.testing.assert_allclose(got.step[0, :, 0], [1, 0])
    assert got.alive[0, 0]


def test_type_weights_by_hand():
    # The chunk's question retrieved a semantic item (2): a response of two operations, semantic and episodic, has the
    # factors 4 and 1, as a response 2.5. The other response wrote episodic only: 1.
    chunk = ((Asked(1.0, (Evidence(0, 0, 2),)),),)
    a = Rollout(((True, True),), chunk, kinds=((2, 3),), actions=((0, 0),), verdicts=((None, None),))
    b = Rollout(((False,),), chunk, kinds=((3,),), actions=((0,),), verdicts=((None,),))
    x = ragged.padded([[a, b]])
    plain = compared(x, rule="chunk")
    weighed = compared(x, rule="type_weight")
    np.testing.assert_allclose(weighed.step[0, :, 0], plain.step[0, :, 0] * [2.5, 1], atol=1e-6)
    own, own_plain = (compared(x, rule=rule, per_operation=True) for rule in ("type_weight", "chunk"))
    np.testing.assert_allclose(own.operation[0, 0, 0, :2], own_plain.operation[0, 0, 0, :2] * [4, 1], atol=1e-6)
    unclipped = compared(x, rule="type_weight", type_factor_on="unclipped")
    np.testing.assert_allclose(unclipped.step, plain.step)
    np.testing.assert_allclose(unclipped.unclipped_factor[0, 0, 0, :2], [4, 1])


@pytest.mark.parametrize("rule", list(rules.RULES))
def test_padding_changes_nothing(groups, rule):
    some = groups[:100]
    garbled = ragged.padded(some, larger=2, garbage=np.random.default_rng(0))
    a, b = (compared(x, rule=rule) for x in (garbled, ragged.padded(some)))
    np.testing.assert_allclose(a.step[:, :, : ragged.STEPS], b.step, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(a.alive[:, : ragged.STEPS], b.alive)


@pytest.mark.parametrize("per_operation", [False, True])
@pytest.mark.parametrize("rule", list(rules.RULES))
def test_permuting_rollouts_permutes_everything(groups, rule, per_operation):
    order = [2, 0, 1]
    some = groups[:100]
    shuffled = [[group[i] for i in order] for group in some]
    a, b = (compared(ragged.padded(x), rule=rule, per_operation=per_operation) for x in (shuffled, some))
    if rule == "hindsight_top":  # Of equals it keeps the first.
        return
    np.testing.assert_allclose(a.step, b.step[:, order], rtol=0, atol=1e-9)
    np.testing.assert_allclose(a.operation, b.operation[:, order], rtol=0, atol=1e-9)
