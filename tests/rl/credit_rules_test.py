"""Tests of finemem_jax/rl/credit_rules.py: every rule against a slow loop, and its laws."""

import dataclasses
import functools

import numpy as np
import pytest

import ragged
from finemem_jax.config.rules import RULE_NAMES
from finemem_jax.rl import credit_rules
from finemem_jax.rl.credit_rules import CreditConfig
from ragged import Asked, Evidence, Rollout

GROUP = 3
PAPER = CreditConfig()
OTHER = CreditConfig(0.3, 2.0, 0.7, -0.1, 0.4, 0.2, 0.05, 0.5, 0.2, 3.0, -4.0)
CREDITING = [name for name, rule in credit_rules.RULES.items() if rule.attribute]
CONSERVING = [name for name, rule in credit_rules.RULES.items() if rule.sums_to == "r_global"]


def rewards(inputs, config=PAPER, **choices):
    return ragged.float64(credit_rules.step_rewards, inputs, dataclasses.replace(config, **choices))[0]


@pytest.fixture(scope="module")
def groups():
    return ragged.thousand_groups(GROUP)


@pytest.fixture(scope="module")
def inputs(groups):
    # Larger than need be and full of garbage where nothing is: agreement with a slow loop says that no padding is read.
    return ragged.padded(groups, larger=2, garbage=np.random.default_rng(0))


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
    got = rewards(ragged.padded([[rollout]]))
    expected = [7 / 24 + 1 + 1 / 4 + 1 / 25, 3 / 16 + 0 + 0 + 1 / 25, 13 / 48 + 1 + 1 / 4 + 1 / 25]
    np.testing.assert_allclose(got.total[0, 0], [*expected, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(got.compression[0, 0], [0.8, 0.8, 0.8, 0, 0])
    np.testing.assert_allclose(got.outcome[0, 0], 0.75)
    # Of step 0: uniform share 1/8, split over two operations; evidence 1/2 * 1/6 each.
    np.testing.assert_allclose(got.operation_credit[0, 0, 0], [1 / 16 + 1 / 12, 1 / 16 + 1 / 12, 0])
    assert got.operation_credit[0, 0, 3:].max() == 0


@pytest.mark.parametrize("config", [CreditConfig(), OTHER], ids=["paper", "other"])
@pytest.mark.parametrize("rule", CREDITING)
def test_agrees_with_a_slow_loop(groups, inputs, rule, config):
    got = rewards(inputs, config, rule=rule)
    used = credit_rules.RULES[rule]
    slow = functools.partial(ragged.slow_parts, rule, config=config, chunk=used.chunk, content="content" in used.needs)
    total, operations = np.zeros_like(got.total), np.zeros_like(got.operation_total)
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            for t, (reward, own) in enumerate(zip(*slow(rollout), strict=True)):
                total[s, g, t] = reward
                operations[s, g, t, : len(own)] = own
    np.testing.assert_allclose(got.total, total, rtol=0, atol=1e-10)
    np.testing.assert_allclose(got.operation_total, operations, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("rule", "choices", "slow"),
    [
        ("step_gain", dict(gain_transform="log"), dict(transform="log")),
        ("ablation", dict(ablation_conserves=True), dict(conserves=True)),
    ],
)
def test_variants_agree_with_a_slow_loop(groups, inputs, rule, choices, slow):
    got = rewards(inputs, OTHER, rule=rule, **choices).credit
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            amounts = ragged.slow_credit(rule, rollout, OTHER, **slow)
            for t in range(rollout.num_steps):
                expected = sum(amount for (step, _), amount in amounts.items() if step == t)
                assert got[s, g, t] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rule", CONSERVING)
def test_credit_is_conserved(groups, inputs, rule, beta):
    got = rewards(inputs, CreditConfig(beta=beta), rule=rule)
    outcome = [[ragged.mean(a.score for a in r.asked) for r in group] for group in groups]
    np.testing.assert_allclose(got.credit.sum(-1), outcome, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.contribution.sum(-1), outcome, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.outcome, outcome, rtol=0, atol=1e-12)


def test_ablation_conserves_if_asked_to(groups, inputs):
    got = rewards(inputs, CreditConfig(beta=1.0), rule="ablation", ablation_conserves=True)
    np.testing.assert_allclose(got.credit.sum(-1), got.outcome, rtol=0, atol=1e-12)


def test_step_gain_sums_to_the_gain(groups, inputs):
    got = rewards(inputs, rule="step_gain")
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            states = [rollout.empty, *(state for step in rollout.states for state in step)]
            expected = ragged.mean(states[-1]) - ragged.mean(states[0])
            assert got.credit[s, g].sum() == pytest.approx(expected, abs=1e-12)


def test_shapley_sums_to_what_all_players_gain(groups, inputs):
    got = rewards(inputs, CreditConfig(beta=1.0), rule="shapley")
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
    shapley = rewards(x, CreditConfig(beta=1.0), rule="shapley").credit[0, 0]
    np.testing.assert_allclose(shapley, [0, 0.7, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(rewards(x, rule="step_gain").credit[0, 0], shapley, atol=1e-12)
    np.testing.assert_allclose(rewards(x, CreditConfig(beta=1.0), rule="ablation").credit[0, 0], shapley, atol=1e-12)


def test_evidence_without_beta_is_the_outcome(inputs):
    a, b = rewards(inputs, CreditConfig(beta=0.0), rule="evidence"), rewards(inputs, rule="outcome")
    np.testing.assert_array_equal(a.credit, b.credit)


@pytest.mark.parametrize("everything", [True, False], ids=["all cited", "none cited"])
def test_cited_is_evidence_when_nothing_is_told_apart(inputs, everything):
    x = inputs._replace(cited=np.full_like(inputs.cited, everything))
    np.testing.assert_allclose(rewards(x, rule="cited").credit, rewards(inputs, rule="full").credit, atol=1e-12)


def test_a_harmful_delete_is_charged():
    # Step 0 wrote the answer, step 1 deleted it. As players: the writer and the deleter; only the writer without the
    # deleter leaves it there. Coalitions (bit 0 writer, bit 1 deleter): nobody 0, writer 1, deleter 0, both 0.
    asked = Asked(0.0, players=(Evidence(0, 0), Evidence(1, 0)), coalitions=(0.0, 1.0, 0.0, 0.0))
    rollout = Rollout(((True,), (True,)), ((), ()), (asked,), empty=(0.0,), states=(((1.0,),), ((0.0,),)))
    x = ragged.padded([[rollout]])
    np.testing.assert_allclose(rewards(x, CreditConfig(beta=1.0), rule="shapley").credit[0, 0, :2], [0.5, -0.5])
    np.testing.assert_allclose(rewards(x, rule="step_gain").credit[0, 0, :2], [1, -1])


@pytest.mark.parametrize("rule", ["full", "shapley", "hindsight"])
def test_padding_changes_nothing(groups, inputs, rule):
    expected, got = (rewards(x, rule=rule) for x in (ragged.padded(groups), inputs))
    for name, a, b in zip(credit_rules.Rewards._fields, got, expected, strict=True):
        if a.ndim > 2:
            assert not a[:, :, ragged.STEPS :].any(), name
            a = a[:, :, : ragged.STEPS]
        np.testing.assert_allclose(a[..., : b.shape[-1]], b, rtol=0, atol=1e-12, err_msg=name)


def test_float32_is_the_default_and_agrees(groups):
    x = ragged.padded([[dataclasses.replace(r, stream_tokens=400) for r in group] for group in groups])
    got, _ = credit_rules.step_rewards(x, CreditConfig())
    assert {part.dtype for part in got} == {np.dtype(np.float32)}
    expected = rewards(x)
    assert {part.dtype for part in expected} == {np.dtype(np.float64)}
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_stream_without_questions_earns_no_credit():
    rollout = Rollout(((True,), (True,)), ((Asked(1.0),), (Asked(0.0),)), memory_tokens=10, stream_tokens=20)
    got = rewards(ragged.padded([[rollout]]))
    assert not got.outcome.any() and not got.contribution.any() and not got.credit.any()
    # What is left: 1 + 1/2 * r_chunk + 1/20 * 1/2.
    np.testing.assert_allclose(got.total[0, 0, :2], [1 + 0.5 + 0.025, 1 + 0.025])


def test_the_config_knows_all_rules():
    assert set(RULE_NAMES) == set(credit_rules.RULES)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="credit.rule must be one of outcome, chunk"):
        credit_rules.rule("Outcome")


def test_rules_differ_where_they_must(inputs):
    credits = {name: rewards(inputs, rule=name).credit for name in CREDITING}
    same = [{"outcome", "chunk", "type_weight"}, {"evidence", "full"}]
    for a in credits:
        for b in credits:
            equal = np.allclose(credits[a], credits[b])
            assert equal == (a == b or any({a, b} <= group for group in same)), (a, b)
