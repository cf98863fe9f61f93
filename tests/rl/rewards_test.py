"""Tests of finemem_jax/rl/rewards.py: ragged trajectories to arrays, and the reward of a small case worked by hand."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import small_trajectories as small
from finemem_jax.rl import credit_rules, rewards
from finemem_jax.rl.credit_rules import CreditConfig
from finemem_jax.rl.grpo import Normalizer
from finemem_jax.rl.rewards import Sizes
from finemem_jax.types import Game, Likelihood, Probes
from small_trajectories import MALFORMED, SKIP, answer, answers, deleted, inserted, item, items, step, trajectory

PAPER = CreditConfig(beta=0.5, global_weight=1.0, chunk_weight=0.5, compression_weight=0.05, format_weight=1.0)
STANDARD = Normalizer()

LONG = ("aaaa", "bbbbbb")  # 10 characters, which `len` counts as tokens.
# One rollout that does well and one that does nothing; and a shorter stream without questions, twice the same.
GOOD_ROLLOUT = trajectory(
    [
        step([inserted(), inserted(), MALFORMED, MALFORMED], [answer(1.0, items((0, 0))), answer(0.0)]),
        step([inserted()], memory=[item(text="xxx")]),
    ],
    [answer(1.0, items((0, 0), (0, 1), (1, 0)), gold_steps=(0,)), answer(0.5, gold_steps=(0, 1))],
    chunks=LONG,
)
IDLE_ROLLOUT = trajectory([step(answers=answers(0.0, 0.0)), step()], answers(0.0, 0.0), rollout=1, chunks=LONG)
SKIPPED = trajectory([step([SKIP])], chunks=["cc"], name="short")
GROUPS = [[GOOD_ROLLOUT, IDLE_ROLLOUT], [SKIPPED, dataclasses.replace(SKIPPED, rollout=1)]]


def computed(groups, config=PAPER, normalizer=STANDARD, kl=None, **choices):
    inputs = rewards.to_arrays(groups, len, kl, needs=credit_rules.rule(choices.get("rule", "full")).needs)
    return rewards.compute(inputs, dataclasses.replace(config, **choices), normalizer)


# --------------------------------------------------------------------------------------
# From trajectories to arrays
# --------------------------------------------------------------------------------------


def test_collect_pads_to_the_longest():
    got = rewards.to_arrays(GROUPS, len)
    np.testing.assert_array_equal(got.step_mask, [[[1, 1], [1, 1]], [[1, 0], [1, 0]]])
    np.testing.assert_array_equal(got.chunk_scores[0, 0], [[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(got.chunk_mask[0, 0], [[True, True], [False, False]])
    assert not got.chunk_mask[1].any()
    np.testing.assert_array_equal(got.scores[0], [[1.0, 0.5], [0.0, 0.0]])
    np.testing.assert_array_equal(got.question_mask, [[[1, 1], [1, 1]], [[0, 0], [0, 0]]])
    np.testing.assert_array_equal(got.written[0, 0], [[1, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(got.valid[0, 0], [[1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(got.written.sum((-1, -2)), [[5, 0], [1, 1]])
    np.testing.assert_array_equal(got.memory_tokens, [[3, 0], [0, 0]])
    np.testing.assert_array_equal(got.stream_tokens, [[10, 10], [2, 2]])


def test_slots_count_the_operations_of_all_steps():
    # Up to 4 operations a step: operation 1 of step 0 is slot 1, operation 0 of step 1 is slot 4.
    got = rewards.to_arrays(GROUPS, len)
    np.testing.assert_array_equal(got.slot[0, 0], [[0, 1, 4], [0, 0, 0]])
    np.testing.assert_array_equal(got.is_evidence[0, 0], [[True, True, True], [False, False, False]])
    np.testing.assert_array_equal(got.chunk_slot[0, 0, 0], [[0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(got.chunk_is_evidence[0, 0, 0], [[True, False, False], [False, False, False]])


def test_gold_steps():
    got = rewards.to_arrays(GROUPS, len)
    np.testing.assert_array_equal(got.gold[0], [[[1, 0], [1, 1]], [[0, 0], [0, 0]]])


def test_citations():
    asked = [answer(1.0, items((0, 0), (0, 1)), cited=(False, True)), answer(1.0, items((0, 0)), cited=(True,))]
    got = rewards.to_arrays([[trajectory([step([inserted(), inserted()])], asked)]], len)
    np.testing.assert_array_equal(got.cited[0, 0], [[False, True], [True, False]])


def test_types_and_actions_are_numbered():
    core, fact, event = (item(memory_type=name, item_id=i) for i, name in enumerate(("core", "semantic", "episodic")))
    outcomes = [inserted(memory_type="episodic"), deleted(fact), MALFORMED, small.updated(core, "x")]
    got = rewards.to_arrays([[trajectory([step(outcomes, [answer(1.0, [event, core])])])]], len)
    # Types: flat, core, semantic, episodic. Actions as `types.Action` lists them: INSERT, UPDATE, DELETE, SKIP.
    np.testing.assert_array_equal(got.operation_type[0, 0, 0], [3, 2, 0, 1])
    np.testing.assert_array_equal(got.operation_action[0, 0, 0], [0, 2, 0, 1])
    np.testing.assert_array_equal(got.chunk_type[0, 0, 0], [[3, 1]])


def test_verdicts_of_the_content_computed():
    outcomes = [inserted(), inserted(), MALFORMED]
    rollout = trajectory([step(outcomes, verdicts=(True, False, None))])
    got = rewards.to_arrays([[rollout]], len)
    np.testing.assert_array_equal(got.content[0, 0], [[1, 0, 0, 0]])
    np.testing.assert_array_equal(got.content_mask[0, 0], [[True, True, False, False]])


def test_likelihoods_of_the_chunks():
    both = [answer(1.0, items((0, 0)), likelihood=Likelihood(-1.0, False)), answer(0.0)]
    one = [answer(None, likelihood=Likelihood(-9.0, True, closed=0.25))]
    rollout = trajectory([step([inserted()], both), step(answers=one)], answers(1.0))
    got = rewards.to_arrays([[rollout, IDLE_ROLLOUT]], len)
    np.testing.assert_allclose(got.chunk_likelihoods[0, 0], [[np.exp(-1), 0], [0.25, 0]])
    np.testing.assert_array_equal(got.likelihood_mask[0, 0], [[True, False], [True, False]])
    assert not got.likelihood_mask[0, 1].any()
    # What was not generated has no score.
    np.testing.assert_array_equal(got.chunk_mask[0, 0], [[True, True], [False, False]])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_chunk_reward_is_scores_and_likelihoods_in_parts(share):
    chunk = [
        answer(1.0, items((0, 0)), likelihood=Likelihood(-1.0, False)),
        answer(0.0, likelihood=Likelihood(-2.0, True)),
    ]
    rollout = trajectory([step([inserted()], chunk)])
    config = dataclasses.replace(PAPER, likelihood_share=share, chunk_weight=0.8)
    reward, _ = computed([[rollout, rollout]], config)
    scores, likelihoods = 0.5, (np.exp(-1) + np.exp(-2)) / 2
    np.testing.assert_allclose((reward.chunk[0, 0, 0], reward.likelihood[0, 0, 0]), (scores, likelihoods))
    without, _ = computed([[rollout, rollout]], dataclasses.replace(config, chunk_weight=0.0))
    wanted = 0.8 * ((1 - share) * scores + share * likelihoods)
    np.testing.assert_allclose((reward.total - without.total)[0, 0], wanted)
    # A rule without a chunk reward takes neither.
    reward, _ = computed([[rollout, rollout]], config, rule="evidence")
    np.testing.assert_allclose(reward.total, without.total)


def test_an_answer_without_a_verdict_is_left_out():
    asked = [answer(1.0), answer(None), answer(0.0)]
    rollout = trajectory([step(answers=[answer(None), answer(1.0)]), step(answers=[answer(None)])], asked)
    got = rewards.to_arrays([[rollout]], len)
    np.testing.assert_array_equal(got.question_mask[0, 0], [True, False, True])
    np.testing.assert_array_equal(got.chunk_mask[0, 0], [[False, True], [False, False]])
    reward, _ = computed([[rollout, rollout]])
    assert reward.outcome[0, 0] == 0.5
    np.testing.assert_array_equal(reward.chunk[0, 0], [1.0, 0.0])


def test_ablation_compares_like_with_like():
    """Where what an answer is worth without an item is a likelihood, so is what it is worth with it."""
    asked, written = [answer(0.0, items((0, 0)))], [step([inserted()])]
    probes = Probes(full=(0.75,), without=((0.5,),))
    rollout = trajectory(written, asked, probes=probes)
    got = rewards.to_arrays([[rollout]], len)
    np.testing.assert_array_equal(got.full[0, 0], [0.75])
    reward, _ = computed([[rollout, rollout]], dataclasses.replace(PAPER, beta=1.0), rule="ablation")
    np.testing.assert_allclose(reward.credit[0, 0], [0.25])


def test_what_was_not_measured_is_absent():
    got = rewards.to_arrays(GROUPS, len)
    absent = {name for name, value in got._asdict().items() if value is None}
    assert absent == {
        "cited", "content", "content_mask", "state_scores", "without", "subset_scores", "player_slot", "is_player",
        "kl", "full", "chunk_likelihoods", "likelihood_mask",
    }  # fmt: skip


def test_states_stand_in_the_slots_of_their_operations():
    # Two slots a step. Step 0 wrote one operation, so slot 1 repeats what slot 0 left.
    first = trajectory(
        [step([inserted()]), step([inserted(), inserted()])],
        answers(1.0, 1.0),
        probes=Probes(empty=(0.0, 0.25), states=(((0.5, 0.25),), ((0.5, 0.75), (1.0, 1.0)))),
    )
    # Nothing written in step 0, and step 1 does not exist.
    second = trajectory([step()], answers(0.5), name="other", probes=Probes(empty=(0.5,), states=((),)))
    got = rewards.to_arrays([[first], [second]], len)
    np.testing.assert_array_equal(
        got.state_scores[0, 0], [[0.0, 0.25], [0.5, 0.25], [0.5, 0.25], [0.5, 0.75], [1.0, 1.0]]
    )
    np.testing.assert_array_equal(got.state_scores[1, 0], [[0.5, 0.0]] * 5)


def test_scores_without_single_items():
    asked = [answer(1.0, items((0, 0), (0, 1))), answer(0.0), answer(1.0, items((0, 1)))]
    probes = Probes(without=((0.0, 1.0), (), (0.5,)))
    got = rewards.to_arrays([[trajectory([step([inserted(), inserted()])], asked, probes=probes)]], len)
    np.testing.assert_array_equal(got.without[0, 0], [[0.0, 1.0], [0.0, 0.0], [0.5, 0.0]])


def test_games_of_fewer_players_repeat_their_scores():
    games = (
        Game(((0, 1), (1, 0)), (0.0, 0.25, 0.5, 1.0)),
        Game(((1, 1),), (0.0, 1.0)),  # With a second player that changes nothing: 0 and 1, with and without it.
        Game((), (0.5,)),
    )
    steps = [step([inserted(), inserted()]), step([inserted(), inserted()])]
    got = rewards.to_arrays([[trajectory(steps, answers(1.0, 1.0, 0.5), probes=Probes(games=games))]], len)
    np.testing.assert_array_equal(
        got.subset_scores[0, 0], [[0.0, 0.25, 0.5, 1.0], [0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]
    )
    np.testing.assert_array_equal(got.is_player[0, 0], [[True, True], [True, False], [False, False]])
    np.testing.assert_array_equal(got.player_slot[0, 0], [[1, 2], [3, 0], [0, 0]])


def test_divergence_from_the_starting_weights():
    got = rewards.to_arrays(GROUPS, len, kl=[[[0.5, -0.25], [1.0, 2.0]], [[3.0], [4.0]]])
    np.testing.assert_array_equal(got.kl, [[[0.5, -0.25], [1.0, 2.0]], [[3.0, 0.0], [4.0, 0.0]]])


def test_without_any_question_or_operation_there_is_one_empty_slot():
    got = rewards.to_arrays([[trajectory([step()])]], len)
    assert got.scores.shape == (1, 1, 1)
    assert got.slot.shape == (1, 1, 1, 1)
    assert got.chunk_scores.shape == (1, 1, 1, 1)
    assert got.written.shape == (1, 1, 1, 1)
    assert not (got.question_mask.any() or got.is_evidence.any() or got.chunk_mask.any() or got.written.any())


def test_arrays_are_as_large_as_is_said_unless_more_comes():
    sizes = Sizes(steps=5, operations=4, chunk_questions=2, questions=3, evidence=3, tokens=7)
    got = rewards.to_arrays(GROUPS, len, sizes=sizes)
    assert got.chunk_slot.shape[2:] == (5, 2, 3) and got.slot.shape[2:] == (3, 3) and got.written.shape[2:] == (5, 4)
    many = trajectory([step([MALFORMED] * 9)] * 11, answers(*[1.0] * 9))
    got = rewards.to_arrays([[many]], len, sizes=sizes)
    assert got.written.shape[2:] == (12, 16) and got.scores.shape[2:] == (10,)


@pytest.mark.parametrize("rule", list(credit_rules.RULES))
def test_larger_arrays_change_no_reward(rule):
    config = dataclasses.replace(PAPER, rule=rule)
    needs = credit_rules.rule(rule).needs
    sizes = Sizes(steps=7, operations=8, chunk_questions=3, questions=5, evidence=4)
    (want, advantage), (got, again) = (
        rewards.compute(rewards.to_arrays(GROUPS, len, sizes=some, needs=needs), config, STANDARD)
        for some in (Sizes(), sizes)
    )
    steps = want.total.shape[2]
    np.testing.assert_allclose(got.total[..., :steps], want.total, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(again.step[..., :steps], advantage.step, rtol=1e-6, atol=1e-9)


def test_rounding_up_changes_no_reward():
    crowded = dataclasses.replace(IDLE_ROLLOUT, steps=(step([MALFORMED] * 9), step()))
    inputs = rewards.to_arrays([[GOOD_ROLLOUT, crowded]], len)
    assert inputs.written.shape == (1, 2, 2, 16)
    np.testing.assert_array_equal(inputs.slot[0, 0, 0], [0, 1, 16])
    alone, _ = computed([[GOOD_ROLLOUT, IDLE_ROLLOUT]])
    beside, _ = rewards.compute(inputs, PAPER, STANDARD)
    np.testing.assert_allclose(beside.total[0, 0], alone.total[0, 0], rtol=1e-12)


# --------------------------------------------------------------------------------------
# From arrays to rewards and advantages
# --------------------------------------------------------------------------------------


def test_judge_by_hand():
    # Stream 0, rollout 0. r_global = (1 + 0.5) / 2 = 3/4.
    # N: q0 gives 1/2, a third of it to each of its items; q1 has no evidence and gives 1/4, half to each step.
    #   N_0 = 1/3 + 1/8 = 11/24,  N_1 = 1/6 + 1/8 = 7/24;  together 3/4.
    # r_EARA = (1/2)(3/4)/2 + N/2:  3/16 + 11/48 = 5/12,  3/16 + 7/48 = 1/3.
    # r_fmt = 1/2, 1.  r_chunk = 1/2, 0.  r_comp = 1 - 3/10 = 7/10.
    # r_0 = 5/12 + 1/2 + 1/4 + 7/200 = 721/600,  r_1 = 1/3 + 1 + 0 + 7/200 = 821/600.
    # Rollout 1 wrote nothing: r = 0.05 · 1. Stream 1 skipped: r = 1 + 0.05.
    reward, advantage = computed(GROUPS)
    close: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reward.outcome, [[3 / 4, 0], [0, 0]], **close)
    np.testing.assert_allclose(reward.contribution[0], [[11 / 24, 7 / 24], [0, 0]], **close)
    np.testing.assert_allclose(reward.credit[0], [[5 / 12, 1 / 3], [0, 0]], **close)
    np.testing.assert_allclose(reward.format, [[[0.5, 1], [0, 0]], [[1, 0], [1, 0]]], **close)
    np.testing.assert_allclose(reward.chunk[0], [[0.5, 0], [0, 0]], **close)
    np.testing.assert_allclose(reward.compression, [[[0.7, 0.7], [1, 1]], [[1, 0], [1, 0]]], **close)
    np.testing.assert_allclose(reward.total, [[[721 / 600, 821 / 600], [0.05, 0.05]], [[1.05, 0], [1.05, 0]]], **close)
    np.testing.assert_array_equal([reward.content, reward.kl], np.zeros((2, 2, 2, 2)))
    # Of two, the better is 1/√2 above the mean in standard deviations (ddof 1), whatever lies between them.
    np.testing.assert_allclose(advantage.step[0], np.array([[1, 1], [-1, -1]]) / np.sqrt(2), rtol=1e-5)
    np.testing.assert_array_equal(advantage.step[1], 0)
    np.testing.assert_array_equal(advantage.alive, [[True, True], [False, False]])


def test_operations_by_hand():
    # The first rollout above, whose steps wrote 4 operations and 1.
    # Each item of q0's evidence reward its writer (1/2)(1/2)/3 = 1/12; the step as a whole has 3/16 + 1/16 = 1/4.
    #   Credit: 1/12 + 1/16 = 7/48 for the two that wrote evidence, 1/16 for the malformed; 1/12 + 1/4 in step 1.
    # In r_0, operation 0 has 1/12, half of the 1/2 that the chunk's question gave, and 1/4 of r_fmt: 7/12; operation 1
    # has 1/12 + 1/4 = 1/3; the step has 1/4 + 7/200 = 57/200. Were all four like one of them: 4 · 7/12 + 57/200, …
    reward, _ = computed(GROUPS)
    close: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reward.operation_credit[0, 0], [[7 / 48, 7 / 48, 1 / 16, 1 / 16], [1 / 3, 0, 0, 0]])
    whole = 57 / 200
    wanted = [[7 / 3 + whole, 4 / 3 + whole, whole, whole], [13 / 12 + whole, 0, 0, 0]]
    np.testing.assert_allclose(reward.operation_total[0, 0], wanted, **close)
    np.testing.assert_allclose(reward.operation_total[0, 0, 0].mean(), reward.total[0, 0, 0], **close)


def test_judge_is_float64_on_the_host():
    reward, advantage = computed(GROUPS)
    for array in (*reward, advantage.step, advantage.operation, advantage.unclipped_factor):
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float64


@pytest.mark.parametrize("part", ["credit", "chunk", "compression", "format"])
def test_a_weight_of_zero_takes_its_part_out(part):
    weight = "global_weight" if part == "credit" else f"{part}_weight"
    reward, _ = computed(GROUPS, dataclasses.replace(PAPER, **{weight: 0.0}))
    parts = {
        "credit": reward.credit,
        "chunk": 0.5 * reward.chunk,
        "compression": 0.05 * reward.compression,
        "format": reward.format,
    }
    wanted = sum(value for name, value in parts.items() if name != part)
    np.testing.assert_allclose(reward.total, wanted, rtol=1e-12)
    np.testing.assert_allclose(reward.credit.sum(-1), reward.outcome, rtol=1e-12)


def test_divergence_is_subtracted():
    kl = [[[0.5, -0.25], [1.0, 2.0]], [[3.0], [4.0]]]
    without, _ = computed(GROUPS, kl=kl)
    with_it, _ = computed(GROUPS, dataclasses.replace(PAPER, kl_weight=0.1), kl=kl)
    np.testing.assert_array_equal(with_it.kl, [[[0.5, -0.25], [1.0, 2.0]], [[3.0, 0.0], [4.0, 0.0]]])
    np.testing.assert_allclose(with_it.total, without.total - 0.1 * with_it.kl, rtol=1e-12)


def test_a_blank_stream_does_not_divide_by_zero():
    blank = trajectory([step([SKIP])], chunks=[""], name="blank")
    inputs = rewards.to_arrays([[blank, blank]], len)
    assert inputs.stream_tokens.tolist() == [[1, 1]]
    reward, _ = rewards.compute(inputs, PAPER, STANDARD)
    assert np.isfinite(reward.total).all()


def test_swapping_rollouts_swaps_their_rewards():
    one, one_advantage = computed(GROUPS)
    other, other_advantage = computed([group[::-1] for group in GROUPS])
    np.testing.assert_array_equal(one.total, other.total[:, ::-1])
    np.testing.assert_array_equal(one_advantage.step, other_advantage.step[:, ::-1])


def test_shapley_credits_the_players_of_each_game():
    # Padded to two players. q0: φ = (0.75/2 + 0.25/2, 0.5/2 + 0.75/2) by both orders: (3/8, 5/8); q1: 1 to (1, 1).
    #   N = (3/16, 5/16 + 1/2). r_global = 1: half of it evenly, half by N: 1/4 + 3/32, 1/4 + 13/32.
    games = (Game(((0, 1), (1, 0)), (0.0, 0.25, 0.5, 1.0)), Game(((1, 1),), (0.0, 1.0)))
    steps = [step([inserted(), inserted()]), step([inserted(), inserted()])]
    rollout = trajectory(steps, answers(1.0, 1.0), probes=Probes(games=games))
    reward, _ = computed([[rollout, rollout]], rule="shapley")
    np.testing.assert_allclose(reward.credit[0, 0], [11 / 32, 21 / 32], rtol=1e-12)
    # Of 1/4 for the step as a whole, each of its two operations has half.
    operation = np.array([[0, 3 / 32], [5 / 32, 1 / 4]]) + 1 / 8
    np.testing.assert_allclose(reward.operation_credit[0, 0], operation, rtol=1e-12)


def test_step_gain_credits_each_change_of_the_memory():
    steps = [step([inserted(), deleted(item())]), step([inserted()])]
    probes = Probes(empty=(0.0,), states=(((1.0,), (0.25,)), ((0.5,),)))
    rollout = trajectory(steps, answers(0.5), probes=probes)
    reward, _ = computed([[rollout, rollout]], rule="step_gain")
    np.testing.assert_allclose(reward.operation_credit[0, 0], [[1.0, -0.75], [0.25, 0.0]], rtol=1e-12)


# --------------------------------------------------------------------------------------
# From steps and operations to tokens
# --------------------------------------------------------------------------------------

# Only r_fmt counts. Rollout 0 wrote a valid and a malformed operation and rollout 1 a valid one: r = 1/2, 1; mean 3/4.
ONLY_FORMAT = CreditConfig(global_weight=0.0, chunk_weight=0.0, compression_weight=0.0, format_weight=1.0)
WROTE_TWO = trajectory([step([inserted(), MALFORMED], response="abcd", token_operations=(0, 0, 1, -1, -1))])
WROTE_ONE = trajectory([step([inserted()], response="ab", token_operations=(0, 0, -1))], rollout=1)


@pytest.mark.parametrize(
    ("per_operation", "first", "second"),
    [
        # Every token has its response's: 1/2 - 3/4 and 1 - 3/4.
        (False, [-0.25, -0.25, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25]),
        # The valid operations have 1 - 3/4, the malformed one 0 - 3/4; tokens of none have their response's.
        (True, [0.25, 0.25, -0.75, -0.25, -0.25], [0.25, 0.25, 0.25]),
    ],
)
def test_tokens_carry_the_advantage_of_their_operation(per_operation, first, second):
    groups = [[WROTE_TWO, WROTE_ONE]]
    plain = Normalizer(scale="none")
    _, advantage = computed(groups, ONLY_FORMAT, plain, rule="outcome", per_operation=per_operation)
    advantages, factors = rewards.per_token(groups, advantage)
    assert advantages.shape == factors.shape == (1, 2, 1, 5)
    np.testing.assert_allclose(advantages[0, 0, 0], first, rtol=1e-6)
    np.testing.assert_allclose(advantages[0, 1, 0, :3], second, rtol=1e-6)
    np.testing.assert_array_equal(factors, 1)


def test_tokens_carry_the_factor_of_their_operation():
    # Only facts were retrieved: what is written about facts counts four times, in the unclipped term.
    facts = [item(memory_type="semantic")]
    first = trajectory(
        [
            step(
                [inserted(memory_type="semantic"), inserted(memory_type="episodic")],
                [answer(1.0, facts)],
                response="abc",
                token_operations=(0, 1, -1, -1),
            )
        ]
    )
    groups = [[first, dataclasses.replace(WROTE_ONE, stream=first.stream)]]
    _, advantage = computed(groups, rule="type_weight", type_factor_on="unclipped", per_operation=True)
    _, factors = rewards.per_token(groups, advantage)
    np.testing.assert_array_equal(factors[0, 0, 0], [4, 1, 1, 1])
    np.testing.assert_array_equal(factors[0, 1, 0], [1, 1, 1, 1])


def test_spread_is_what_training_takes():
    _, advantage = computed(GROUPS)
    advantages, factors = rewards.per_token(GROUPS, advantage)
    assert advantages.shape[:3] == advantage.step.shape
    # No token belongs to an operation here, so each has its step's.
    np.testing.assert_allclose(advantages[..., 0], advantage.step, rtol=1e-6)
    assert np.isfinite(factors).all()


@pytest.mark.parametrize("rule", list(credit_rules.RULES))
def test_no_rule_needs_global_questions(rule):
    """Streams may have none; then nobody probed anything, and the rest of the reward still counts."""
    rollouts = [
        trajectory([step([written]), step([inserted()])], rollout=i, chunks=LONG)
        for i, written in enumerate((MALFORMED, inserted()))
    ]
    reward, advantage = computed([rollouts], rule=rule)
    # r_global is 0; only Memory-R2's penalty for bloat needs no question.
    assert not reward.credit.any() or rule in ("persession", "cumulative")
    assert np.isfinite(advantage.step).all()
    assert rule == "hindsight_top" or advantage.step[0, 1, 0] > 0 > advantage.step[0, 0, 0]
