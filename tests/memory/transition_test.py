"""Tests of finemem_jax/memory/transition.py: what operations do to items."""

# What is applied here has been parsed: only what is valid is asked for its fields.
# pyright: reportAttributeAccessIssue=false

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from finemem_jax.memory import transition
from finemem_jax.types import (
    CORE,
    EPISODIC,
    MEMORY_TYPES,
    SEMANTIC,
    Action,
    Malformed,
    Memory,
    MemoryItem,
    Operation,
    Outcome,
    Status,
)

few_examples = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)

NONSENSE = Malformed("blah", "not JSON")
SKIP = Operation(Action.SKIP)
TWO_ITEMS = Memory((MemoryItem(1, "cat", 0, 0), MemoryItem(2, "dog", 0, 1)), next_id=3)


def insert(content, memory_type=""):
    return Operation(Action.INSERT, content, None, memory_type)


def update(item_id, content, memory_type=""):
    return Operation(Action.UPDATE, content, item_id, memory_type)


def delete(item_id, memory_type=""):
    return Operation(Action.DELETE, "", item_id, memory_type)


# Few texts and few ids, so that duplicates and unknown ids come up all the time.
texts = st.sampled_from(["cat", "dog", "fish", "Cat"])
few_ids = st.integers(0, 6)
anything = st.one_of(
    st.builds(insert, texts),
    st.builds(update, few_ids, texts),
    st.builds(delete, few_ids),
    st.just(SKIP),
    st.just(NONSENSE),
)
responses = st.lists(st.lists(anything, max_size=6), max_size=6)
typed = st.sampled_from([SEMANTIC, EPISODIC])
typed_anything = st.one_of(
    st.builds(insert, texts, typed),
    st.builds(update, few_ids, texts, typed),
    st.builds(delete, few_ids, typed),
    st.builds(update, st.none(), texts, st.just(CORE)),
    st.just(delete(None, CORE)),
    st.just(NONSENSE),
)
typed_responses = st.lists(st.lists(typed_anything, max_size=6), max_size=6)


def run(responses):
    start = Memory()
    for step, written in enumerate(responses):
        start, _ = transition.apply(start, written, step)
    return start


def without_sources(held):
    return [(item.item_id, item.text, item.source_step) for item in held.items], held.next_id


def statuses(written, start=TWO_ITEMS):
    return [outcome.status for outcome in transition.apply(start, written, step=1)[1]]


# --------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------


def test_eviction_by_hand():
    texts = ("aa", "bbb", "c", "dd")
    items = tuple(MemoryItem(i, text, step) for i, (text, step) in enumerate(zip(texts, (5, 1, 2, 7), strict=True), 1))
    held = Memory(items, 5)

    def left(budget, rule):
        after = transition.evict(held, budget, len, rule)
        assert after.next_id == 5
        return [item.item_id for item in after.items]

    assert left(8, "oldest") == left(9, "stale") == [1, 2, 3, 4]
    assert transition.evict(held, 8, len, "oldest") is held
    assert left(7, "oldest") == [2, 3, 4] and left(5, "oldest") == [3, 4] and left(0, "oldest") == []
    # Item 1 was written again at step 5, and lives on.
    assert left(7, "stale") == [1, 3, 4] and left(4, "stale") == [1, 4] and left(3, "stale") == [4]


def test_the_core_memory_is_never_evicted():
    held = Memory((MemoryItem(1, "core text", 0, 0, CORE), MemoryItem(2, "x", 0, 1, "semantic")), 3)
    assert [item.item_id for item in transition.evict(held, 2, len, "oldest").items] == [1]


def test_one_step_by_hand():
    # Item 1 is rewritten and keeps its place; item 2 goes; "fish" gets the next id, 3.
    written = [update(1, "cats"), delete(2), NONSENSE, insert("fish")]
    after, outcomes = transition.apply(TWO_ITEMS, written, step=5)
    # The malformed line is counted, so "fish" comes from operation 3.
    assert after == Memory((MemoryItem(1, "cats", 5, 0), MemoryItem(3, "fish", 5, 3)), next_id=4)
    assert outcomes == (
        Outcome(written[0], Status.APPLIED, 1, previous=MemoryItem(1, "cat", 0, 0)),
        Outcome(written[1], Status.APPLIED, 2, previous=MemoryItem(2, "dog", 0, 1)),
        Outcome(NONSENSE, Status.MALFORMED),
        Outcome(written[3], Status.APPLIED, 3),
    )


def test_previous_is_what_this_step_wrote_if_it_did():
    after, outcomes = transition.apply(TWO_ITEMS, [update(1, "cats"), update(1, "lions"), delete(1)], step=5)
    assert [outcome.previous for outcome in outcomes] == [
        MemoryItem(1, "cat", 0, 0),
        MemoryItem(1, "cats", 5, 0),
        MemoryItem(1, "lions", 5, 1),
    ]
    assert after.items == TWO_ITEMS.items[1:]


def test_typed_step_by_hand():
    # The core is created as item 1; its update replaces it. Item 2 is semantic, so its update as episodic is unknown.
    written = [
        update(None, "Ana", CORE),
        insert("cat", SEMANTIC),
        insert("cat", EPISODIC),
        update(2, "cats", EPISODIC),
        update(None, "Ana and Bo", CORE),
        delete(3, EPISODIC),
        insert("cat", SEMANTIC),
    ]
    after, outcomes = transition.apply(Memory(), written, step=2)
    core, semantic = MemoryItem(1, "Ana and Bo", 2, 4, CORE), MemoryItem(2, "cat", 2, 1, SEMANTIC)
    assert after == Memory((core, semantic), next_id=4)
    assert outcomes == (
        Outcome(written[0], Status.APPLIED, 1),
        Outcome(written[1], Status.APPLIED, 2),
        Outcome(written[2], Status.APPLIED, 3),
        Outcome(written[3], Status.UNKNOWN_ID),
        Outcome(written[4], Status.APPLIED, 1, previous=MemoryItem(1, "Ana", 2, 0, CORE)),
        Outcome(written[5], Status.APPLIED, 3, previous=MemoryItem(3, "cat", 2, 2, EPISODIC)),
        Outcome(written[6], Status.DUPLICATE),
    )


def test_the_core_is_one_item_without_an_id():
    core = Memory((MemoryItem(4, "Ana", 0, 0, CORE),), next_id=5)
    # Saying again is not writing.
    assert statuses([update(None, "Ana", CORE)], core) == [Status.DUPLICATE]
    # Only as core memory can it be changed, whatever its id.
    assert statuses([update(4, "Bo", SEMANTIC), delete(4, EPISODIC)], core) == [Status.UNKNOWN_ID] * 2
    assert statuses([delete(None, CORE)], Memory()) == [Status.UNKNOWN_ID]
    after, outcomes = transition.apply(
        core, [delete(None, CORE), delete(None, CORE), update(None, "Ana", CORE)], step=1
    )
    assert [outcome.status for outcome in outcomes] == [Status.APPLIED, Status.UNKNOWN_ID, Status.APPLIED]
    # Ids are never given out again, not even to the core memory.
    assert after == Memory((MemoryItem(5, "Ana", 1, 2, CORE),), next_id=6)
    # An insert, which no manager can write, does not make a second one.
    after, _ = transition.apply(core, [insert("Bo", CORE)], step=1)
    assert after == Memory((MemoryItem(4, "Bo", 1, 0, CORE),), next_id=5)


@pytest.mark.parametrize("memory_type", ["", *MEMORY_TYPES])
def test_texts_are_unique_within_a_type(memory_type):
    others = [insert("cat", SEMANTIC), insert("cat", EPISODIC), update(None, "cat", CORE), insert("cat")]
    before, _ = transition.apply(Memory(), [o for o in others if o.memory_type != memory_type], step=0)
    (same,) = [o for o in others if o.memory_type == memory_type]
    assert statuses([same, same], before) == [Status.APPLIED, Status.DUPLICATE]


@pytest.mark.parametrize(
    "operation, status",
    [
        (insert("cat"), Status.DUPLICATE),
        (update(2, "cat"), Status.DUPLICATE),  # Another item says it.
        (update(1, "cat"), Status.DUPLICATE),  # The item itself says it: credit stays with step 0.
        (update(9, "cat"), Status.UNKNOWN_ID),
        (delete(9), Status.UNKNOWN_ID),
        (Operation(Action.DELETE), Status.UNKNOWN_ID),
        (NONSENSE, Status.MALFORMED),
        (SKIP, Status.APPLIED),
    ],
)
def test_what_changes_nothing(operation, status):
    after, outcomes = transition.apply(TWO_ITEMS, [operation], step=7)
    assert after == TWO_ITEMS
    assert outcomes == (Outcome(operation, status),)


@pytest.mark.parametrize(
    "written, expected",
    [
        ([SKIP], [Status.APPLIED]),
        ([SKIP, SKIP], [Status.DUPLICATE, Status.DUPLICATE]),
        ([SKIP, insert("fish")], [Status.DUPLICATE, Status.APPLIED]),
        ([NONSENSE, SKIP], [Status.MALFORMED, Status.DUPLICATE]),
    ],
)
def test_skip_is_valid_only_alone(written, expected):
    assert statuses(written) == expected


def test_operations_see_what_came_before_them():
    # Each of these would end otherwise on the memory as it was before the step.
    assert statuses([delete(1), delete(1)]) == [Status.APPLIED, Status.UNKNOWN_ID]
    assert statuses([insert("fish"), update(3, "whale")]) == [Status.APPLIED, Status.APPLIED]
    assert statuses([insert("fish"), insert("fish")]) == [Status.APPLIED, Status.DUPLICATE]
    assert statuses([delete(1), insert("cat")]) == [Status.APPLIED, Status.APPLIED]
    assert statuses([update(1, "cats"), insert("cat")]) == [Status.APPLIED, Status.APPLIED]
    assert statuses([update(1, "cats"), insert("cats")]) == [Status.APPLIED, Status.DUPLICATE]


def test_ids_are_never_given_out_again():
    after = run([[insert("cat"), delete(1), insert("dog")], [delete(2)], [insert("cat")]])
    assert after == Memory((MemoryItem(3, "cat", 2),), next_id=4)


def test_nothing_written():
    assert transition.apply(TWO_ITEMS, [], step=0) == (TWO_ITEMS, ())


# --------------------------------------------------------------------------------------
# Laws
# --------------------------------------------------------------------------------------


@few_examples
@hypothesis.given(st.one_of(responses, typed_responses))
def test_invariants_hold_whatever_is_written(responses):
    assert transition.invariants(run(responses), max(len(responses), 1)) == []


with_response = st.one_of(
    st.tuples(responses, st.lists(anything, max_size=6)),
    st.tuples(typed_responses, st.lists(typed_anything, max_size=6)),
)


@few_examples
@hypothesis.given(with_response)
def test_states_lead_from_one_memory_to_the_next(case):
    responses, written = case
    before = run(responses)
    after, outcomes = transition.apply(before, written, step=len(responses))
    states = transition.states(before, outcomes, step=len(responses))
    assert len(states) == len(written)
    assert [before, *states][-1] == after
    for index, state in enumerate(states):
        # As if the response had ended here.
        assert state == transition.apply(before, written[: index + 1], step=len(responses))[0]
        if outcomes[index].item_id is None:
            assert state is [before, *states][index]


def test_states_by_hand():
    _, outcomes = transition.apply(TWO_ITEMS, [insert("fish"), NONSENSE, update(1, "cats"), delete(2)], step=1)
    cat, dog, fish, cats = *TWO_ITEMS.items, MemoryItem(3, "fish", 1, 0), MemoryItem(1, "cats", 1, 2)
    assert transition.states(TWO_ITEMS, outcomes, step=1) == [
        Memory((cat, dog, fish), next_id=4),
        Memory((cat, dog, fish), next_id=4),
        Memory((cats, dog, fish), next_id=4),
        Memory((cats, fish), next_id=4),
    ]
    assert transition.states(TWO_ITEMS, (), step=1) == []


@few_examples
@hypothesis.given(with_response)
def test_sources_name_the_operation(case):
    responses, written = case
    before = run(responses)
    after, outcomes = transition.apply(before, written, step=len(responses))
    for item in after.items:
        if item.source_step == len(responses):
            outcome = outcomes[item.source_operation]
            assert (outcome.item_id, outcome.operation.content) == (item.item_id, item.text)
        else:
            assert item in before.items
    held: Any = {item.item_id: item for item in before.items}
    for index, outcome in enumerate(outcomes):
        changes = outcome.valid and outcome.operation.action in (Action.UPDATE, Action.DELETE)
        assert (outcome.previous is not None) <= changes
        # None only for an UPDATE that created the core memory.
        assert outcome.previous == (held.pop(outcome.item_id, None) if changes else None)
        if outcome.valid and outcome.operation.content:
            operation = outcome.operation
            held[outcome.item_id] = MemoryItem(
                outcome.item_id, operation.content, len(responses), index, operation.memory_type
            )


@few_examples
@hypothesis.given(responses, st.lists(anything, max_size=6))
def test_outcomes_account_for_the_change(responses, written):
    before = run(responses)
    after, outcomes = transition.apply(before, written, step=len(responses))
    assert [outcome.operation for outcome in outcomes] == written
    applied = [outcome.operation.action for outcome in outcomes if outcome.valid]
    grown = applied.count(Action.INSERT) - applied.count(Action.DELETE)
    assert len(after.items) - len(before.items) == grown
    assert after.next_id - before.next_id == applied.count(Action.INSERT)
    touched = {outcome.item_id for outcome in outcomes if outcome.valid} - {None}
    assert [item for item in after.items if item.item_id not in touched] == [
        item for item in before.items if item.item_id not in touched
    ]
    assert all(item.source_step == len(responses) for item in after.items if item.item_id in touched)
    # What was not valid did nothing: leaving it out gives the same memory, but for the numbers of the operations.
    again, _ = transition.apply(before, [o.operation for o in outcomes if o.valid], step=len(responses))
    assert without_sources(again) == without_sources(after)


@few_examples
@hypothesis.given(responses)
def test_delete_undoes_insert(responses):
    before = run(responses)
    after, outcomes = transition.apply(before, [insert("new"), delete(before.next_id)], step=9)
    assert after.items == before.items
    assert all(outcome.valid for outcome in outcomes)


def test_a_large_memory():
    # 3,000 items and 900 operations; quadratic code would compare millions of texts here.
    full = run([[insert(f"fact {i}") for i in range(3000)]])
    written = [op for i in range(1, 301) for op in (update(i, f"new {i}"), delete(i + 1000), insert(f"more {i}"))]
    after, outcomes = transition.apply(full, written, step=1)
    assert all(outcome.valid for outcome in outcomes)
    assert len(after.items) == 3000
    assert transition.invariants(after, num_steps=2) == []


# --------------------------------------------------------------------------------------
# Invariants
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items, said",
    [
        ([MemoryItem(1, "a", 0), MemoryItem(1, "b", 1)], "share an id"),
        ([MemoryItem(1, "a", 0), MemoryItem(2, "a", 1)], "share a text"),
        ([MemoryItem(2, "a", 0), MemoryItem(1, "b", 1)], "order of insertion"),
        ([MemoryItem(1, "a", 0, 3), MemoryItem(2, "b", 0, 3)], "by the same operation"),
        ([MemoryItem(1, "a", 0, -1)], "source_operation -1, below 0"),
        ([MemoryItem(1, "a", 0, 0, "working")], "unknown memory type 'working'"),
        ([MemoryItem(1, "a", 0, 0, CORE), MemoryItem(2, "b", 0, 1)], "some have none"),
        ([MemoryItem(1, "a", 0, 0, CORE), MemoryItem(2, "b", 0, 1, CORE)], "more than one core"),
        ([MemoryItem(3, "a", 0)], "outside [1, next_id) = [1, 3)"),
        ([MemoryItem(0, "a", 0)], "outside [1, next_id) = [1, 3)"),
        ([MemoryItem(1, "a", 4)], "source_step 4, outside [0, 4)"),
        ([MemoryItem(1, "a", -1)], "source_step -1, outside [0, 4)"),
        ([MemoryItem(1, " ", 0)], "is blank"),
    ],
)
def test_each_broken_invariant_is_named(items, said):
    (sentence,) = transition.invariants(Memory(tuple(items), next_id=3), num_steps=4)
    assert said in sentence
