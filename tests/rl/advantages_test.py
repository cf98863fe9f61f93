"""Tests of finemem_jax/rl/advantages.py: against slow loops, its laws, and by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import ragged
from finemem_jax.rl import advantages, credit_rules
from finemem_jax.rl.credit_rules import CreditConfig
from finemem_jax.rl.grpo import Normalizer
from ragged import Asked, Evidence, Rollout

GROUP = 3
PAPER, PLAIN = CreditConfig(), Normalizer()
OTHER = CreditConfig(0.3, 2.0, 0.7, -0.1, 0.4, 0.2, 0.05, 0.5, 0.2, 3.0, -4.0)
CAREFUL = Normalizer(ddof=0, epsilon=0.01, std_floor=0.3)
# All that comparing knows of a rule is its group, whether it credits rollouts apart, and whether it weighs types.
KINDS = ["full", "mem_alpha", "hindsight", "type_weight"]


def terms_of(inputs, config, rule):
    # Without the choices that only matter when rollouts are compared: each would be compiled again.
    return ragged.float64(credit_rules.step_rewards, inputs, dataclasses.replace(config, rule=rule))[1]


def computed(inputs, config=PAPER, normalizer=PLAIN, **choices):
    config = dataclasses.replace(config, **choices)
    terms = terms_of(inputs, config, config.rule)
    return ragged.float64(lambda x, c: advantages.compute(x, terms, c, normalizer), inputs, config)


@pytest.fixture(scope="module")
def groups():
    return ragged.thousand_groups(GROUP)


@pytest.fixture(scope="module")
def inputs(groups):
    # Larger than need be and full of garbage where nothing is: agreement with a slow loop says that no padding is read.
    return ragged.padded(groups, larger=2, garbage=np.random.default_rng(0))


# --------------------------------------------------------------------------------------
# The same again, one number at a time
# --------------------------------------------------------------------------------------


def slow_standardized(values, weights, normalizer):
    """One group, and whether its entries differ."""
    total = sum(weights)
    middle = sum(w * x for w, x in zip(weights, values, strict=True)) / total
    if max(abs(x - middle) for x in values) <= 1e-6 * max(1.0, *map(abs, values)):
        return [0.0] * len(values), False
    scale = 1.0
    if normalizer.scale == "std":
        variance = sum(w * (x - middle) ** 2 for w, x in zip(weights, values, strict=True)) / (total - normalizer.ddof)
        scale = max(math.sqrt(variance), normalizer.std_floor) + normalizer.epsilon
    return [(x - middle) / scale for x in values], True


def slow_group(parts, together, per_operation, normalizer):
    """{(g, t): (A of the step, [A of each operation], alive)} of the steps of one stream that are compared."""
    where, values, weights = [], [], []
    for g, (totals, operations) in enumerate(parts):
        for t in together:
            entries = (operations[t] if per_operation else None) or [totals[t]]
            for entry in entries:
                where.append((g, t))
                values.append(entry)
                weights.append(1 / len(entries))
    standardized, alive = slow_standardized(values, weights, normalizer)
    found = {}
    for place, value in zip(where, standardized, strict=True):
        found.setdefault(place, []).append(value)
    return {
        # A step without operations has an advantage all the same.
        (g, t): (ragged.mean(own), (own if per_operation else own * ragged.OPERATIONS)[: len(parts[g][1][t])], alive)
        for (g, t), own in found.items()
    }


def slow_hindsight(group, config, normalizer):
    """{(g, t): (what the step has as a whole, [what each operation has])}."""
    together = range(len(group[0].asked))
    against = [slow_standardized([r.asked[j].score for r in group], [1] * len(group), normalizer)[0] for j in together]
    found = {}
    for g, rollout in enumerate(group):
        for t, operations in enumerate(rollout.operations):
            whole = ragged.mean(against[j][g] * (t in rollout.asked[j].gold) for j in together)
            own = [
                ragged.mean(
                    against[j][g]
                    * config.used_weight
                    * sum((item.step, item.operation) == (t, o) for item in rollout.asked[j].evidence)
                    for j in together
                )
                for o in range(len(operations))
            ]
            found[g, t] = whole, own
    return found


def slow_factors(rollout, t, config):
    """ADRPO: α for operations on the memory type that the chunk's questions retrieved most, 1 for others."""
    counts = [0] * ragged.TYPES
    for asked in rollout.chunk[t]:
        for item in asked.evidence:
            counts[item.kind] += item.kind != ragged.CORE
    most = counts.index(max(counts))
    return [config.type_factor if counts[most] and kind == most else 1.0 for kind in rollout.kinds[t]]


def slow_stream(group, rule, config, normalizer, per_operation=False, channels=False, factor_on="advantage"):
    """{(g, t): (A of the step, [A of each operation], [unclipped factor of each], alive)}."""
    used = credit_rules.RULES[rule]
    if channels:
        # One part at a time: rewards in which nothing else counts.
        nothing = dataclasses.replace(config, **{name: 0.0 for name in vars(config) if name.endswith("_weight")})
        nothing = dataclasses.replace(nothing, bloat_weight=config.bloat_weight, used_weight=config.used_weight)
        names = ["global_weight", "format_weight", "compression_weight", "kl_weight"]
        names += ["chunk_weight"] * used.chunk + ["content_weight"] * ("content" in used.needs)
        summands = [(getattr(config, name), dataclasses.replace(nothing, **{name: 1.0})) for name in names]
    else:
        summands = [(1.0, config)]
    steps = range(group[0].num_steps)
    found = {}
    for weight, only in summands:
        if not used.attribute:
            only = dataclasses.replace(only, global_weight=0.0)
        parts = [ragged.slow_parts(rule, r, only, chunk=used.chunk, content="content" in used.needs) for r in group]
        for together in [steps] if used.group == "stream" else [[t] for t in steps]:
            for place, (step, own, alive) in slow_group(parts, together, per_operation, normalizer).items():
                before = found.get(place, (0.0, [0.0] * len(own), False))
                sums = [a + weight * b for a, b in zip(before[1], own, strict=True)]
                found[place] = before[0] + weight * step, sums, before[2] or (alive and weight != 0)
    if not used.attribute:
        credited = slow_hindsight(group, config, normalizer)
        for (g, t), (whole, own) in credited.items():
            total = whole + sum(own)
            each = [len(own) * c + whole if per_operation else total for c in own]
            step, operations, alive = found[g, t]
            operations = [a + config.global_weight * b for a, b in zip(operations, each, strict=True)]
            alive = alive or any(abs(credited[i, t][0] + sum(credited[i, t][1])) > 1e-12 for i in range(len(group)))
            found[g, t] = step + config.global_weight * total, operations, alive
    weighed = {}
    for (g, t), (step, operations, alive) in found.items():
        factors = slow_factors(group[g], t, config) if used.weighs_types else [1.0] * len(operations)
        if factor_on == "advantage":
            row = ragged.mean(factors) if factors else 1.0
            each = factors if per_operation else [row] * len(factors)
            operations = [a * f for a, f in zip(operations, each, strict=True)]
            step, factors = step * row, [1.0] * len(factors)
        weighed[g, t] = step, operations, factors, alive
    return weighed


@pytest.mark.parametrize(
    ("rule", "choices", "normalizer"),
    [
        ("full", dict(), PLAIN),
        ("full", dict(per_operation=True), PLAIN),
        ("full", dict(), CAREFUL),
        ("full", dict(per_operation=True), Normalizer(scale="none")),
        ("full", dict(standardize_channels=True), PLAIN),
        ("full", dict(standardize_channels=True, per_operation=True), PLAIN),
        ("mem_alpha", dict(), PLAIN),
        ("mem_alpha", dict(per_operation=True), PLAIN),
        ("hindsight", dict(), PLAIN),
        ("hindsight", dict(per_operation=True), CAREFUL),
        ("type_weight", dict(), PLAIN),
        ("type_weight", dict(per_operation=True), PLAIN),
        ("type_weight", dict(type_factor_on="unclipped"), PLAIN),
    ],
)
def test_agrees_with_a_slow_loop(groups, inputs, rule, choices, normalizer):
    got = computed(inputs, OTHER, normalizer, rule=rule, **choices)
    slow = {name.removeprefix("standardize_").removeprefix("type_"): value for name, value in choices.items()}
    expected = advantages.Advantages(*(np.zeros_like(part) for part in got))
    expected.unclipped_factor[...] = got.unclipped_factor  # Of operations that do not exist: anything.
    for s, group in enumerate(groups):
        for (g, t), (step, own, factors, alive) in slow_stream(group, rule, OTHER, normalizer, **slow).items():
            expected.step[s, g, t], expected.alive[s, t] = step, alive
            expected.operation[s, g, t, : len(own)] = own
            expected.unclipped_factor[s, g, t, : len(own)] = factors
    np.testing.assert_array_equal(got.alive, expected.alive)
    for name in ("step", "operation", "unclipped_factor"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-7, atol=1e-7, err_msg=name)


def test_hindsight_top_agrees_with_a_slow_loop(groups, inputs):
    """1,000 batches of two streams each: stream s and the next. Of each kind the better half, over the whole batch."""
    batches = jax.tree.map(
        lambda a: np.stack([a, np.roll(a, -1, 0)], 1), (inputs, terms_of(inputs, PAPER, "hindsight_top"))
    )

    def compute(batches, config):
        return jax.vmap(lambda x, terms: advantages.compute(x, terms, config, PLAIN))(*batches)

    got = ragged.float64(compute, batches, dataclasses.replace(PAPER, rule="hindsight_top", per_operation=True))
    streams = [slow_hindsight(group, PAPER, PLAIN) for group in groups]
    for b in range(len(groups)):
        kept, dropped = {}, {}
        for place, s in enumerate((b, (b + 1) % len(groups))):
            for (g, t), (whole, own) in streams[s].items():
                taken = got.operation[b, place, g, t]
                assert got.step[b, place, g, t] == pytest.approx(ragged.mean(taken[: len(own)]))
                assert got.alive[b, place, t] == got.operation[b, place, :, t].any()
                for o, c in enumerate(own):
                    score, valid = len(own) * c + whole, groups[s][g].operations[t][o]
                    assert taken[o] in ((0, 1) if valid else (0,))
                    if valid:
                        (kept if taken[o] else dropped).setdefault(groups[s][g].actions[t][o], []).append(score)
        for kind in kept | dropped:
            top, rest = kept.get(kind, []), dropped.get(kind, [])
            # Half of them, rounded up, and none of the others better: which of equals, rounding decides.
            assert len(top) - len(rest) in (0, 1)
            assert not rest or min(top) >= max(rest) - 1e-12


def test_per_token_agrees_with_a_slow_loop(inputs):
    got = computed(inputs, OTHER, rule="type_weight", per_operation=True, type_factor_on="unclipped")
    rng = np.random.default_rng(0)
    owners = rng.integers(-1, ragged.OPERATIONS, (*got.step.shape, 7))
    values, factors = map(np.asarray, advantages.per_token(got, owners))
    for at in np.ndindex(owners.shape):
        o = owners[at]
        step, operation = got.step[at[:3]], got.operation[at[:3]]
        assert values[at] == np.float32(step if o < 0 else operation[o])
        assert factors[at] == np.float32(1 if o < 0 else got.unclipped_factor[at[:3]][o])


# --------------------------------------------------------------------------------------
# Laws
# --------------------------------------------------------------------------------------


def test_operations_average_to_their_step(inputs):
    got = computed(inputs, rule="full", per_operation=True)
    count = inputs.written.sum(-1)
    average = got.operation.sum(-1) / np.maximum(count, 1)
    np.testing.assert_allclose(average[count > 0], got.step[count > 0], atol=1e-9)


@pytest.mark.parametrize("rule", KINDS)
def test_a_constant_for_every_rollout_changes_nothing(inputs, rule):
    # Compression adds the same to every rollout's reward here: all keep as much.
    alike = inputs._replace(memory_tokens=np.full_like(inputs.memory_tokens, 50))
    a, b = (computed(alike, CreditConfig(compression_weight=weight), rule=rule) for weight in (0.0, 3.0))
    np.testing.assert_allclose(a.step, b.step, rtol=0, atol=1e-7)


def test_advantages_of_a_group_sum_to_zero(inputs):
    for apart in (False, True):
        got = computed(inputs, standardize_channels=apart)
        np.testing.assert_allclose(got.step.sum(1), 0, atol=1e-9)


@pytest.mark.parametrize("rule", [rule for rule in KINDS if rule != "mem_alpha"])  # It compares steps with other steps.
def test_equal_rollouts_teach_nothing(inputs, rule):
    got = computed(jax.tree.map(lambda a: a[:, [0] * GROUP], inputs), rule=rule)
    assert not got.step.any() and not got.alive.any()


def test_a_single_rollout_teaches_nothing(groups):
    got = computed(ragged.padded([group[:1] for group in groups[:50]]))
    assert not got.step.any() and not got.alive.any()


@pytest.mark.parametrize("rule", ["full", "hindsight_top"])
def test_padding_changes_nothing(groups, inputs, rule):
    a, b = (computed(x, rule=rule) for x in (inputs, ragged.padded(groups)))
    np.testing.assert_allclose(a.step[:, :, : ragged.STEPS], b.step, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(a.alive[:, : ragged.STEPS], b.alive)


@pytest.mark.parametrize("per_operation", [False, True])
@pytest.mark.parametrize("rule", KINDS)  # Not hindsight_top: of equals it keeps the first.
def test_permuting_rollouts_permutes_everything(inputs, rule, per_operation):
    order = [2, 0, 1]
    shuffled = jax.tree.map(lambda a: a[:, order], inputs)
    a, b = (computed(x, rule=rule, per_operation=per_operation) for x in (shuffled, inputs))
    np.testing.assert_allclose(a.step, b.step[:, order], rtol=0, atol=1e-9)
    np.testing.assert_allclose(a.operation, b.operation[:, order], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------


def test_the_better_operation_of_a_response_has_the_larger_advantage():
    # Both responses write two lines; in the first the second line is malformed. As steps: 1/2 against 1, so -, +.
    good, half = (Rollout(((True, second),), ((),), stream_tokens=10) for second in (True, False))
    got = computed(ragged.padded([[half, good]]), per_operation=True)
    first, second = got.operation[0, 0, 0, :2]
    assert second < got.step[0, 0, 0] < 0 < first
    np.testing.assert_allclose(got.operation[0, 1, 0, :2], got.step[0, 1, 0])


def test_terms_are_standardized_before_they_are_weighted():
    # Format 0, 1/2, 1 and compression 0.9, 0.8, 0.7: each is -1, 0, 1 or its opposite once standardised, so with equal
    # weights they cancel. Summed raw, format would win.
    rollouts = [
        Rollout((valid,), ((),), memory_tokens=tokens, stream_tokens=100)
        for valid, tokens in [((False, False), 10), ((False, True), 20), ((True, True), 30)]
    ]
    config = CreditConfig(compression_weight=1.0)
    x = ragged.padded([rollouts])
    np.testing.assert_allclose(computed(x, config, standardize_channels=True).step[0, :, 0], 0, atol=1e-5)
    assert computed(x, config).step[0, 2, 0] > 0.9


@pytest.mark.parametrize(
    ("rule", "config"),
    [
        ("outcome", CreditConfig(compression_weight=0.0)),  # The rule leaves the chunk reward out.
        ("full", CreditConfig(compression_weight=0.0, chunk_weight=0.0)),
    ],
)
def test_a_group_lives_by_what_counts(rule, config):
    # Chunk scores and memory lengths differ, and neither has a weight: there is nothing to learn from this group.
    rollouts = [
        Rollout(((True,),), ((Asked(score),),), memory_tokens=tokens, stream_tokens=100)
        for score, tokens in [(0.0, 10), (1.0, 30)]
    ]
    x = ragged.padded([rollouts])
    for apart in (False, True):
        got = computed(x, config, rule=rule, standardize_channels=apart)
        assert not got.step.any() and not got.alive.any()
    heavier = dataclasses.replace(config, compression_weight=0.01)
    assert computed(x, heavier, rule=rule, standardize_channels=True).alive[0, 0]


def test_hindsight_lives_by_its_weight():
    rollouts = [Rollout(((True,),), ((),), (Asked(score, gold=(0,)),)) for score in (0.0, 1.0)]
    for weight in (0.0, 1.0):
        got = computed(ragged.padded([rollouts]), CreditConfig(global_weight=weight), rule="hindsight")
        assert got.step.any() == got.alive.any() == bool(weight)


def test_std_floor_and_no_std_by_hand():
    # Rewards 1, 0.9, 0.8 from compression alone: std 0.1. With a floor of 0.5: ±0.1/0.5. Without: ±0.1.
    rollouts = [Rollout(((),), ((),), memory_tokens=tokens, stream_tokens=100) for tokens in (0, 10, 20)]
    config, x = CreditConfig(compression_weight=1.0), ragged.padded([rollouts])
    floor = computed(x, config, Normalizer(std_floor=0.5)).step[0, :, 0]
    np.testing.assert_allclose(floor, [0.2, 0, -0.2], atol=1e-5)
    none = computed(x, config, Normalizer(scale="none")).step[0, :, 0]
    np.testing.assert_allclose(none, [0.1, 0, -0.1], atol=1e-12)


def test_hindsight_by_hand():
    # Two rollouts answer one question, 1 and 0: A_j = ±1/√2. Its gold evidence is in chunk 0; the item that rollout 0
    # retrieved was written at step 1. S(0) = A_j, S(1) = 0.1 A_j. Nothing else differs.
    def one(score):
        asked = Asked(score, (Evidence(1, 0),), (0,), (False,), (0.0,))
        return Rollout(((True,), (True,)), ((), ()), (asked,), memory_tokens=5, stream_tokens=10)

    got = computed(ragged.padded([[one(1.0), one(0.0)]]), rule="hindsight")
    a = 1 / math.sqrt(2)
    np.testing.assert_allclose(got.step[0, :, :2], [[a, 0.1 * a], [-a, -0.1 * a]], atol=1e-5)
    assert got.alive[0, :2].all() and not got.alive[0, 2:].any()


def test_hindsight_top_keeps_the_better_half():
    def one(score):
        asked = Asked(score, (Evidence(0, 0),), (), (False,), (0.0,))
        return Rollout(
            ((True,),), ((),), (asked,), kinds=((0,),), actions=((0,),), verdicts=((None,),), stream_tokens=10
        )

    got = computed(ragged.padded([[one(1.0), one(0.0)]]), rule="hindsight_top")
    np.testing.assert_allclose(got.step[0, :, 0], [1, 0])
    assert got.alive[0, 0]


def test_type_weights_by_hand():
    # The chunk's question retrieved a semantic item (2): a response of two operations, semantic and episodic, has the
    # factors 4 and 1, as a response 2.5. The other response wrote episodic only: 1.
    chunk = ((Asked(1.0, (Evidence(0, 0, 2),)),),)
    a = Rollout(((True, True),), chunk, kinds=((2, 3),), actions=((0, 0),), verdicts=((None, None),))
    b = Rollout(((False,),), chunk, kinds=((3,),), actions=((0,),), verdicts=((None,),))
    x = ragged.padded([[a, b]])
    plain = computed(x, rule="chunk")
    weighed = computed(x, rule="type_weight")
    np.testing.assert_allclose(weighed.step[0, :, 0], plain.step[0, :, 0] * [2.5, 1], atol=1e-6)
    own, own_plain = (computed(x, rule=rule, per_operation=True) for rule in ("type_weight", "chunk"))
    np.testing.assert_allclose(own.operation[0, 0, 0, :2], own_plain.operation[0, 0, 0, :2] * [4, 1], atol=1e-6)
    unclipped = computed(x, rule="type_weight", type_factor_on="unclipped")
    np.testing.assert_allclose(unclipped.step, plain.step)
    np.testing.assert_allclose(unclipped.unclipped_factor[0, 0, 0, :2], [4, 1])
