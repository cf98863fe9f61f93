"""Tests of finemem_jax/rl/probes.py: which questions are asked, and where their answers end up."""

import dataclasses

import pytest

from finemem_jax.memory import transition
from finemem_jax.memory.retrieval import Index
from finemem_jax.rl import probes
from finemem_jax.types import Action, Completion, Memory, Operation, Question, Step

CITY = Question("In which city does Ana live?", ("Oslo",))
PET = Question("Which pet does Ben have?", ("cat",))
NOTHING = Completion((), (), "stop", 0)


def insert(text):
    return Operation(Action.INSERT, text)


def walk(*written):
    """The steps of a rollout that wrote these operations, one tuple a step."""
    memory, steps = Memory(), []
    for t, operations in enumerate(written):
        memory, outcomes = transition.apply(memory, operations, t)
        steps.append(Step((), (), NOTHING, outcomes, memory))
    return steps


def planned(needs, steps, questions, top_k=2):
    """The probes, answered by whether the gold answer stands in the evidence; and how many questions that took."""
    index, asked = Index(), probes.Planner(frozenset([needs]), top_k)
    index.update(steps[-1].memory.items)
    scored = [(question, index.retrieve(question.text, top_k)) for question in questions]
    plan = asked.plan(steps, scored, index)
    scores = [
        float(any(gold in item.text for gold in question.answers for item in items)) for question, items in asked.pairs
    ]
    return plan.fill(scores), asked


def test_states_by_hand():
    # Step 0 writes the city (and a line that changes nothing); step 1 the pet, then deletes the city.
    steps = walk(
        (insert("Ana lives in city Oslo."), insert("Ana lives in city Oslo.")),
        (),
        (insert("Ben: a pet cat."), Operation(Action.DELETE, "", 1)),
    )
    got, _ = planned(probes.STATES, steps, [CITY, PET])
    assert got.empty == (0.0, 0.0)
    assert got.states == (((1.0, 0.0), (1.0, 0.0)), (), ((1.0, 1.0), (0.0, 1.0)))


def test_a_question_is_asked_again_only_where_its_evidence_changed():
    steps = walk(*[(insert(f"Nothing to do with it, number {i}."),) for i in range(5)], (insert("Ana's city: Oslo."),))
    _, asked = planned(probes.STATES, steps, [CITY])
    # Once of nothing, once at the end: unrelated items are no evidence.
    assert len(asked.pairs) == 2


def test_without_by_hand():
    steps = walk((insert("Ana lives in the city Oslo."), insert("Ana went to the city.")))
    got, asked = planned(probes.WITHOUT, steps, [CITY, PET])
    # Without the first item of the city's evidence Oslo is gone; the pet has no evidence to do without.
    assert sorted(got.without[0]) == [0.0, 1.0] and got.without[1] == ()
    assert len(asked.pairs) == 2


def test_games_by_hand():
    steps = walk((insert("Ana lives in the city Oslo."),), (insert("Ana went to the city."),))
    got, _ = planned(probes.SUBSETS, steps, [CITY])
    (game,) = got.games
    assert set(game.players) == {(0, 0), (1, 0)}
    oslo = game.players.index((0, 0))
    # Right exactly where the item that says Oslo is among the players.
    assert game.scores == tuple(float(coalition >> oslo & 1) for coalition in range(4))


def test_a_deleted_item_brings_its_writer_and_its_deleter_into_the_game():
    steps = walk((insert("Ana lives in the city Oslo."),), (insert("Rain."), Operation(Action.DELETE, "", 1)))
    got, _ = planned(probes.SUBSETS, steps, [CITY, PET])
    city, pet = got.games
    assert city.players == ((0, 0), (1, 1))
    # Nobody, the writer alone, the deleter alone, both: only the writer alone leaves the answer there.
    assert city.scores == (0.0, 1.0, 0.0, 0.0)
    assert pet.players == () and pet.scores == (0.0,)


def test_a_deleted_item_that_nobody_would_retrieve_is_no_player():
    steps = walk(
        (insert("Ana lives in the city Oslo, in the city."), insert("Ana: Oslo city."), insert("A city.")),
        (Operation(Action.DELETE, "", 3),),
    )
    got, _ = planned(probes.SUBSETS, steps, [CITY], top_k=1)
    assert all(step == 0 for step, _ in got.games[0].players)


def test_a_deleted_item_pushes_out_the_last_of_the_evidence():
    """With K = 1, were the deleted item there, the item that is there now would not be retrieved."""
    steps = walk(
        (insert("In which city does Ana live? Oslo"), insert("Ana: some city")), (Operation(Action.DELETE, "", 1),)
    )
    got, asked = planned(probes.SUBSETS, steps, [CITY], top_k=1)
    assert got.games[0].players == ((0, 1), (0, 0), (1, 0))
    assert max(len(items) for _, items in asked.pairs) == 1
    # Player 1 writes Oslo, player 2 deletes it; player 0's item is in nobody's way, and right for nothing.
    assert got.games[0].scores == tuple(float(c >> 1 & 1 and not c >> 2 & 1) for c in range(8))


def test_the_full_coalition_is_what_was_scored():
    steps = walk(
        (insert("Ana: Oslo, the city."), insert("The city of Ana: Rome.")),
        (Operation(Action.UPDATE, "Ana's city is Bergen.", 2), Operation(Action.DELETE, "", 1)),
    )
    index, asked = Index(), probes.Planner(frozenset([probes.SUBSETS]), 2)
    index.update(steps[-1].memory.items)
    scored = [(CITY, index.retrieve(CITY.text, 2))]
    plan = asked.plan(steps, scored, index)
    ((players, places),) = plan.games
    assert asked.pairs[places[-1]] == scored[0]
    assert asked.pairs[places[0]][1] == ()
    # The UPDATE holds the item now: its INSERT is no player.
    assert (1, 0) in players and (0, 1) not in players


def test_too_many_players_are_refused():
    steps = walk(tuple(insert(f"Ana and a city, {i}") for i in range(8)))
    with pytest.raises(ValueError, match="lower memory.top_k"):
        planned(probes.SUBSETS, steps, [CITY], top_k=8)


@pytest.mark.parametrize("needs", [probes.STATES, probes.WITHOUT, probes.SUBSETS])
def test_a_question_without_one_of_its_scores_is_undecided(needs):
    steps = walk((insert("Ana lives in city Oslo."),), (insert("Ben: a pet cat."),))
    index, asked = Index(), probes.Planner(frozenset([needs]), 2)
    index.update(steps[-1].memory.items)
    scored = [(question, index.retrieve(question.text, 2)) for question in (CITY, PET)]
    plan = asked.plan(steps, scored, index)
    of_pets = [question is PET for question, _ in asked.pairs]
    assert plan.undecided([1.0] * len(of_pets)) == set()
    for place, of_pet in enumerate(of_pets):
        scores: list[float | None] = [1.0] * len(of_pets)
        scores[place] = None
        assert plan.undecided(scores) == {int(of_pet)}
        assert "None" not in str(plan.fill(scores))


def test_what_all_evidence_is_worth_is_asked_where_the_answers_do_not_say():
    steps = walk((insert("Ana lives in city Oslo."),))
    index = Index()
    index.update(steps[-1].memory.items)
    scored = [(question, index.retrieve(question.text, 2)) for question in (CITY, PET)]
    without, states = (probes.Planner(frozenset([needs]), 2, full=True) for needs in (probes.WITHOUT, probes.STATES))
    assert [without.pairs[place] for place in without.plan(steps, scored, index).full] == scored
    assert states.plan(steps, scored, index).full == ()


def test_nothing_is_asked_that_no_rule_needs():
    got, asked = planned("citations", walk((insert("Ana: Oslo."),)), [CITY])
    assert dataclasses.asdict(got) == {"full": (), "empty": (), "states": (), "without": (), "games": ()}
    assert asked.pairs == []
