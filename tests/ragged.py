"""Random ragged rollouts for the tests of credit, and every rule as a slow loop over plain lists."""

import dataclasses
import functools
import itertools
import math
import random
from typing import Any

import jax
import numpy as np

from finemem_jax.rl.credit_rules import RewardInputs

STEPS, OPERATIONS, QUESTIONS, PER_CHUNK, EVIDENCE, PLAYERS = 5, 3, 4, 3, 3, 3
# Memory types: flat, core (exempt), semantic, episodic.
TYPES, CORE = 4, 1


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One retrieved item: which operation of which step wrote it, and its memory type."""

    step: int
    operation: int
    kind: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question: its score, and all that a rule may want to know."""

    score: float
    evidence: tuple[Evidence, ...] = ()
    gold: tuple[int, ...] = ()
    cited: tuple[bool, ...] = ()
    without: tuple[float, ...] = ()
    players: tuple[Evidence, ...] = ()
    coalitions: tuple[float, ...] = (0.0,)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One rollout as ragged lists. `states` holds the scores after each operation of each step; `empty` before any."""

    operations: tuple[tuple[bool, ...], ...]  # Validity of each, step by step.
    chunk: tuple[tuple[Asked, ...], ...]
    asked: tuple[Asked, ...] = ()
    memory_tokens: int = 0
    stream_tokens: int = 1
    kinds: tuple[tuple[int, ...], ...] = ()
    actions: tuple[tuple[int, ...], ...] = ()
    verdicts: tuple[tuple[float | None, ...], ...] = ()
    empty: tuple[float, ...] = ()
    states: tuple[tuple[tuple[float, ...], ...], ...] = ()
    kl: tuple[float, ...] = ()

    @property
    def num_steps(self):
        return len(self.operations)


def random_group(rng: random.Random, group_size: int) -> list[Rollout]:
    """The rollouts of one stream: same steps and questions; other scores, evidence and operations."""
    steps = rng.randint(1, STEPS)
    # Of the streams a quarter has no questions, of the chunks a quarter none, of the questions a quarter no evidence.
    questions = rng.choice([0, rng.randint(1, QUESTIONS)]) if rng.random() < 0.5 else QUESTIONS
    per_chunk = [rng.choice([0, rng.randint(1, PER_CHUNK)]) for _ in range(steps)]
    golds = [tuple(sorted(rng.sample(range(steps), rng.randint(0, min(2, steps))))) for _ in range(questions)]
    empty = tuple(rng.random() for _ in range(questions))
    stream_tokens = rng.randint(1, 400)

    def one() -> Rollout:
        operations = tuple(tuple(rng.random() < 0.7 for _ in range(rng.randint(0, OPERATIONS))) for _ in range(steps))
        writers = [(t, o) for t in range(steps) for o in range(len(operations[t]))]

        def evidence(most_steps):
            possible = [w for w in writers if w[0] < most_steps]
            count = rng.randint(0, EVIDENCE) if possible else 0
            return tuple(Evidence(*rng.choice(possible), rng.randrange(TYPES)) for _ in range(count))

        def asked(most_steps, gold=()):
            found = evidence(most_steps)
            players = tuple(rng.sample(found, rng.randint(0, len(found))))
            return Asked(
                score=rng.choice([0.0, 1.0, rng.random()]),
                evidence=found,
                gold=gold,
                cited=tuple(rng.random() < 0.5 for _ in found),
                without=tuple(rng.random() for _ in found),
                players=players,
                coalitions=tuple(rng.random() for _ in range(2 ** len(players))),
            )

        return Rollout(
            operations=operations,
            chunk=tuple(tuple(asked(t + 1) for _ in range(n)) for t, n in enumerate(per_chunk)),
            asked=tuple(asked(steps, gold) for gold in golds),
            memory_tokens=rng.randint(0, 500),
            stream_tokens=stream_tokens,
            kinds=tuple(tuple(rng.randrange(TYPES) for _ in step) for step in operations),
            actions=tuple(tuple(rng.randrange(3) for _ in step) for step in operations),
            verdicts=tuple(tuple(rng.choice([0.0, 1.0, None]) for _ in step) for step in operations),
            empty=empty,
            states=tuple(tuple(tuple(rng.random() for _ in golds) for _ in step) for step in operations),
            kl=tuple(rng.gauss(0, 1) for _ in operations),
        )

    return [one() for _ in range(group_size)]


@functools.cache
def thousand_groups(group_size: int) -> list[list[Rollout]]:
    """The same 1,000 streams for every test."""
    rng = random.Random(0)
    found = [random_group(rng, group_size) for _ in range(1_000)]
    # The edges that the laws are about do occur.
    rollouts = [rollout for group in found for rollout in group]
    assert any(not r.asked for r in rollouts) and any(r.num_steps == 1 for r in rollouts)
    assert any(not any(r.chunk) for r in rollouts) and any(not any(r.operations) for r in rollouts)
    assert any(r.asked and not any(a.evidence for a in r.asked) for r in rollouts)
    return found


def padded(groups, larger: int = 0, garbage: np.random.Generator | None = None) -> RewardInputs:
    """[S, G, ...] arrays; every size is `larger` than it must be; `garbage` fills all places that no mask holds."""
    t, o, q, j, k, p = (size + larger for size in (STEPS, OPERATIONS, QUESTIONS, PER_CHUNK, EVIDENCE, PLAYERS))
    p = PLAYERS  # 2^P coalitions are no padding.
    shape = (len(groups), len(groups[0]))

    def floats(*size):
        # NaN is the hardest of all garbage: even zero times NaN is NaN.
        return np.zeros((*shape, *size)) if garbage is None else np.full((*shape, *size), np.nan)

    def counts(*size, below=t * o):
        return np.zeros((*shape, *size), int) if garbage is None else garbage.integers(0, below, (*shape, *size))

    def mask(*size):
        return np.zeros((*shape, *size), bool)

    x = RewardInputs(
        step_mask=mask(t),
        chunk_scores=floats(t, j), chunk_mask=mask(t, j),
        chunk_slot=counts(t, j, k), chunk_is_evidence=mask(t, j, k), chunk_type=counts(t, j, k, below=TYPES),
        scores=floats(q), question_mask=mask(q), slot=counts(q, k), is_evidence=mask(q, k), gold=mask(q, t),
        written=mask(t, o), valid=mask(t, o),
        operation_type=counts(t, o, below=TYPES), operation_action=counts(t, o, below=3),
        memory_tokens=np.zeros(shape, int), stream_tokens=np.ones(shape, int),
        cited=mask(q, k), content=floats(t, o), content_mask=mask(t, o),
        state_scores=floats(t * o + 1, q), without=floats(q, k),
        subset_scores=floats(q, 2**p), player_slot=counts(q, p), is_player=mask(q, p), kl=floats(t),
    )  # fmt: skip
    for s, g in itertools.product(range(shape[0]), range(shape[1])):
        _fill(x, (s, g), groups[s][g], o)
    return x


def float64(function, inputs, config):
    """Calls a function as `rewards.compute` does."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(inputs, jax.tree.map(np.float64, config)))


def _fill(x, at, rollout, o):
    x.memory_tokens[at], x.stream_tokens[at] = rollout.memory_tokens, rollout.stream_tokens
    for j, one in enumerate(rollout.asked):
        x.scores[at][j], x.question_mask[at][j] = one.score, True
        x.gold[at][j, list(one.gold)] = True
        for k, item in enumerate(one.evidence):
            x.slot[at][j, k], x.is_evidence[at][j, k] = item.step * o + item.operation, True
            x.cited[at][j, k], x.without[at][j, k] = one.cited[k], one.without[k]
        for p, item in enumerate(one.players):
            x.player_slot[at][j, p], x.is_player[at][j, p] = item.step * o + item.operation, True
        # Players that do not exist change nothing.
        for coalition in range(x.subset_scores.shape[-1]):
            x.subset_scores[at][j, coalition] = one.coalitions[coalition % len(one.coalitions)]
    state = rollout.empty
    for n in range(x.state_scores.shape[2]):
        t, number = divmod(n - 1, o)
        if n and t < len(rollout.states) and number < len(rollout.states[t]):
            state = rollout.states[t][number]
        x.state_scores[at][n, : len(state)] = state
    for t, valid in enumerate(rollout.operations):
        x.step_mask[at][t], x.kl[at][t] = True, rollout.kl[t] if rollout.kl else 0.0
        for i, is_valid in enumerate(valid):
            x.written[at][t, i], x.valid[at][t, i] = True, is_valid
            if rollout.kinds:
                x.operation_type[at][t, i], x.operation_action[at][t, i] = rollout.kinds[t][i], rollout.actions[t][i]
                verdict = rollout.verdicts[t][i]
                x.content[at][t, i], x.content_mask[at][t, i] = verdict or 0.0, verdict is not None
        for j, one in enumerate(rollout.chunk[t]):
            x.chunk_scores[at][t, j], x.chunk_mask[at][t, j] = one.score, True
            for k, item in enumerate(one.evidence):
                x.chunk_slot[at][t, j, k], x.chunk_is_evidence[at][t, j, k] = item.step * o + item.operation, True
                x.chunk_type[at][t, j, k] = item.kind


# --------------------------------------------------------------------------------------
# The rules again, one number at a time. Each gives {(step, operation or None): credit}; None is the step as a whole.
# --------------------------------------------------------------------------------------


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def slow_credit(rule, rollout, config, transform="prob", conserves=False):
    """What a rule makes of one rollout's global scores."""
    steps, questions = rollout.num_steps, len(rollout.asked)
    r_global = mean(one.score for one in rollout.asked)
    credited = {(t, None): 0.0 for t in range(steps)}

    def give(t, o, amount):
        credited[t, o] = credited.get((t, o), 0.0) + amount

    if rule in ("outcome", "chunk", "type_weight"):
        for t in range(steps):
            give(t, None, r_global / steps)
    elif rule == "mem_alpha":
        for t in range(steps):
            give(t, None, r_global)
    elif rule in ("persession", "cumulative"):
        over = max(0.0, rollout.memory_tokens - 0.7 * rollout.stream_tokens) / rollout.stream_tokens
        per_step = [
            mean(a.score for a in rollout.asked if t in (a.gold or (steps - 1,))) - config.bloat_weight * over
            for t in range(steps)
        ]
        for t in range(steps):
            give(t, None, mean(per_step[t:]) if rule == "cumulative" else per_step[t])
    elif rule == "step_gain":

        def value(scores):
            if transform == "log":
                scores = [math.log(max(s, math.exp(config.gain_floor))) for s in scores]
            return mean(scores)

        before = value(rollout.empty)
        for t, states in enumerate(rollout.states):
            for o, scores in enumerate(states):
                give(t, o, value(scores) - before)
                before = value(scores)
    else:
        for t in range(steps):
            give(t, None, (1 - config.beta) * r_global / steps)
        for one in rollout.asked:
            for t, o, amount in _worths(rule, one, steps, conserves):
                give(t, o, config.beta * amount / questions)
    return credited


def _worths(rule, one, steps, conserves):
    """(step, operation, worth) of everything that question j credits."""
    if rule == "shapley":
        everyone = range(len(one.players))
        for p in everyone:
            worth, orders = 0.0, list(itertools.permutations(everyone))
            for order in orders:  # The definition: what p adds when it joins, over all orders of joining.
                before = sum(1 << other for other in order[: order.index(p)])
                worth += (one.coalitions[before | 1 << p] - one.coalitions[before]) / len(orders)
            yield one.players[p].step, one.players[p].operation, worth
        return
    if rule == "ablation":
        gains = [one.score - w for w in one.without]
        if conserves:
            positive = [max(gain, 0.0) for gain in gains]
            total = sum(positive)
            gains = [one.score * (w / total if total else 1 / len(gains)) for w in positive]
    elif rule == "cited":
        count = sum(one.cited)
        gains = [one.score * (c / count if count else 1 / len(one.cited)) for c in one.cited]
    else:
        gains = [one.score / len(one.evidence) for _ in one.evidence]
    if not one.evidence and (rule != "ablation" or conserves):
        for t in range(steps):
            yield t, None, one.score / steps
    for item, gain in zip(one.evidence, gains, strict=True):
        yield item.step, item.operation, gain


def slow_parts(rule, rollout, config, transform="prob", conserves=False, chunk=True, content=False):
    """r_t of every step, and the same as if the step were like each of its operations: lists, and lists of lists."""
    compression = 1 - rollout.memory_tokens / rollout.stream_tokens
    credited: Any = slow_credit(rule, rollout, config, transform, conserves)
    totals, per_operation = [], []
    for t, valid in enumerate(rollout.operations):
        n = len(valid)
        own = [0.0] * n
        whole = config.global_weight * credited[t, None] + config.compression_weight * compression
        whole -= config.kl_weight * (rollout.kl[t] if rollout.kl else 0.0)
        judged = [v for v in rollout.verdicts[t] if v is not None] if rollout.verdicts else []
        for o in range(n):
            own[o] += config.global_weight * credited.get((t, o), 0.0) + config.format_weight * valid[o] / n
            if content and rollout.verdicts[t][o] is not None:
                own[o] += config.content_weight * rollout.verdicts[t][o] / len(judged)
        for one in rollout.chunk[t] if chunk else ():
            weight = config.chunk_weight * one.score / len(rollout.chunk[t])
            for item in one.evidence:
                if item.step == t:
                    own[item.operation] += weight / len(one.evidence)
                else:
                    whole += weight / len(one.evidence)
            whole += 0 if one.evidence else weight
        totals.append(sum(own) + whole)
        per_operation.append([n * c + whole for c in own])
    return totals, per_operation
