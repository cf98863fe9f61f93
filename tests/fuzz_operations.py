"""Fuzzes what a manager can write: random, cut, mutated and hostile texts, parsed and applied to a growing memory.

    python tests/fuzz_operations.py --count=1000000 [--seed=0]

In all layouts and call formats, with and without repair. Nothing may raise, entries must agree with spans, operations
must survive being rendered, the memory's invariants must hold, and the time must be linear in the text. Two
processes; the same seed tries the same texts. tests/operations_test.py runs a sample.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from finemem_jax.memory import operations, transition
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.operations import Dialect
from finemem_jax.models import tokenizer
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.types import CORE, EPISODIC, SEMANTIC, Action, Malformed, Memory, MemoryItem, Operation, Status

DIALECTS = tuple(
    Dialect(layout, call_format) for layout in operations.LAYOUTS for call_format in operations.TOOL_CALL_FORMATS
)
# Memories start anew when they are full. In small ones texts and ids meet more often, in large ones time would show.
MAX_ITEMS = (8, 300)
MAX_SECONDS_PER_TEXT = 5.0
# Reasons are categories to count, free of what was written.
MAX_REASONS = 32

MARKERS = [f"\u273f{word}\u273f" for word in ("FUNCTION", "ARGS", "RESULT", "RETURN")]
TAGS = ["<tool_call>", "</tool_call>", "<tool_call", "tool_call>"]
PIECES = [
    *('{"name": ', '"arguments": ', '{"name": "skip", "arguments": {}}', "{", "}", "[", "]", "(", '"', "'", "`", "“"),
    *("\\", "\\u", "\\ud83d", "\\u003c", ":", ",", "\n", "\r", "\t", " ", "NaN", "1e999", "-0", "null", "true", "0.1"),
    *('"content"', '"new_content"', '"id"', '"memory_id"', '"memory_type"', '"semantic_memory"', '"core_memory"'),
    *("/*", "*/", "//", "#", "```json", "<think>", "</think>", "Done", "Done.", "\u2028", "\x85", "\ufeff", "\x00"),
    *("\ud800", "\udcff", "é", "漢", "🙂", "٣", "x" * 50, *TAGS, *MARKERS),
]
CONTENTS = [
    "cat",
    "dog",
    "Ana lives in Oslo.",
    "Ana moved.",
    "x" * 300,
    'say "hi"',
    "a\nb",
    "c }",
    "<x>",
    *TAGS,
    *MARKERS,
]


def random_operation(draw, dialect, store):
    """An operation to write: ids are mostly of items that exist, some inserts are into the core, which refuses them."""
    action = draw.choice((Action.INSERT, Action.INSERT, Action.UPDATE, Action.DELETE, Action.SKIP))
    if dialect.layout == "typed" and action is Action.SKIP:
        action = Action.UPDATE
    text = draw.choice(CONTENTS) if draw.random() < 0.3 else f"fact {draw.randrange(10**6)} {draw.choice(CONTENTS)}"
    content = text if action in (Action.INSERT, Action.UPDATE) else ""
    item_id = draw.randrange(store.next_id + 2) if action in (Action.UPDATE, Action.DELETE) else None
    if item_id is not None and store.items and draw.random() < 0.7:
        item_id = draw.choice(store.items).item_id
    if dialect.layout == "flat":
        return Operation(action, content, item_id)
    memory_type = draw.choice((CORE, SEMANTIC, EPISODIC) if draw.random() < 0.5 else (SEMANTIC, EPISODIC))
    known = [item.memory_type for item in store.items if item.item_id == item_id]
    if known and draw.random() < 0.8:
        memory_type = known[0]
    return Operation(action, content, None if memory_type == CORE else item_id, memory_type)


def random_text(draw, dialect, store):
    """One completion: most are a few hundred characters long, some a hundred thousand."""

    def call():
        # Now and then in another dialect than the one that is parsed.
        of = dialect if draw.random() < 0.9 else draw.choice(DIALECTS)
        return operations.render(random_operation(draw, of, store), of)

    def mutated():
        characters = list(call())
        for _ in range(draw.randrange(1, 5)):
            place = draw.randrange(len(characters))
            characters[place] = draw.choice(("", draw.choice(PIECES), characters[place] * 2))
        return "".join(characters)

    def cut():
        text = call()
        return text[draw.choice((0, 0, 1, 2)) : draw.randrange(len(text) + 1)]

    def soup():
        return "".join(draw.choices(PIECES, k=draw.randrange(40)))

    def noise():
        return draw.randbytes(draw.randrange(80)).decode("utf-8", draw.choice(("surrogateescape", "replace")))

    def repeated():
        unit = "".join(draw.choices(PIECES, k=draw.randrange(1, 4)))
        return unit * draw.choice((2, 17, 300, *([2000] if draw.random() < 0.05 else [])))

    def nested():
        value = draw.choice(("{}", "1", '"x"', "null"))
        for _ in range(draw.choice((1, 3, 30, 300))):
            value = draw.choice((f"[{value}]", f'{{"a":{value}}}', f'{{"name":"skip","arguments":{value}}}'))[:20_000]
        return value

    def burst():
        # Few texts, few ids: calls of one response that meddle with each other.
        near = Memory(store.items[-2:], store.next_id)
        core = dialect.layout == "typed" and draw.random() < 0.5
        written = []
        for _ in range(draw.randrange(2, 7)):
            operation = random_operation(draw, dialect, near)
            if core:
                operation = Operation(draw.choice((Action.UPDATE, Action.UPDATE, Action.DELETE)), "?", None, CORE)
            content = draw.choice(("cat", "dog", "fish")) if operation.action in (Action.INSERT, Action.UPDATE) else ""
            written.append(operations.render(dataclasses.replace(operation, content=content), dialect))
        return "\n".join(written)

    several = [draw.choice((call, call, mutated, cut, soup)) for _ in range(draw.randrange(1, 9))]
    kinds = ([call], [mutated], [cut], [soup], [noise], [repeated], [nested], [burst], several)
    (makers,) = draw.choices(kinds, weights=(1, 1, 1, 1, 1, 1, 1, 2, 4))
    return draw.choice(("\n", "\n", "\n\n", "", " ")).join(make() for make in makers)


def giants():
    """Long texts of one kind each; the worst that we could think of."""
    size = 200_000
    for unit in ("[", "{", "}", '"', "\\", "9", " ", "\n", "x", "x\n", '{"a":', "[]", "\ud800", *TAGS, *MARKERS):
        yield unit * (size // len(unit))
    yield "[" * 10_000 + "]" * 10_000
    for dialect in DIALECTS:
        long = "a" * size
        yield operations.render(Operation(Action.INSERT, long, None, SEMANTIC), dialect)
        yield operations.render(Operation(Action.UPDATE, long, 1, CORE), dialect)[:-30]
        yield (operations.render(Operation(Action.DELETE, "", 1, EPISODIC), dialect) + "\n") * 2000
        yield "".join(f"{tag}{{" for tag in (*TAGS, *MARKERS)) * (size // 80)


def expected(store, written, step):
    """What `transition.apply` should give, said again in the plainest way: lists, searched from the front."""
    items, next_id, statuses = list(store.items), store.next_id, []
    for number, entry in enumerate(written):
        if isinstance(entry, Malformed):
            statuses.append(Status.MALFORMED)
            continue
        if entry.action is Action.SKIP:
            statuses.append(Status.APPLIED if len(written) == 1 else Status.DUPLICATE)
            continue
        same_type = [item for item in items if item.memory_type == entry.memory_type]
        named = [item for item in same_type if entry.memory_type == CORE or item.item_id == entry.item_id]
        creates = entry.action is Action.INSERT
        creates |= entry.action is Action.UPDATE and entry.memory_type == CORE and not named
        if not creates and not named:
            statuses.append(Status.UNKNOWN_ID)
        elif entry.action is not Action.DELETE and entry.content in [item.text for item in same_type]:
            statuses.append(Status.DUPLICATE)
        elif creates:
            statuses.append(Status.APPLIED)
            items.append(MemoryItem(next_id, entry.content, step, number, entry.memory_type))
            next_id += 1
        else:
            statuses.append(Status.APPLIED)
            place = items.index(named[0])
            rewritten = MemoryItem(named[0].item_id, entry.content, step, number, entry.memory_type)
            items[place : place + 1] = [] if entry.action is Action.DELETE else [rewritten]
    return Memory(tuple(items), next_id), statuses


@dataclasses.dataclass
class Chain:
    """A memory that completions are applied to, one after the other, with every law checked at each."""

    dialect: Dialect
    repair: bool
    max_items: int = MAX_ITEMS[-1]
    store: Memory = dataclasses.field(default_factory=Memory)
    step: int = 0
    reasons: set = dataclasses.field(default_factory=set)
    num_operations: int = 0
    num_applied: int = 0
    slowest: tuple = (0.0, "")

    def feed(self, text):
        began = time.process_time()
        written = operations.parse(text, self.repair, self.dialect)
        after, outcomes = transition.apply(self.store, written, self.step)
        seconds = time.process_time() - began
        self.slowest = max(self.slowest, (seconds, f"{len(text)} characters, {text[:60]!a}"))
        assert seconds < MAX_SECONDS_PER_TEXT, f"{seconds:.1f} s for {len(text)} characters: {text[:200]!a}"

        spans = operations.spans(text, self.dialect)
        assert len(spans) == len(written) == len(outcomes)
        bounds = list(itertools.chain.from_iterable(spans))
        assert bounds == sorted(bounds) and (not bounds or 0 <= bounds[0] <= bounds[-1] <= len(text))
        for (start, end), entry in zip(spans, written, strict=True):
            assert text[start:end].strip() == text[start:end] != ""
            # A span is a call by itself: nothing outside of it has a say.
            if end - start < 2000:
                assert operations.parse(text[start:end], self.repair, self.dialect) == (entry,)
            if isinstance(entry, Malformed):
                assert 0 < len(entry.text.encode()) <= 4 * operations.MAX_MALFORMED_CHARS
                self.reasons.add(entry.reason)
            else:
                rendered = operations.render(entry, self.dialect)
                assert operations.parse(rendered, False, self.dialect) == (entry,)
        if len(outcomes) < 100:
            assert (after, [outcome.status for outcome in outcomes]) == expected(self.store, written, self.step)
            states = transition.states(self.store, outcomes, self.step)
            assert len(states) == len(outcomes) and (not states or states[-1] == after)
            if len(outcomes) < 8:
                for count, state in enumerate(states, start=1):
                    assert state == transition.apply(self.store, written[:count], self.step)[0]
        if len(text) < 1000 or self.step % 20 == 0:
            broken = transition.invariants(after, self.step + 1)
            assert not broken, broken
        assert len(self.reasons) <= MAX_REASONS, self.reasons
        self.num_operations += len(written)
        self.num_applied += sum(outcome.valid for outcome in outcomes)
        self.store, self.step = after, self.step + 1
        if len(after.items) > self.max_items:
            self.store, self.step = Memory(), 0


def fuzz(seed, count):
    """Tries `count` texts on chains of every dialect; the chains. Raises with the text if one breaks a law."""
    draw = random.Random(repr(("fuzz", seed)))
    chains = [Chain(*rules) for rules in itertools.product(DIALECTS, (False, True), MAX_ITEMS)]
    for _ in range(count):
        chain = draw.choice(chains)
        operation = random_operation(draw, chain.dialect, chain.store)
        if (operation.action, operation.memory_type) != (Action.INSERT, CORE):
            rendered = operations.render(operation, chain.dialect)
            assert operations.parse(rendered, chain.repair, chain.dialect) == (operation,), rendered
        text = random_text(draw, chain.dialect, chain.store)
        try:
            chain.feed(text)
        except Exception as error:
            raise AssertionError(f"{chain.dialect}, repair={chain.repair}, on {text[:2000]!a}: {error!r}") from error
    return chains


def fuzz_giants():
    """Tries each giant on a fresh chain of every dialect; the chains."""
    chains = [Chain(dialect, repair) for dialect in DIALECTS for repair in (False, True)]
    for chain, text in itertools.product(chains, giants()):
        chain.feed(text)
    return chains


def fuzz_act(seed, count):
    """Tries random token ids on an environment: the core stays in its bounds, every token has an owner or none."""
    draw = random.Random(repr(("act", seed)))
    tokens = ByteTokenizer()
    for _ in range(count):
        dialect = draw.choice(DIALECTS)
        rules = Environment(tokens, 0, 150, 100, "split", True, dialect, core_tokens=60)
        store = Memory()
        for step in range(10):
            ids = tokens.encode(random_text(draw, dialect, store))[:3000]
            for _ in range(draw.randrange(4)):
                ids.insert(draw.randrange(len(ids) + 1), draw.randrange(tokens.vocab_size))
            store, outcomes, owners = rules.act(store, ids, step)
            assert len(owners) == len(ids)
            assert set(owners) - {-1} == set(range(len(outcomes)))
            spoken = tokenizer.strip_end(tokens, ids)
            spans = operations.spans(tokens.decode(spoken), dialect)
            starts = tokenizer.character_starts(tokens, spoken)
            assert set(owners[len(spoken) :]) <= {-1}
            for start, owner in zip(starts, owners, strict=False):
                assert [i for i, (first, end) in enumerate(spans) if first <= start < end] == [owner] * (owner >= 0)
            for item in store.items:
                assert item.memory_type != CORE or len(tokens.encode(item.text)) <= 60
            assert not transition.invariants(store, step + 1)


def growth(unit, dialect, repair, size=16_384, factor=8):
    """Time per character of a text `factor` times as long, in units of that of the shorter one; 1 is linear.

    Also says the seconds that the longer one took.
    """

    def seconds(length):
        text = (unit * (length // len(unit) + 1))[:length]
        best, spent = float("inf"), 0.0
        for _ in range(5):
            began = time.process_time()
            transition.apply(Memory(), operations.parse(text, repair, dialect), 0)
            took = time.process_time() - began
            best, spent = min(best, took), spent + took
            if spent > 0.5:
                break
        return best

    short, long = seconds(size), seconds(size * factor)
    # Below a millisecond the clock says little.
    return long / factor / max(short, 1e-3), long


def growth_units(draw, num_random):
    """What the texts of `growth` repeat: the bad ideas that we had, and random ones."""
    yield from ("[", "{", "}", '"', "\\", "9", "-", " ", "\n", "x", "x\n", "{\n", '{"a":', '"\\u', "\u2028", "Done\n")
    yield from (*TAGS, *MARKERS, "<tool_call>{", "<tool_call>}</tool_call>", f"{MARKERS[0]}{MARKERS[1]}{{}}")
    yield f"{MARKERS[0]}}}"
    yield f"{MARKERS[0]} {MARKERS[1]} }} "
    # Lines that are just short enough to be repaired.
    yield '{"name": [' * 8 + "'" * 3000 + "\n"
    yield json.dumps({"name": "memory_insert", "arguments": {"content": "x" * 3900}})[:-2] + "\n"
    for dialect in DIALECTS:
        yield operations.render(random_operation(draw, dialect, Memory()), dialect) + "\n"
    for _ in range(num_random):
        yield "".join(draw.choices(PIECES, k=draw.randrange(1, 60)))


def check_growth(seed, num_random, limit=3.0):
    """Tries all growth units in all dialects; (worst growth, its unit), raises where it is clearly above linear."""
    draw = random.Random(repr(("growth", seed)))
    worst = (0.0, "")
    for unit in growth_units(draw, num_random):
        for dialect, repair in itertools.product(DIALECTS, (False, True)):
            # Twice, since another process can spoil one measurement.
            ratio = min(growth(unit, dialect, repair)[0], 99.0)
            if ratio > limit:
                ratio = min(ratio, growth(unit, dialect, repair)[0])
            assert ratio <= limit, f"8 times the text took {8 * ratio:.0f} times as long: {unit!a} in {dialect}"
            worst = max(worst, (ratio, f"{unit[:60]!a} in {dialect.layout} {dialect.tool_call_format}"))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="how many random completions to try")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    ratio, unit = check_growth(arguments.seed, num_random=10)
    print(f"growth: at most {ratio:.2f} times the time per character on 8 times the text ({unit})", flush=True)
    chains = fuzz_giants()
    print(f"giants: {sum(chain.step for chain in chains)} texts", flush=True)
    fuzz_act(arguments.seed, max(arguments.count // 100, 10))
    print(f"act: {10 * max(arguments.count // 100, 10)} completions", flush=True)

    block = 5000
    sizes = [min(block, arguments.count - start) for start in range(0, arguments.count, block)]
    done = 0
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        seeds = [f"{arguments.seed}/{number}" for number in range(len(sizes))]
        for size, found in zip(sizes, pool.map(fuzz, seeds, sizes), strict=True):
            done += size
            chains += found
            print(f"random: {done} of {arguments.count} texts, {time.monotonic() - began:.0f} s", flush=True)
    reasons = sorted(set().union(*(chain.reasons for chain in chains)))
    seconds, slowest = max(chain.slowest for chain in chains)
    print(f"entries: {sum(c.num_operations for c in chains)}, applied: {sum(c.num_applied for c in chains)}")
    print(f"reasons ({len(reasons)}): {', '.join(reasons)}")
    print(f"slowest text: {seconds:.2f} s of CPU ({slowest})")
    print(f"no law was broken in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
