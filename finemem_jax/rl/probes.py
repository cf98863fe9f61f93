"""What would the answer have been? Questions that a credit rule asks beyond the ones that are scored.

Plans them for many rollouts, so that all can be put to the reader in one call, each only once. Knows nothing of
readers or credit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from finemem_jax.memory import transition
from finemem_jax.memory.retrieval import Index
from finemem_jax.types import Action, Game, Memory, MemoryItem, Operation, Probes, Question, Status, Step

# What `plan` can be asked for: scores of every state of the memory, of each answer without each item of its evidence,
# and of all coalitions of the operations behind an answer.
STATES, WITHOUT, SUBSETS = "states", "without", "subsets"
# Coalitions double with every player; 2^7 questions in place of one is where patience ends.
MAX_PLAYERS = 7

# A question, and the items that it is answered from, best first.
Pair = tuple[Question, tuple[MemoryItem, ...]]


class Asked:
    """Questions to ask, each once: equal texts with equal evidence have one place."""

    def __init__(self):
        self._places: dict[tuple[Question, tuple[str, ...]], int] = {}
        self.pairs: list[Pair] = []

    def place(self, question: Question, evidence: tuple[MemoryItem, ...]) -> int:
        """Where the score of this question and evidence will stand."""
        key = question, tuple(item.text for item in evidence)
        if key not in self._places:
            self._places[key] = len(self.pairs)
            self.pairs.append((question, evidence))
        return self._places[key]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The probes of one rollout, with places in an `Asked` where the scores will be."""

    full: tuple[int, ...]
    empty: tuple[int, ...]
    states: tuple[tuple[tuple[int, ...], ...], ...]
    without: tuple[tuple[int, ...], ...]
    games: tuple[tuple[tuple[tuple[int, int], ...], tuple[int, ...]], ...]

    def fill(self, scores: Sequence[float | None]) -> Probes:
        """The probes, once all questions are answered; 0 where there is no score."""

        def of(places):
            return tuple(scores[place] or 0.0 for place in places)

        return Probes(
            full=of(self.full),
            empty=of(self.empty),
            states=tuple(tuple(map(of, step)) for step in self.states),
            without=tuple(map(of, self.without)),
            games=tuple(Game(players, of(coalitions)) for players, coalitions in self.games),
        )

    def undecided(self, scores: Sequence[float | None]) -> set[int]:
        """The global questions, by number, of which some score is missing."""
        missing = {place for place, score in enumerate(scores) if score is None}
        if not missing:
            return set()
        by_question = [self.full, self.empty, *(state for step in self.states for state in step)]
        found = {j for places in by_question for j, place in enumerate(places) if place in missing}
        found |= {j for j, places in enumerate(self.without) if missing.intersection(places)}
        return found | {j for j, (_, places) in enumerate(self.games) if missing.intersection(places)}


def plan(
    needs: frozenset[str],
    steps: Sequence[Step],
    scored: Sequence[Pair],
    index: Index,
    top_k: int,
    asked: Asked,
    full: bool = False,
) -> Plan:
    """Plans the probes of one rollout.

    Args:
        needs: Some of STATES, WITHOUT and SUBSETS; other words are not looked at.
        scored: The global questions, each with its evidence from M_T.
        index: Any; it is given other memories.
        top_k: K of `Index.retrieve`.
        asked: What is to be asked; grows.
        full: Whether to ask for what `WITHOUT` is compared with, too: where the scores of the answers are of another
            kind.
    """
    questions = [question for question, _ in scored]
    return Plan(
        full=tuple(asked.place(*pair) for pair in scored) if full and WITHOUT in needs else (),
        empty=tuple(asked.place(question, ()) for question in questions) if STATES in needs else (),
        states=_states(steps, questions, index, top_k, asked) if STATES in needs else (),
        without=tuple(_without(*pair, asked) for pair in scored) if WITHOUT in needs else (),
        games=_games(steps, scored, index, top_k, asked) if SUBSETS in needs else (),
    )


def _states(steps, questions, index, top_k, asked):
    before, places = Memory(), tuple(asked.place(question, ()) for question in questions)
    found = []
    for t, step in enumerate(steps):
        in_step = []
        after = transition.states(before, step.outcomes, t)
        # What had to make room was driven out by what the step wrote.
        for state in (*after[:-1], step.memory) if after and after[-1] != step.memory else after:
            if state is not before:
                index.update(state.items)
                places = tuple(asked.place(question, index.retrieve(question.text, top_k)) for question in questions)
                before = state
            in_step.append(places)
        found.append(tuple(in_step))
    return tuple(found)


def _without(question, evidence, asked):
    return tuple(asked.place(question, evidence[:k] + evidence[k + 1 :]) for k in range(len(evidence)))


def _games(steps, scored, index, top_k, asked):
    deleted = _deleted(steps)
    # The memory as it would be had nothing ever been deleted.
    index.update((*steps[-1].memory.items, *(item for item, _ in deleted)))
    deleters = {item.item_id: deleter for item, deleter in deleted}
    return tuple(_game(question, evidence, deleters, index, top_k, asked) for question, evidence in scored)


def _deleted(steps):
    """Items that were deleted, as they last stood, and who deleted each."""
    return [
        (outcome.previous, (t, o))
        for t, step in enumerate(steps)
        for o, outcome in enumerate(step.outcomes)
        if outcome.status is Status.APPLIED
        and isinstance(outcome.operation, Operation)
        and outcome.operation.action is Action.DELETE
        and outcome.previous is not None
    ]


def _game(question, evidence, deleters, index, top_k, asked):
    """The players behind one answer: who wrote each item of its evidence; and who wrote and who deleted the best item
    that would have been evidence, had it not been deleted."""
    ranked = index.retrieve(question.text, top_k)
    lost = next((item for item in ranked if item.item_id in deleters), None)
    writers = [(item.source_step, item.source_operation) for item in evidence]
    players = tuple(writers)
    if lost is not None:
        players += (lost.source_step, lost.source_operation), deleters[lost.item_id]
    if len(players) > MAX_PLAYERS:
        raise ValueError(
            f"credit.rule='shapley' asks a question for every set of the retrieved items, and {len(players)} are too "
            f"many (most: {MAX_PLAYERS}); lower memory.top_k, or use credit.rule='ablation'."
        )
    # A deleted item stands where it would have been ranked; items that are there keep their order.
    order = {item.item_id: rank for rank, item in enumerate(ranked)}
    places = []
    for coalition in itertools.product((False, True), repeat=len(players)):
        joined = coalition[::-1]  # Player 0 is the lowest bit, which product varies last.
        present = [item for item, there in zip(evidence, joined, strict=False) if there]
        if lost is not None and joined[-2] and not joined[-1]:
            # Before all that it would have been ranked before.
            after = sum(order.get(item.item_id, len(order)) < order[lost.item_id] for item in present)
            present = [*present[:after], lost, *present[after:]]
        places.append(asked.place(question, tuple(present[: max(top_k, len(evidence))])))
    return players, tuple(places)
