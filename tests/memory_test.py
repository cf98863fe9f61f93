"""Tests of finemem_jax/memory.py: what operations do to items."""

import hypothesis
import pytest
from hypothesis import strategies as st

from finemem_jax import memory
from finemem_jax.episode import Action, Malformed, Memory, MemoryItem, Operation, Outcome, Status

few_examples = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)

NONSENSE = Malformed("blah", "not JSON")
SKIP = Operation(Action.SKIP)
TWO_ITEMS = Memory((MemoryItem(1, "cat", 0), MemoryItem(2, "dog", 0)), next_id=3)


def insert(content):
    return Operation(Action.INSERT, content=content)


def update(item_id, content):
    return Operation(Action.UPDATE, content=content, item_id=item_id)


def delete(item_id):
    return Operation(Action.DELETE, item_id=item_id)


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


def run(responses):
    start = Memory()
    for step, written in enumerate(responses):
        start, _ = memory.apply(start, written, step)
    return start


def statuses(written, start=TWO_ITEMS):
    return [outcome.status for outcome in memory.apply(start, written, step=1)[1]]


# --------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------


def test_one_step_by_hand():
    # Item 1 is rewritten and keeps its place; item 2 goes; "fish" gets the next id, 3.
    written = [update(1, "cats"), delete(2), NONSENSE, insert("fish")]
    after, outcomes = memory.apply(TWO_ITEMS, written, step=5)
    assert after == Memory((MemoryItem(1, "cats", 5), MemoryItem(3, "fish", 5)), next_id=4)
    assert outcomes == (
        Outcome(written[0], Status.APPLIED, 1),
        Outcome(written[1], Status.APPLIED, 2),
        Outcome(NONSENSE, Status.MALFORMED),
        Outcome(written[3], Status.APPLIED, 3),
    )


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
    after, outcomes = memory.apply(TWO_ITEMS, [operation], step=7)
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
    assert memory.apply(TWO_ITEMS, [], step=0) == (TWO_ITEMS, ())


# --------------------------------------------------------------------------------------
# Laws
# --------------------------------------------------------------------------------------


@few_examples
@hypothesis.given(responses)
def test_invariants_hold_whatever_is_written(responses):
    assert memory.invariants(run(responses), max(len(responses), 1)) == []


@few_examples
@hypothesis.given(responses, st.lists(anything, max_size=6))
def test_outcomes_account_for_the_change(responses, written):
    before = run(responses)
    after, outcomes = memory.apply(before, written, step=len(responses))
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
    # What was not valid did nothing: leaving it out gives the same memory.
    assert memory.apply(before, [o.operation for o in outcomes if o.valid], step=len(responses))[0] == after


@few_examples
@hypothesis.given(responses)
def test_delete_undoes_insert(responses):
    before = run(responses)
    after, outcomes = memory.apply(before, [insert("new"), delete(before.next_id)], step=9)
    assert after.items == before.items
    assert all(outcome.valid for outcome in outcomes)


def test_a_large_memory():
    # 3,000 items and 900 operations; quadratic code would compare millions of texts here.
    full = run([[insert(f"fact {i}") for i in range(3000)]])
    written = [op for i in range(1, 301) for op in (update(i, f"new {i}"), delete(i + 1000), insert(f"more {i}"))]
    after, outcomes = memory.apply(full, written, step=1)
    assert all(outcome.valid for outcome in outcomes)
    assert len(after.items) == 3000
    assert memory.invariants(after, num_steps=2) == []


# --------------------------------------------------------------------------------------
# Invariants
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items, said",
    [
        ([MemoryItem(1, "a", 0), MemoryItem(1, "b", 0)], "share an id"),
        ([MemoryItem(1, "a", 0), MemoryItem(2, "a", 0)], "share a text"),
        ([MemoryItem(2, "a", 0), MemoryItem(1, "b", 0)], "order of insertion"),
        ([MemoryItem(3, "a", 0)], "outside [1, next_id) = [1, 3)"),
        ([MemoryItem(0, "a", 0)], "outside [1, next_id) = [1, 3)"),
        ([MemoryItem(1, "a", 4)], "source_step 4, outside [0, 4)"),
        ([MemoryItem(1, "a", -1)], "source_step -1, outside [0, 4)"),
        ([MemoryItem(1, " ", 0)], "is blank"),
    ],
)
def test_each_broken_invariant_is_named(items, said):
    (sentence,) = memory.invariants(Memory(tuple(items), next_id=3), num_steps=4)
    assert said in sentence
