"""Counts what a compiled program sends between devices, from the text of its optimized HLO."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"^(.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
_OPERANDS = re.compile(r" (?:tuple|add|compare|and|fusion|copy)\((.*?)\)")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
_CONSTANT = re.compile(r"^[su]32\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'chain_id="(\d+)"')

_ROOT = "ROOT"
# Instructions of a computation by name; its result stands there under _ROOT as well.
Computation = dict[str, str]
Computations = dict[str, Computation]


class Traffic(NamedTuple):
    """Sums up the collectives of one run of a program.

    Attributes:
        sent: Bytes that leave each device, by kind of collective.
        runs: How many are run, by kind.
        largest: Bytes of the largest array that any of them makes or takes, on one device.
    """

    sent: dict[str, float]
    runs: dict[str, float]
    largest: float

    @property
    def total(self) -> float:
        return sum(self.sent.values())


def traffic(text: str) -> Traffic:
    """Adds up the collectives of a program, those in a loop as often as it runs.

    A device among n sends, by the algorithms that send least, of an array of b bytes: all-gather and all-to-all
    b (n - 1) / n, reduce-scatter the same of what it takes, all-reduce twice as much, collective-permute b.

    How often a loop runs is taken from the compiler's note beside it, else from its condition. TPU programs spread one
    collective over several fused instructions, some of them in loops that run meanwhile; these have a "chain" in
    common, which counts once.
    """
    computations = _computations(text)
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])))
    sent: dict[str, float] = collections.defaultdict(float)
    runs: dict[str, float] = collections.defaultdict(float)
    largest, chains = 0.0, set()

    def walk(name: str, times: float) -> None:
        nonlocal largest
        for key, line in computations.get(name, {}).items():
            found = _COLLECTIVE.match(line)
            if key == _ROOT:
                continue
            if found:
                chain = _CHAIN.search(line)
                if chain and chain[1] in chains:
                    continue
                if chain:
                    chains.add(chain[1])
                kind, group = found[2], _group_size(line, devices)
                whole = _whole_bytes(found[1], kind, group, started=bool(found[3]))
                largest = max(largest, whole if group > 1 else 0)
                sent[kind] += times * whole * _sent_fraction(kind, group)
                runs[kind] += times
            elif loop := _WHILE.search(line):
                (body,) = _called(line)
                trips = _TRIPS.search(line)
                walk(body, times * (int(trips[1]) if trips else _trips(computations, loop[1], body)))
            elif not re.search(r"-(done|update)\(", line):
                for called in _called(line):
                    walk(called, times)

    walk("", 1)
    return Traffic(dict(sent), dict(runs), largest)


def _computations(text: str) -> Computations:
    """Parses all computations; the program itself is called ""."""
    found: Computations = {}
    current: Computation = {}
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = found["" if head[1] else head[2]] = {}
        elif instruction := _INSTRUCTION.match(line):
            current[instruction[2]] = instruction[3]
            if instruction[1]:
                current[_ROOT] = instruction[3]
    return found


def _trips(computations: Computations, condition: str, body: str) -> int:
    """Counts how often a loop runs whose counter starts at 0: the limit in its condition, by what its body adds."""
    limit = max(_constants(computations, condition), default=1)
    held = computations.get(condition, {})
    indices = [
        re.search(r"[su]32\S* get-tuple-element\(.*index=(\d+)", held.get(x, "")) for x in _operands(held, _ROOT)
    ]
    counter = next((int(index[1]) for index in indices if index), None)
    inside = computations.get(body, {})
    results = _operands(inside, _ROOT)
    step = 1
    if counter is not None and counter < len(results):
        added = [_CONSTANT.match(inside.get(x, "")) for x in _operands(inside, results[counter])]
        step = next((int(constant[1]) for constant in added if constant), 1)
    return -(-limit // step)


def _operands(computation: Computation, name: str) -> list[str]:
    found = _OPERANDS.search(computation.get(name, ""))
    return re.findall(r"%([\w.\-]+)", found[1]) if found else []


def _constants(computations: Computations, name: str) -> Iterator[int]:
    """Finds the integers that a computation, or one that it calls, compares with."""
    for line in computations.get(name, {}).values():
        if constant := _CONSTANT.match(line):
            yield int(constant[1])
        for called in _called(line):
            yield from _constants(computations, called)


def _called(line: str) -> list[str]:
    return [name.lstrip("%") for names in _CALLED.findall(line) for name in names.split(", ")]


def _group_size(line: str, devices: int) -> int:
    """Reads how many devices take part, in any of the three notations of replica_groups."""
    groups = re.search(r"replica_groups=(.*)", line)
    if not groups:
        return 2  # collective-permute: pairs
    text = groups[1]
    if text.startswith("mesh["):  # mesh['a'=2,'b'=4] {'a','b':(1)2}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", text.partition("]")[0]))
        named = re.search(r"\{([^}]*)\}", text.partition("]")[2])
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[1] if named else "")
        return math.prod(int(part or sizes[name]) for name, part in parts)
    if text.startswith("["):  # [groups,devices]<=[...]
        return int(re.match(r"\[\d+,(\d+)\]", text)[1])  # type: ignore[index]
    first = re.match(r"\{\{([\d,]*)\}", text)  # {{0,1},{2,3}}
    return len(first[1].split(",")) if first else devices


def _whole_bytes(result: str, kind: str, group: int, *, started: bool) -> float:
    """Counts the bytes of the array that is gathered, reduced, scattered or sent, as a whole."""
    total = _bytes(result)
    if kind == "reduce-scatter":
        return total * group
    if started and kind == "all-gather":
        return total * group / (group + 1)  # Its result names operand and result.
    if started and kind == "collective-permute":
        return total / 2
    return total


def _bytes(result: str) -> float:
    total = 0.0
    for dtype, shape in _ARRAY.findall(result):
        if dtype == "u32" and not shape:
            continue  # A semaphore.
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
        total += math.prod(int(n) for n in shape.split(",") if n) * bits / 8
    return total


def _sent_fraction(kind: str, group: int) -> float:
    """Returns what a device sends, as a fraction of the whole array."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group
