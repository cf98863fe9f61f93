"""The transition of the memory: what a list of operations does to the items.

Knows nothing of tokens, prompts or rewards. What a manager wrote is data here: nothing it writes raises.
"""

from __future__ import annotations

from collections.abc import Sequence

from finemem_jax.episode import Action, Malformed, Memory, MemoryItem, Operation, Outcome, Status


def apply(memory: Memory, written: Sequence[Operation | Malformed], step: int) -> tuple[Memory, tuple[Outcome, ...]]:
    """Gives the memory after one step, and what became of each operation written in it.

        M_t = 𝒯(M_{t-1}, P_t)      (METHOD.md)

    Operations take effect in the order written; each sees what those before it did. Deterministic and total.

    - INSERT appends an item with the next id and source_step = `step`.
    - UPDATE rewrites text and source_step; the item keeps its id and its place.
    - DELETE removes the item. Ids are never given out again.
    - UPDATE or DELETE of an id that is not there is UNKNOWN_ID.
    - INSERT or UPDATE to a text that some item already has, letter for letter, is DUPLICATE. So texts stay unique.
      This holds for the item's own text too: saying again is not writing, and if it moved source_step, a manager
      could take over the credit of earlier steps by updating items to what they say.
    - SKIP is APPLIED when it is all that was written, and DUPLICATE otherwise: beside other lines it says nothing,
      and a response full of SKIPs would raise the valid fraction (r_fmt) for free.
    - Malformed lines are MALFORMED.

    Whatever is not APPLIED changes nothing.

    Args:
        memory: M_{t-1}.
        written: P_t, as `operations.parse` returns it.
        step: t, 0-based; becomes source_step of what is written.

    Returns:
        M_t, and one outcome per entry of `written`, in order. `Outcome.item_id` is the item that was inserted,
        updated or deleted, None where nothing changed.
    """
    items = {item.item_id: item for item in memory.items}  # In order of insertion, which UPDATE keeps.
    texts = {item.text for item in memory.items}
    next_id = memory.next_id
    outcomes = []
    for operation in written:
        if isinstance(operation, Malformed):
            outcomes.append(Outcome(operation, Status.MALFORMED))
            continue
        if operation.action is Action.SKIP:
            outcomes.append(Outcome(operation, Status.APPLIED if len(written) == 1 else Status.DUPLICATE))
            continue

        inserts = operation.action is Action.INSERT
        item_id = next_id if inserts else operation.item_id
        if not inserts and item_id not in items:
            outcomes.append(Outcome(operation, Status.UNKNOWN_ID))
            continue
        if operation.action is Action.DELETE:
            texts.remove(items.pop(item_id).text)
            outcomes.append(Outcome(operation, Status.APPLIED, item_id))
            continue
        if operation.content in texts:
            outcomes.append(Outcome(operation, Status.DUPLICATE))
            continue

        if inserts:
            next_id += 1
        else:
            texts.remove(items[item_id].text)
        texts.add(operation.content)
        items[item_id] = MemoryItem(item_id, operation.content, step)
        outcomes.append(Outcome(operation, Status.APPLIED, item_id))
    return Memory(tuple(items.values()), next_id), tuple(outcomes)


def invariants(memory: Memory, num_steps: int) -> list[str]:
    """Lists the invariants that a memory breaks, one sentence each; [] for every memory that `apply` can reach.

    For tests, fuzzing and the loading of files.

    Args:
        memory: M_t.
        num_steps: Number of steps taken so far, t + 1; source_step lies in [0, num_steps).
    """
    broken = []
    ids = [item.item_id for item in memory.items]
    texts = [item.text for item in memory.items]
    if ids != sorted(ids):
        broken.append("Items are not in order of insertion: their ids do not ascend.")
    if len(set(ids)) < len(ids):
        broken.append("Two items share an id.")
    if len(set(texts)) < len(texts):
        broken.append("Two items share a text.")
    for item in memory.items:
        if not 1 <= item.item_id < memory.next_id:
            broken.append(f"Item {item.item_id} has an id outside [1, next_id) = [1, {memory.next_id}).")
        if not 0 <= item.source_step < num_steps:
            broken.append(f"Item {item.item_id} has source_step {item.source_step}, outside [0, {num_steps}).")
        if not item.text.strip():
            broken.append(f"Item {item.item_id} is blank.")
    return broken
