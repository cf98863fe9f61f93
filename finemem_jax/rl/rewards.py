"""Turns trajectories into reward arrays, and these into the advantage of every token.

One of the two places where text becomes numbers; the other is `batching`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from finemem_jax.rl import advantages as advantages_lib
from finemem_jax.rl import credit_rules
from finemem_jax.rl.advantages import Advantages
from finemem_jax.rl.credit_rules import CreditConfig, RewardInputs, Rewards
from finemem_jax.rl.grpo import Normalizer
from finemem_jax.runtime import compilation
from finemem_jax.types import MEMORY_TYPES, Action, Answer, Malformed, Trajectory

_TYPES = ("", *MEMORY_TYPES)
_ACTIONS = tuple(Action)
assert len(_TYPES) == credit_rules.NUM_TYPES and _TYPES[credit_rules.CORE_TYPE] == MEMORY_TYPES[0]


class Sizes(NamedTuple):
    """How many of each there may be. Arrays are that large, or larger where that is not enough, so that few compile.

    Attributes:
        operations: Of one response. Where there are more, arrays are twice as large, or four times, ….
        chunk_questions, questions: Of one chunk, and of a stream as a whole.
        evidence: Items retrieved for a question.
        tokens: Of one response.
    """

    steps: int = 1
    operations: int = 1
    chunk_questions: int = 1
    questions: int = 1
    evidence: int = 1
    tokens: int = 1


def to_arrays(
    groups: Sequence[Sequence[Trajectory]],
    count_tokens: Callable[[str], int],
    kl: Sequence[Sequence[Sequence[float]]] | None = None,
    *,
    sizes: Sizes = Sizes(),  # noqa: B008  It cannot be changed.
    needs: frozenset[str] = frozenset(),
) -> RewardInputs:
    """Gathers what was measured on the rollouts of each stream, padded to `sizes`.

    Args:
        groups: groups[s][i] is rollout i of stream s.
        count_tokens: Length of a text in tokens; r_comp's unit.
        kl: kl[s][i][t], Σ over the response's tokens of log π_old - log π_ref, in nats.
        needs: What the rule must have measured (`credit_rules.Rule.needs`): there are arrays for it even where there
            was nothing to measure.
    """
    rollouts = [trajectory for group in groups for trajectory in group]
    x = _empty(rollouts, (len(groups), len(groups[0])), _enough(sizes, rollouts), needs)
    if kl is not None:
        x = x._replace(kl=np.zeros(x.step_mask.shape))
    for s, group in enumerate(groups):
        stream_tokens = max(sum(count_tokens(chunk.text) for chunk in group[0].stream.chunks), 1)
        for g, rollout in enumerate(group):
            at = s, g
            x.stream_tokens[at] = stream_tokens
            x.memory_tokens[at] = sum(count_tokens(item.text) for item in rollout.steps[-1].memory.items)
            if x.kl is not None and kl is not None:
                x.kl[at][: len(kl[s][g])] = kl[s][g]
            _fill_steps(x, at, rollout)
            _fill_answers(x, at, rollout)
            _fill_probes(x, at, rollout)
    return x


def _enough(sizes: Sizes, rollouts: Sequence[Trajectory]) -> Sizes:
    """Enlarges `sizes` where some rollout has more."""
    chunk_answers = [answer for r in rollouts for step in r.steps for answer in step.answers]
    final_answers = [answer for r in rollouts for answer in r.answers]
    operations = sizes.operations
    while operations < max((len(step.outcomes) for r in rollouts for step in r.steps), default=0):
        operations *= 2
    return sizes._replace(
        steps=_size(sizes.steps, (len(r.steps) for r in rollouts)),
        operations=operations,
        chunk_questions=_size(sizes.chunk_questions, (len(step.answers) for r in rollouts for step in r.steps)),
        questions=_size(sizes.questions, (len(r.answers) for r in rollouts)),
        evidence=_size(sizes.evidence, (len(answer.evidence) for answer in (*chunk_answers, *final_answers))),
    )


def _size(expected: int, sizes: Iterable[int]) -> int:
    largest = max(sizes, default=0)
    return expected if largest <= expected else compilation.rounded(largest)


def _empty(rollouts: Sequence[Trajectory], shape: tuple[int, int], sizes: Sizes, needs: frozenset[str]) -> RewardInputs:
    """Makes arrays for [S, G] rollouts, still without any entries; optional ones only where they are needed."""
    # At least one slot everywhere, since reductions over empty axes are special cases for nobody's benefit.
    t, o, j, q, k, _ = sizes
    probes = [rollout.probes for rollout in rollouts]
    steps = [step for rollout in rollouts for step in rollout.steps]

    def zeros(*size: int, dtype: type = float) -> np.ndarray:
        return np.zeros((*shape, *size), dtype)

    x = RewardInputs(
        step_mask=zeros(t, dtype=bool),
        chunk_scores=zeros(t, j),
        chunk_mask=zeros(t, j, dtype=bool),
        chunk_slot=zeros(t, j, k, dtype=np.int32),
        chunk_is_evidence=zeros(t, j, k, dtype=bool),
        chunk_type=zeros(t, j, k, dtype=np.int32),
        scores=zeros(q),
        question_mask=zeros(q, dtype=bool),
        slot=zeros(q, k, dtype=np.int32),
        is_evidence=zeros(q, k, dtype=bool),
        gold=zeros(q, t, dtype=bool),
        written=zeros(t, o, dtype=bool),
        valid=zeros(t, o, dtype=bool),
        operation_type=zeros(t, o, dtype=np.int32),
        operation_action=zeros(t, o, dtype=np.int32),
        memory_tokens=zeros(dtype=np.int32),
        stream_tokens=np.ones(shape, np.int32),
    )
    if "citations" in needs or any(answer.cited for rollout in rollouts for answer in rollout.answers):
        x = x._replace(cited=zeros(q, k, dtype=bool))
    if any(answer.likelihood for step in steps for answer in step.answers):
        x = x._replace(chunk_likelihoods=zeros(t, j), likelihood_mask=zeros(t, j, dtype=bool))
    if "content" in needs or any(step.verdicts for step in steps):
        x = x._replace(content=zeros(t, o), content_mask=zeros(t, o, dtype=bool))
    if "states" in needs or any(p.states for p in probes):
        x = x._replace(state_scores=zeros(t * o + 1, q))
    if "without" in needs or any(p.without for p in probes):
        x = x._replace(without=zeros(q, k))
    if any(p.full for p in probes):
        x = x._replace(full=zeros(q))
    if "subsets" in needs or any(p.games for p in probes):
        players = _size(1, (len(game.players) for p in probes for game in p.games))
        x = x._replace(
            subset_scores=zeros(q, 2**players),
            player_slot=zeros(q, players, dtype=np.int32),
            is_player=zeros(q, players, dtype=bool),
        )
    return x


def _fill_steps(x: Any, at: tuple[int, int], rollout: Trajectory) -> None:
    num_operations = x.written.shape[-1]
    for t, step in enumerate(rollout.steps):
        x.step_mask[at][t] = True
        for o, outcome in enumerate(step.outcomes):
            x.written[at][t, o], x.valid[at][t, o] = True, outcome.valid
            if not isinstance(outcome.operation, Malformed):
                x.operation_type[at][t, o] = _TYPES.index(outcome.operation.memory_type)
                x.operation_action[at][t, o] = _ACTIONS.index(outcome.operation.action)
        for o, verdict in enumerate(step.verdicts):
            x.content[at][t, o], x.content_mask[at][t, o] = bool(verdict), verdict is not None
        for j, answer in enumerate(step.answers):
            if answer.score is not None:
                x.chunk_scores[at][t, j], x.chunk_mask[at][t, j] = answer.score, True
            if answer.likelihood is not None:
                x.chunk_likelihoods[at][t, j], x.likelihood_mask[at][t, j] = answer.likelihood.value, True
            _fill_evidence(x.chunk_slot[at][t, j], x.chunk_is_evidence[at][t, j], answer, num_operations)
            for k, item in enumerate(answer.evidence):
                x.chunk_type[at][t, j, k] = _TYPES.index(item.memory_type)


def _fill_answers(x: Any, at: tuple[int, int], rollout: Trajectory) -> None:
    for j, answer in enumerate(rollout.answers):
        if answer.score is not None:
            x.scores[at][j], x.question_mask[at][j] = answer.score, True
        x.gold[at][j, list(answer.question.gold_steps)] = True
        _fill_evidence(x.slot[at][j], x.is_evidence[at][j], answer, x.written.shape[-1])
        if answer.cited:
            x.cited[at][j, : len(answer.cited)] = answer.cited


def _fill_evidence(slot: np.ndarray, is_evidence: np.ndarray, answer: Answer, num_operations: int) -> None:
    for k, item in enumerate(answer.evidence):
        slot[k], is_evidence[k] = item.source_step * num_operations + item.source_operation, True


def _fill_probes(x: Any, at: tuple[int, int], rollout: Trajectory) -> None:
    probes, num_operations = rollout.probes, x.written.shape[-1]
    if x.state_scores is not None:
        state = probes.empty
        for n in range(x.state_scores.shape[-2]):
            t, o = divmod(n - 1, num_operations)
            # Where nothing was written the memory is as before, so that the difference there is 0.
            if n and t < len(probes.states) and o < len(probes.states[t]):
                state = probes.states[t][o]
            x.state_scores[at][n, : len(state)] = state
    if probes.full:
        x.full[at][: len(probes.full)] = probes.full
    for j, scores in enumerate(probes.without):
        x.without[at][j, : len(scores)] = scores
    for j, game in enumerate(probes.games):
        for p, (step, operation) in enumerate(game.players):
            x.player_slot[at][j, p], x.is_player[at][j, p] = step * num_operations + operation, True
        # A player that does not exist changes nothing: the scores repeat.
        x.subset_scores[at][j] = np.resize(game.scores, x.subset_scores.shape[-1])


def compute(inputs: RewardInputs, config: CreditConfig, normalizer: Normalizer) -> tuple[Rewards, Advantages]:
    """Computes rewards and advantages of every rollout, [S, G, T], as float64 NumPy arrays.

    float64, because an advantage divides a difference of rewards by their spread: in float32 the rounding of
    rewards near 2 is a visible part of a spread of 0.001.
    """
    # On the host: these are a few thousand numbers, and not every accelerator has float64.
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        config = jax.tree.map(np.float64, config)
        rewards, terms = credit_rules.step_rewards(inputs, config)
        advantages = advantages_lib.compute(inputs, terms, config, normalizer)
        return jax.tree.map(np.asarray, (rewards, advantages))


def per_token(
    groups: Sequence[Sequence[Trajectory]], advantages: Advantages, tokens: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Spreads advantages, and factors of the unclipped term, over the tokens of every response, float32 [S, G, T, A].

    Tokens of an operation have the operation's, the others their step's.

    Args:
        tokens: A, unless a response is longer.
    """
    length = _size(tokens, (len(step.completion.ids) for group in groups for r in group for step in r.steps))
    owners = np.full((*advantages.step.shape, length), -1, np.int32)
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            for t, step in enumerate(rollout.steps):
                owners[s, g, t, : len(step.token_operations)] = step.token_operations
    return jax.tree.map(np.asarray, advantages_lib.per_token(advantages, owners))
