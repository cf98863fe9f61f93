"""Tests of finemem_jax/rules.py: every rule against a slow loop, its laws, and advantages by hand."""

import dataclasses
import functools
import math
import random
import statistics

import jax
import numpy as np
import pytest
import ragged
from ragged import Asked, Evidence, Rollout

from finemem_jax import config, rules
from finemem_jax.grpo import Normaliser
from finemem_jax.rules import Settings, Variant

NUM_BATCHES = 1_000
GROUP = 3
PAPER, PLAIN = Settings(), Normaliser()
OTHER = Settings(0.3, 2.0, 0.7, -0.1, 0.4, 0.2, 0.05, 0.5, 0.2, 3.0, -4.0)
CREDITING = [name for name, rule in rules.RULES.items() if rule.attribute]
CONSERVING = [name for name, rule in rules.RULES.items() if rule.sums_to == "r_global"]


def float64(function, inputs, settings, *rest):
    """As `rewards.judge` calls them."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(inputs, Settings(*map(np.float64, settings)), *rest))


def earned(inputs, settings=PAPER, **variant):
    return float64(rules.step_rewards, inputs, settings, Variant(**variant))[0]


def compared(inputs, settings=PAPER, normaliser=PLAIN, **variant):
    chosen = Variant(**variant)
    _, channels = float64(rules.step_rewards, inputs, settings, chosen)
    return float64(lambda x, s: rules.advantages(x, channels, s, chosen, normaliser), inputs, settings)


@pytest.fixture(scope="module")
def groups():
    rng = random.Random(0)
    found = [ragged.random_group(rng, GROUP) for _ in range(NUM_BATCHES)]
    # The edges that the laws are about do occur.
    rollouts = [rollout for group in found for rollout in group]
    assert any(not r.asked for r in rollouts) and any(r.num_steps == 1 for r in rollouts)
    assert any(not any(r.chunk) for r in rollouts) and any(not any(r.operations) for r in rollouts)
    assert any(r.asked and not any(a.evidence for a in r.asked) for r in rollouts)
    return found


@pytest.fixture(scope="module")
def inputs(groups):
    return ragged.padded(groups)


# --------------------------------------------------------------------------------------
# Rewards
# --------------------------------------------------------------------------------------


def test_step_rewards_by_hand():
    # β = 1/2. Two questions: 1, on items of (0,0), (0,1) and (2,0); 1/2, on items of (1,0) and (2,0).
    # N = (1/3, 1/8, 7/24), r_EARA = (7/24, 3/16, 13/48). Chunk scores (1, 0), none, (1/2): weighted 1/4, 0, 1/4.
    # Operations valid 2 of 2, 0 of 1, 1 of 1: format 1, 0, 1. 20 tokens kept of 100: 4/5, weighted 1/25.
    rollout = Rollout(
        operations=((True, True), (False,), (True,)),
        chunk=((Asked(1.0), Asked(0.0)), (), (Asked(0.5),)),
        asked=(
            Asked(1.0, (Evidence(0, 0), Evidence(0, 1), Evidence(2, 0)), cited=(False,) * 3, without=(0.0,) * 3),
            Asked(0.5, (Evidence(1, 0), Evidence(2, 0)), cited=(False,) * 2, without=(0.0,) * 2),
        ),
        memory_tokens=20,
        stream_tokens=100,
    )
    got = earned(ragged.padded([[rollout]]))
    expected = [7 / 24 + 1 + 1 / 4 + 1 / 25, 3 / 16 + 0 + 0 + 1 / 25, 13 / 48 + 1 + 1 / 4 + 1 / 25]
    np.testing.assert_allclose(got.total[0, 0], [*expected, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(got.compression[0, 0], [0.8, 0.8, 0.8, 0, 0])
    np.testing.assert_allclose(got.outcome[0, 0], 0.75)
    # Of step 0: uniform share 1/8, split over two operations; evidence 1/2 * 1/6 each.
    np.testing.assert_allclose(got.operation_credit[0, 0, 0], [1 / 16 + 1 / 12, 1 / 16 + 1 / 12, 0])
    assert got.operation_credit[0, 0, 3:].max() == 0


@pytest.mark.parametrize("settings", [Settings(), OTHER], ids=["paper", "other"])
@pytest.mark.parametrize("rule", CREDITING)
def test_agrees_with_a_slow_loop(groups, inputs, rule, settings):
    got = earned(inputs, settings, rule=rule)
    used = rules.RULES[rule]
    slow = functools.partial(
        ragged.slow_parts, rule, settings=settings, chunk=used.chunk, content="content" in used.needs
    )
    total, operations = np.zeros_like(got.total), np.zeros_like(got.operation_total)
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            for t, (reward, own) in enumerate(zip(*slow(rollout), strict=True)):
                total[s, g, t] = reward
                operations[s, g, t, : len(own)] = own
    np.testing.assert_allclose(got.total, total, rtol=0, atol=1e-10)
    np.testing.assert_allclose(got.operation_total, operations, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("rule", "variant", "slow"),
    [
        ("step_gain", dict(gain_transform="log"), dict(transform="log")),
        ("ablation", dict(ablation_conserves=True), dict(conserves=True)),
    ],
)
def test_variants_agree_with_a_slow_loop(groups, inputs, rule, variant, slow):
    got = earned(inputs, OTHER, rule=rule, **variant).credit
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            amounts = ragged.slow_credit(rule, rollout, OTHER, **slow)
            for t in range(rollout.num_steps):
                expected = sum(amount for (step, _), amount in amounts.items() if step == t)
                assert got[s, g, t] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rule", CONSERVING)
def test_credit_is_conserved(groups, inputs, rule, beta):
    got = earned(inputs, Settings(beta=beta), rule=rule)
    outcome = [[ragged.mean(a.score for a in r.asked) for r in group] for group in groups]
    np.testing.assert_allclose(got.credit.sum(-1), outcome, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.contribution.sum(-1), outcome, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.outcome, outcome, rtol=0, atol=1e-12)


def test_ablation_conserves_if_asked_to(groups, inputs):
    got = earned(inputs, Settings(beta=1.0), rule="ablation", ablation_conserves=True)
    np.testing.assert_allclose(got.credit.sum(-1), got.outcome, rtol=0, atol=1e-12)


def test_step_gain_sums_to_the_gain(groups, inputs):
    got = earned(inputs, rule="step_gain")
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            states = [rollout.empty, *(state for step in rollout.states for state in step)]
            expected = ragged.mean(states[-1]) - ragged.mean(states[0])
            assert got.credit[s, g].sum() == pytest.approx(expected, abs=1e-12)


def test_shapley_sums_to_what_all_players_gain(groups, inputs):
    got = earned(inputs, Settings(beta=1.0), rule="shapley")
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            expected = ragged.mean(a.coalitions[-1] - a.coalitions[0] for a in rollout.asked)
            assert got.credit[s, g].sum() == pytest.approx(expected, abs=1e-12)


def test_shapley_of_one_item_is_the_gain_of_its_step():
    # One question, one item, written at step 1: 0.2 without it, 0.9 with it.
    asked = Asked(
        0.9, (Evidence(1, 0),), cited=(False,), without=(0.2,), players=(Evidence(1, 0),), coalitions=(0.2, 0.9)
    )
    rollout = Rollout(((True,), (True,)), ((), ()), (asked,), empty=(0.2,), states=(((0.2,),), ((0.9,),)))
    x = ragged.padded([[rollout]])
    shapley = earned(x, Settings(beta=1.0), rule="shapley").credit[0, 0]
    np.testing.assert_allclose(shapley, [0, 0.7, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(earned(x, rule="step_gain").credit[0, 0], shapley, atol=1e-12)
    np.testing.assert_allclose(earned(x, Settings(beta=1.0), rule="ablation").credit[0, 0], shapley, atol=1e-12)


def test_evidence_without_beta_is_the_outcome(inputs):
    a, b = earned(inputs, Settings(beta=0.0), rule="evidence"), earned(inputs, rule="outcome")
    np.testing.assert_array_equal(a.credit, b.credit)


@pytest.mark.parametrize("everything", [True, False], ids=["all cited", "none cited"])
def test_cited_is_evidence_when_nothing_is_told_apart(inputs, everything):
    x = inputs._replace(cited=np.full_like(inputs.cited, everything))
    np.testing.assert_allclose(earned(x, rule="cited").credit, earned(inputs, rule="full").credit, atol=1e-12)


def test_a_harmful_delete_is_charged():
    # Step 0 wrote the answer, step 1 deleted it. As players: the writer and the deleter; only the writer without the
    # deleter leaves it there. Coalitions (bit 0 writer, bit 1 deleter): nobody 0, writer 1, deleter 0, both 0.
    asked = Asked(0.0, players=(Evidence(0, 0), Evidence(1, 0)), coalitions=(0.0, 1.0, 0.0, 0.0))
    rollout = Rollout(((True,), (True,)), ((), ()), (asked,), empty=(0.0,), states=(((1.0,),), ((0.0,),)))
    x = ragged.padded([[rollout]])
    np.testing.assert_allclose(earned(x, Settings(beta=1.0), rule="shapley").credit[0, 0, :2], [0.5, -0.5])
    np.testing.assert_allclose(earned(x, rule="step_gain").credit[0, 0, :2], [1, -1])


@pytest.mark.parametrize("rule", list(rules.RULES))
def test_padding_changes_nothing(groups, rule):
    some = groups[:100]
    expected, got = (earned(x, rule=rule) for x in (ragged.padded(some), garbled(some)))
    for name, a, b in zip(rules.Rewards._fields, got, expected, strict=True):
        if a.ndim > 2:
            assert not a[:, :, ragged.STEPS :].any(), name
            a = a[:, :, : ragged.STEPS]
        np.testing.assert_allclose(a[..., : b.shape[-1]], b, rtol=0, atol=1e-12, err_msg=name)
    a, b = (compared(x, rule=rule) for x in (garbled(some), ragged.padded(some)))
    np.testing.assert_allclose(a.step[:, :, : ragged.STEPS], b.step, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(a.alive[:, : ragged.STEPS], b.alive)


def garbled(some):
    return ragged.padded(some, larger=2, garbage=np.random.default_rng(0))


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


def test_float32_is_the_default_and_agrees(groups):
    x = ragged.padded([[dataclasses.replace(r, stream_tokens=400) for r in group] for group in groups])
    got, _ = rules.step_rewards(x, Settings(), Variant())
    assert {part.dtype for part in got} == {np.dtype(np.float32)}
    expected = earned(x)
    assert {part.dtype for part in expected} == {np.dtype(np.float64)}
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_stream_without_questions_earns_no_credit():
    rollout = Rollout(((True,), (True,)), ((Asked(1.0),), (Asked(0.0),)), memory_tokens=10, stream_tokens=20)
    got = earned(ragged.padded([[rollout]]))
    assert not got.outcome.any() and not got.contribution.any() and not got.credit.any()
    # What is left: 1 + 1/2 * r_chunk + 1/20 * 1/2.
    np.testing.assert_allclose(got.total[0, 0, :2], [1 + 0.5 + 0.025, 1 + 0.025])


def test_the_config_knows_all_rules():
    assert set(config.RULE_NAMES) == set(rules.RULES)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="credit.rule must be one of outcome, chunk"):
        rules.rule("Outcome")


# --------------------------------------------------------------------------------------
# Advantages
# --------------------------------------------------------------------------------------


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


def test_rules_differ_where_they_must(inputs):
    credits = {name: earned(inputs, rule=name).credit for name in CREDITING}
    same = [{"outcome", "chunk", "type_weight"}, {"evidence", "full"}]
    for a in credits:
        for b in credits:
            equal = np.allclose(credits[a], credits[b])
            assert equal == (a == b or any({a, b} <= group for group in same)), (a, b)
