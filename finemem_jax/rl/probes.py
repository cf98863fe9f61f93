"""Plans the counterfactual questions that a credit rule asks beyond the ones that are scored.

What would the answer have been from an earlier memory, or without some of the evidence? Plans for many rollouts, so
that each question is put to the reader only once. Knows nothing of readers or credit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from finemem_jax.memory import transition
from finemem_jax.memory.retrieval import Index
from finemem_jax.types import Action, Game, Memory, MemoryItem, Operation, Probes, Question, Status, Step

# What a `Planner` can plan: scores of every state of the memory, of each answer without each item of its evidence,
# and of all coalitions of the operations behind an answer.
STATES, WITHOUT, SUBSETS = "states", "without", "subsets"
# Coalitions double with every player: with 7 there are 128 questions in place of one.
MAX_PLAYERS = 7

# A question, and the items that it is answered from, best first.
Pair = tuple[Question, tuple[MemoryItem, ...]]
# The players of a game, as (step, operation), and the places of its coalitions.
PlannedGame = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The probes of one rollout, as places among `Planner.pairs`, where the scores will stand."""

    full: tuple[int, ...]
    empty: tuple[int, ...]
    states: tuple[tuple[tuple[int, ...], ...], ...]
    without: tuple[tuple[int, ...], ...]
    games: tuple[PlannedGame, ...]

    def fill(self, scores: Sequence[float | None]) -> Probes:
        """Returns the probes, once all questions are answered; 0 where there is no score."""

        def of(places: tuple[int, ...]) -> tuple[float, ...]:
            return tuple(scores[place] or 0.0 for place in places)

        return Probes(
            full=of(self.full),
            empty=of(self.empty),
            states=tuple(tuple(map(of, step)) for step in self.states),
            without=tuple(map(of, self.without)),
            games=tuple(Game(players, of(coalitions)) for players, coalitions in self.games),
        )

    def undecided(self, scores: Sequence[float | None]) -> set[int]:
        """Returns the global questions, by number, of which some score is missing."""
        missing = {place for place, score in enumerate(scores) if score is None}
        if not missing:
            return set()
        by_question = [self.full, self.empty, *(state for step in self.states for state in step)]
        found = {j for places in by_question for j, place in enumerate(places) if place in missing}
        found |= {j for j, places in enumerate(self.without) if missing.intersection(places)}
        return found | {j for j, (_, places) in enumerate(self.games) if missing.intersection(places)}


class Planner:
    """Collects what is to be asked for some rollouts; equal texts with equal evidence have one place.

    Attributes:
        pairs: The questions to ask, each with its evidence; grows.
    """

    def __init__(self, needs: frozenset[str], top_k: int, full: bool = False):
        """Plans for one credit rule.

        Args:
            needs: Some of STATES, WITHOUT and SUBSETS; other words are not looked at.
            top_k: K of `Index.retrieve`.
            full: Whether to ask for what WITHOUT is compared with, too: where the scores of the answers are of another
                kind.
        """
        self._needs, self._top_k, self._full = needs, top_k, full
        self._places: dict[tuple[Question, tuple[str, ...]], int] = {}
        self.pairs: list[Pair] = []

    def plan(self, steps: Sequence[Step], scored: Sequence[Pair], index: Index) -> Plan:
        """Plans the probes of one rollout.

        Args:
            scored: The global questions, each with its evidence from M_T.
            index: Any; it is given other memories.
        """
        needs, questions = self._needs, [question for question, _ in scored]
        return Plan(
            full=tuple(self._place(*pair) for pair in scored) if self._full and WITHOUT in needs else (),
            empty=tuple(self._place(question, ()) for question in questions) if STATES in needs else (),
            states=self._states(steps, questions, index) if STATES in needs else (),
            without=tuple(self._without(*pair) for pair in scored) if WITHOUT in needs else (),
            games=self._games(steps, scored, index) if SUBSETS in needs else (),
        )

    def _place(self, question: Question, evidence: tuple[MemoryItem, ...]) -> int:
        """Returns where the score of this question and evidence will stand."""
        key = question, tuple(item.text for item in evidence)
        if key not in self._places:
            self._places[key] = len(self.pairs)
            self.pairs.append((question, evidence))
        return self._places[key]

    def _states(
        self, steps: Sequence[Step], questions: Sequence[Question], index: Index
    ) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Asks every question of the memory after each operation of each step."""
        before, places = Memory(), tuple(self._place(question, ()) for question in questions)
        found = []
        for t, step in enumerate(steps):
            in_step = []
            after = transition.states(before, step.outcomes, t)
            # What had to make room was driven out by what the step wrote.
            for state in (*after[:-1], step.memory) if after and after[-1] != step.memory else after:
                if state is not before:
                    index.update(state.items)
                    places = tuple(
                        self._place(question, index.retrieve(question.text, self._top_k)) for question in questions
                    )
                    before = state
                in_step.append(places)
            found.append(tuple(in_step))
        return tuple(found)

    def _without(self, question: Question, evidence: tuple[MemoryItem, ...]) -> tuple[int, ...]:
        """Asks a question without each item of its evidence."""
        return tuple(self._place(question, evidence[:k] + evidence[k + 1 :]) for k in range(len(evidence)))

    def _games(self, steps: Sequence[Step], scored: Sequence[Pair], index: Index) -> tuple[PlannedGame, ...]:
        """Asks every question for all coalitions of the operations behind its answer."""
        deleted = _deleted(steps)
        # The memory as it would be had nothing ever been deleted.
        index.update((*steps[-1].memory.items, *(item for item, _ in deleted)))
        deleters = {item.item_id: deleter for item, deleter in deleted}
        return tuple(self._game(pair, index.retrieve(pair[0].text, self._top_k), deleters) for pair in scored)

    def _game(self, pair: Pair, ranked: Sequence[MemoryItem], deleters: Mapping[int, tuple[int, int]]) -> PlannedGame:
        """Asks for all coalitions of the players behind one answer.

        These are who wrote each item of its evidence; and who wrote and who deleted the best item that would have been
        evidence, had it not been deleted.

        Args:
            ranked: The evidence, had nothing ever been deleted.
            deleters: Who deleted each item.
        """
        question, evidence = pair
        lost = next((item for item in ranked if item.item_id in deleters), None)
        players = tuple((item.source_step, item.source_operation) for item in evidence)
        if lost is not None:
            players += (lost.source_step, lost.source_operation), deleters[lost.item_id]
        if len(players) > MAX_PLAYERS:
            raise ValueError(
                f"credit.rule='shapley' asks a question for every set of the retrieved items, and {len(players)} are "
                f"too many (most: {MAX_PLAYERS}); lower memory.top_k, or use credit.rule='ablation'."
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
            places.append(self._place(question, tuple(present[: max(self._top_k, len(evidence))])))
        return players, tuple(places)


def _deleted(steps: Sequence[Step]) -> list[tuple[MemoryItem, tuple[int, int]]]:
    """Lists the items that were deleted, as they last stood, and who deleted each."""
    return [
        (outcome.previous, (t, o))
        for t, step in enumerate(steps)
        for o, outcome in enumerate(step.outcomes)
        if outcome.status is Status.APPLIED
        and isinstance(outcome.operation, Operation)
        and outcome.operation.action is Action.DELETE
        and outcome.previous is not None
    ]
