"""Applies operations to a memory: the transition 𝒯, and the eviction of items that it has no room for.

Knows nothing of tokens, prompts or rewards. What a manager wrote is data here: nothing it writes raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finemem_jax.types import CORE, MEMORY_TYPES, Action, Malformed, Memory, MemoryItem, Operation, Outcome, Status


def apply(memory: Memory, written: Sequence[Operation | Malformed], step: int) -> tuple[Memory, tuple[Outcome, ...]]:
    """Returns the memory after one step, and what became of each operation written in it.

        M_t = 𝒯(M_{t-1}, P_t)      (docs/method.md)

    Operations take effect in the order written; each sees what those before it did. Deterministic and total.

    - INSERT appends an item with the next id.
    - UPDATE rewrites text and source; the item keeps its id and its place.
    - DELETE removes the item. Ids are never given out again.
    - UPDATE or DELETE of an id that is not there, or belongs to another memory type, is UNKNOWN_ID.
    - INSERT or UPDATE to a text that some item of the type already has, letter for letter, is DUPLICATE. So the texts
      of a type stay unique. This holds for the item's own text too: saying again is not writing, and if it moved
      source_step, a manager could take over the credit of earlier steps by updating items to what they say.
    - The core memory is one item at most, found without an id. Writing it creates it where there is none.
    - SKIP is APPLIED when it is all that was written, and DUPLICATE otherwise: beside other calls it says nothing,
      and a response full of SKIPs would raise the valid fraction (r_fmt) for free.
    - Malformed calls are MALFORMED.

    Whatever is not APPLIED changes nothing.

    Args:
        memory: M_{t-1}.
        written: P_t, as `operations.parse` returns it.
        step: t, 0-based; becomes source_step of what is written, and the index in `written` its source_operation.

    Returns:
        M_t, and one outcome per entry of `written`, in order.
    """
    draft = _Draft(memory)
    outcomes = tuple(
        Outcome(operation, Status.MALFORMED)
        if isinstance(operation, Malformed)
        else draft.apply(operation, source=(step, index), is_alone=len(written) == 1)
        for index, operation in enumerate(written)
    )
    return Memory(tuple(draft.items.values()), draft.next_id), outcomes


class _Draft:
    """A memory while the operations of one step are applied to it."""

    def __init__(self, memory: Memory):
        # In order of insertion, which UPDATE keeps. Operations without an id look for None, and find nothing.
        self.items: dict[int | None, MemoryItem] = {item.item_id: item for item in memory.items}
        self.next_id = memory.next_id
        self._texts = {(item.memory_type, item.text) for item in memory.items}
        self._core_id = next((item.item_id for item in memory.items if item.memory_type == CORE), None)

    def apply(self, operation: Operation, *, source: tuple[int, int], is_alone: bool) -> Outcome:
        """Applies one operation, by the rules of `transition.apply`.

        Args:
            source: Step and operation that the item is written by.
            is_alone: Whether it is all that was written.
        """
        action, memory_type = operation.action, operation.memory_type
        if action is Action.SKIP:
            return Outcome(operation, Status.APPLIED if is_alone else Status.DUPLICATE)
        is_core = memory_type == CORE
        inserts = action is Action.INSERT and not is_core
        previous = None if inserts else self.items.get(self._core_id if is_core else operation.item_id)
        if previous is not None and previous.memory_type != memory_type:
            previous = None
        creates = previous is None and (inserts or (is_core and action is not Action.DELETE))
        if previous is None and not creates:
            return Outcome(operation, Status.UNKNOWN_ID)
        if action is not Action.DELETE and (memory_type, operation.content) in self._texts:
            return Outcome(operation, Status.DUPLICATE)

        item_id = self.next_id if previous is None else previous.item_id
        if previous is None:
            self.next_id += 1
        else:
            self._texts.remove((memory_type, previous.text))
        if action is Action.DELETE:
            del self.items[item_id]
        else:
            self._texts.add((memory_type, operation.content))
            self.items[item_id] = MemoryItem(item_id, operation.content, *source, memory_type)
        if is_core:
            self._core_id = None if action is Action.DELETE else item_id
        return Outcome(operation, Status.APPLIED, item_id, previous)


EVICTIONS = ("oldest", "stale")


def evict(memory: Memory, budget: int, tokens: Callable[[str], int], rule: str) -> Memory:
    """Returns the memory without the items that must go, so that its texts have at most `budget` tokens together.

    The core memory stays. If it alone exceeds the budget, it is all that is left.

    Args:
        tokens: Length of a text.
        rule: Which go first: the "oldest" (in order of insertion), or the most "stale" (those whose last writing is
            longest ago, so that an UPDATE keeps an item alive).
    """
    lengths = {item.item_id: tokens(item.text) for item in memory.items}
    over = sum(lengths.values()) - budget
    if over <= 0:
        return memory
    candidates = [item for item in memory.items if item.memory_type != CORE]
    if rule == "stale":
        candidates.sort(key=lambda item: (item.source_step, item.source_operation))
    gone = set()
    for item in candidates:
        if over <= 0:
            break
        gone.add(item.item_id)
        over -= lengths[item.item_id]
    return Memory(tuple(item for item in memory.items if item.item_id not in gone), memory.next_id)


def states(memory: Memory, outcomes: Sequence[Outcome], step: int) -> list[Memory]:
    """Returns the memory after each single operation of a step, rebuilt from what became of them.

    It takes the outcomes' word: no rule of `apply` is judged again.

    Args:
        memory: M_{t-1}, before the step.
        outcomes: Of the step, as `apply` returned them for this memory.
        step: t.

    Returns:
        One memory per outcome; the last one is M_t. Where nothing changed, the same object as before.
    """
    rebuilt = []
    for index, outcome in enumerate(outcomes):
        memory = _after(memory, outcome, step, index)
        rebuilt.append(memory)
    return rebuilt


def _after(memory: Memory, outcome: Outcome, step: int, index: int) -> Memory:
    operation, item_id = outcome.operation, outcome.item_id
    if item_id is None or isinstance(operation, Malformed):
        return memory
    if operation.action is Action.DELETE:
        return Memory(tuple(item for item in memory.items if item.item_id != item_id), memory.next_id)
    written = MemoryItem(item_id, operation.content, step, index, operation.memory_type)
    if outcome.previous is None:
        return Memory((*memory.items, written), item_id + 1)
    return Memory(tuple(written if item.item_id == item_id else item for item in memory.items), memory.next_id)


def invariants(memory: Memory, num_steps: int) -> list[str]:
    """Lists the invariants that a memory breaks, one sentence each; [] for every memory that `apply` can reach.

    For tests, fuzzing and the loading of files.

    Args:
        memory: M_t.
        num_steps: Number of steps taken so far, t + 1; source_step lies in [0, num_steps).
    """
    broken = []
    ids = [item.item_id for item in memory.items]
    texts = [(item.memory_type, item.text) for item in memory.items]
    sources = [(item.source_step, item.source_operation) for item in memory.items]
    types = [item.memory_type for item in memory.items]
    if ids != sorted(ids):
        broken.append("Items are not in order of insertion: their ids do not ascend.")
    if len(set(ids)) < len(ids):
        broken.append("Two items share an id.")
    if len(set(texts)) < len(texts):
        broken.append("Two items share a text.")
    if len(set(sources)) < len(sources):
        broken.append("Two items were last written by the same operation.")
    if "" in types and any(types):
        broken.append("Some items have a memory type, and some have none.")
    if types.count(CORE) > 1:
        broken.append("There is more than one core memory.")
    for item in memory.items:
        if not 1 <= item.item_id < memory.next_id:
            broken.append(f"Item {item.item_id} has an id outside [1, next_id) = [1, {memory.next_id}).")
        if not 0 <= item.source_step < num_steps:
            broken.append(f"Item {item.item_id} has source_step {item.source_step}, outside [0, {num_steps}).")
        if item.source_operation < 0:
            broken.append(f"Item {item.item_id} has source_operation {item.source_operation}, below 0.")
        if item.memory_type not in ("", *MEMORY_TYPES):
            broken.append(f"Item {item.item_id} has the unknown memory type {item.memory_type!r}.")
        if not item.text.strip():
            broken.append(f"Item {item.item_id} is blank.")
    return broken
