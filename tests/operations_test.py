"""Tests of finemem_jax/operations.py: one line of text, one operation or one reason why not."""

import json
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from finemem_jax import memory, operations
from finemem_jax.episode import Action, Malformed, Memory, Operation

few_examples = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)

INSERT = Operation(Action.INSERT, content="Ana moved to Oslo.")
UPDATE = Operation(Action.UPDATE, content="Ana lives in Oslo.", item_id=3)
DELETE = Operation(Action.DELETE, item_id=3)
SKIP = Operation(Action.SKIP)

contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).map(str.strip).filter(bool)
ids = st.integers(0, 10**operations.MAX_ID_DIGITS - 1)
well_formed = st.one_of(
    st.builds(Operation, st.just(Action.INSERT), contents),
    st.builds(Operation, st.just(Action.UPDATE), contents, ids),
    st.builds(Operation, st.just(Action.DELETE), st.just(""), ids),
    st.just(SKIP),
)


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def short(value):
    """Names a parametrized case; some inputs here are too long to be the name of a test."""
    return repr(value)[:40]


def reason(line, repair=False):
    """The reason for which a single line is refused."""
    (malformed,) = operations.parse(line, repair)
    assert isinstance(malformed, Malformed), malformed
    return malformed.reason


# --------------------------------------------------------------------------------------
# What is accepted
# --------------------------------------------------------------------------------------


def test_one_operation_per_line_in_order():
    text = """
        {"name": "memory_insert", "arguments": {"content": "Ana moved to Oslo."}}

        {"name": "memory_update", "arguments": {"id": 3, "content": "Ana lives in Oslo."}}
        Done thinking.
        {"name": "memory_delete", "arguments": {"id": 3}}
        {"name": "skip", "arguments": {}}
    """
    got = operations.parse(text)
    assert got == (INSERT, UPDATE, Malformed("Done thinking.", "not JSON"), DELETE, SKIP)


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n\r\n"])
def test_nothing_written_is_nothing_parsed(text):
    assert operations.parse(text) == ()


def test_rendered_by_hand():
    assert operations.render(UPDATE) == (
        '{"name": "memory_update", "arguments": {"id": 3, "content": "Ana lives in Oslo."}}'
    )
    assert operations.render(SKIP) == '{"name": "skip", "arguments": {}}'


@pytest.mark.parametrize(
    "content", ['say "hi"', "back\\slash", "line\nbreak", "a\r\nb", "naïve 漢字 🙂", "a\u2028b\x85c\x0bd"]
)
def test_content_survives(content):
    operation = Operation(Action.INSERT, content=content)
    assert "\n" not in operations.render(operation)
    assert operations.parse(operations.render(operation)) == (operation,)


@few_examples
@hypothesis.given(st.lists(well_formed, max_size=5), st.booleans())
def test_parse_undoes_render(written, repair):
    text = "\n".join(operations.render(operation) for operation in written)
    assert operations.parse(text, repair) == tuple(written)


def test_carriage_returns_and_outer_whitespace_are_tolerated():
    text = f"  {operations.render(DELETE)} \r\n{call('memory_insert', content='  Ana moved to Oslo. ')}\r\n"
    assert operations.parse(text) == (DELETE, INSERT)


@pytest.mark.parametrize("written, item_id", [(0, 0), (7, 7), ("7", 7), ("007", 7), (10**18 - 1, 10**18 - 1)])
def test_ids(written, item_id):
    (got,) = operations.parse(call("memory_delete", id=written))
    assert got == Operation(Action.DELETE, item_id=item_id)


def test_the_last_of_duplicate_keys_counts():
    assert operations.parse('{"name": "skip", "name": "memory_delete", "arguments": {"id": 4, "id": 3}}') == (DELETE,)


# --------------------------------------------------------------------------------------
# What is refused, and why
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, expected",
    [
        ("I will remember this.", "not JSON"),
        ('{"name": "skip", "arguments": {}', "not JSON"),
        ('{"name": "memory_delete", "arguments": {"id": NaN}}', "not JSON"),
        ('{"name": "memory_delete", "arguments": {"id": -Infinity}}', "not JSON"),
        ("\ufeff" + operations.render(SKIP), "not JSON"),
        (operations.render(SKIP) + operations.render(SKIP), "not JSON"),
        ('{"name": "memory_delete", "arguments": {"id": ' + "1" * 5000 + "}}", "not JSON"),
        ("[" * 10_000, "nested too deep"),
        ("[" * 10_000 + "]" * 10_000, "nested too deep"),
        ("[]", "not an object"),
        ("null", "not an object"),
        ('"skip"', "not an object"),
        ("{}", "missing 'name'"),
        ('{"name": "skip"}', "missing 'arguments'"),
        ('{"name": "skip", "arguments": {}, "reason": ""}', "unexpected key"),
        (call("memory_search", query="x"), "unknown name"),
        (call("INSERT", content="x"), "unknown name"),
        ('{"name": ["skip"], "arguments": {}}', "unknown name"),
        ('{"name": "skip", "arguments": []}', "arguments are not an object"),
        ('{"name": "memory_delete", "arguments": "{\\"id\\": 3}"}', "arguments are not an object"),
        (call("memory_insert"), "missing argument 'content'"),
        (call("memory_update", content="x"), "missing argument 'id'"),
        (call("memory_update", id=1), "missing argument 'content'"),
        (call("memory_delete"), "missing argument 'id'"),
        (call("skip", id=1), "unexpected argument"),
        (call("memory_insert", content="x", id=1), "unexpected argument"),
        (call("memory_insert", content=5), "content is not a string"),
        (call("memory_insert", content=" \n "), "empty content"),
        (call("memory_insert", content="x" * (operations.MAX_CONTENT_CHARS + 1)), "content is too long"),
        (call("memory_insert", content="\ud800"), "content is not valid Unicode"),
        (call("memory_delete", id=True), "id is not an integer"),
        (call("memory_delete", id=None), "id is not an integer"),
        (call("memory_delete", id=3.0), "id is not an integer"),
        (call("memory_delete", id="3.0"), "id is not an integer"),
        (call("memory_delete", id=""), "id is not an integer"),
        (call("memory_delete", id="-3"), "id is not an integer"),
        (call("memory_delete", id="٣"), "id is not an integer"),
        (call("memory_delete", id="²"), "id is not an integer"),
        (call("memory_delete", id=-3), "id is negative"),
        (call("memory_delete", id=10**18), "id is too long"),
        (call("memory_delete", id="0" * 19), "id is too long"),
        (call("memory_delete", id="1" * 100_000), "id is too long"),
    ],
    ids=short,
)
def test_reasons(line, expected):
    assert reason(line) == expected


def test_content_may_be_as_long_as_allowed():
    longest = "x" * operations.MAX_CONTENT_CHARS
    assert operations.parse(call("memory_insert", content=f" {longest} ")) == (Operation(Action.INSERT, longest),)


def test_long_lines_are_cut_in_reports():
    (malformed,) = operations.parse("y" * 1_000_000)
    assert malformed.text == "y" * (operations.MAX_MALFORMED_CHARS - 1) + "…"
    (whole,) = operations.parse("y" * operations.MAX_MALFORMED_CHARS)
    assert whole.text == "y" * operations.MAX_MALFORMED_CHARS


def test_malformed_text_can_be_written_as_utf8():
    (malformed,) = operations.parse("no \udcff good")
    assert malformed.text == "no ? good"


# --------------------------------------------------------------------------------------
# Repair
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        '{"name": "memory_insert", "arguments": {"content": "Ana moved to Oslo."}',
        '{"name": "memory_insert", "arguments": {"content": "Ana moved to Oslo.',
        "{'name': 'memory_insert', 'arguments': {'content': 'Ana moved to Oslo.'}}",
        '{"name": "memory_insert", "arguments": {"content": "Ana moved to Oslo.",},}',
        '{name: "memory_insert", arguments: {content: "Ana moved to Oslo."}}',
    ],
)
def test_repair_mends_what_strict_parsing_refuses(line):
    assert reason(line) == "not JSON"
    assert operations.parse(line, repair=True) == (INSERT,)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("I will remember this.", "not JSON"),  # Nothing there to mend.
        ("[1, 2", "not JSON"),
        ("{'name': 'memory_delete', 'arguments': {'id': 'three'}}", "id is not an integer"),
        (call("skip", id=1), "unexpected argument"),  # JSON already: repair does not change what it says.
    ],
)
def test_repair_does_not_excuse_the_rest(line, expected):
    assert reason(line, repair=True) == expected


def test_repair_keeps_its_bounds():
    def cut_off(content):
        return call("memory_insert", content=content)[:-1]

    room = operations.MAX_REPAIR_CHARS - len(cut_off(""))
    assert operations.parse(cut_off("x" * room), repair=True) == (Operation(Action.INSERT, "x" * room),)
    assert reason(cut_off("x" * (room + 1)), repair=True) == "not JSON"
    room = operations.MAX_REPAIR_BRACKETS - 2
    assert operations.parse(cut_off("(" * room), repair=True) == (Operation(Action.INSERT, "(" * room),)
    assert reason(cut_off("(" * (room + 1)), repair=True) == "not JSON"


@pytest.mark.parametrize("error", [ValueError, AssertionError, RecursionError, IndexError])
def test_a_failing_repair_is_no_repair(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(operations.json_repair, "loads", fail)
    assert reason("{'name': 'skip'", repair=True) == "not JSON"


# --------------------------------------------------------------------------------------
# Nothing raises
# --------------------------------------------------------------------------------------


@few_examples
@hypothesis.given(st.text(st.characters(), max_size=200), st.booleans())
def test_parse_is_total(text, repair):
    got = operations.parse(text, repair)
    # One entry a line keeps the work linear in the text: no line is read twice, none is looked at from another.
    assert len(got) == sum(bool(line.strip()) for line in text.split("\n"))


def adversarial_completions(num_random):
    """Texts that a broken or a scheming manager might write; the same ones at each call."""
    rng = random.Random(0)
    good = [operations.render(operation) for operation in (INSERT, UPDATE, DELETE, SKIP)]
    pieces = [
        '{"name": ',
        '"skip"',
        '"arguments": ',
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "\\",
        "\\u",
        "\\ud83d",
        ":",
        ",",
        "\n",
    ]
    pieces += [
        "NaN",
        "1e999",
        "-0",
        "null",
        "/*",
        "//",
        "```json",
        "<think>",
        "\u2028",
        "\ufeff",
        "\x00",
        "\ud800",
        "é",
    ]
    yield "[" * 10_000
    yield '{"a":' * 10_000
    yield "[" * 10_000 + "]" * 10_000
    yield '{"name": "skip", "arguments": ' * 10_000
    yield '{"name": "memory_insert", "arguments": {"content": "' + "a" * 1_000_000 + '"}}'
    yield "{" * 1_000_000
    yield '"' * 1_000_000
    yield "\\" * 1_000_000
    yield "9" * 1_000_000
    yield "\n" * 1_000_000
    yield "x\n" * 10_000
    yield (good[3] + "\n") * 10_000
    for _ in range(num_random):
        kind = rng.randrange(4)
        if kind == 0:
            yield rng.randbytes(rng.randrange(80)).decode("utf-8", "surrogateescape")
        elif kind == 1:
            yield "".join(rng.choices(pieces, k=rng.randrange(40)))
        elif kind == 2:
            line = rng.choice(good)
            yield line[rng.randrange(3) : rng.randrange(len(line) + 1)]
        else:
            line = list(rng.choice(good))
            for _ in range(rng.randrange(1, 5)):
                line[rng.randrange(len(line))] = rng.choice(pieces)
            yield "".join(line)


@pytest.mark.parametrize("repair", [False, True])
def test_fuzz(repair):
    store, reasons = Memory(), set()
    for step, text in enumerate(adversarial_completions(2000)):
        written = operations.parse(text, repair)
        store, outcomes = memory.apply(store, written, step)
        assert len(outcomes) == len(written)
        for entry in written:
            if isinstance(entry, Malformed):
                assert 0 < len(entry.text.encode()) <= 4 * operations.MAX_MALFORMED_CHARS
                reasons.add(entry.reason)
            else:
                assert operations.parse(operations.render(entry)) == (entry,)
        if step % 100 == 0:
            assert memory.invariants(store, step + 1) == []
    assert memory.invariants(store, step + 1) == []
    # Reasons are categories to count, free of what was written.
    assert len(reasons) <= 20
    assert {"not JSON", "nested too deep", "content is too long"} <= reasons


# --------------------------------------------------------------------------------------
# Tools
# --------------------------------------------------------------------------------------


def test_tools_describe_what_parse_accepts():
    examples = {"id": 3, "content": "Ana lives in Oslo."}
    assert [tool["function"]["name"] for tool in operations.TOOLS] == [action.value for action in Action]
    for tool in operations.TOOLS:
        parameters = tool["function"]["parameters"]
        assert set(parameters["required"]) == set(parameters["properties"])
        (got,) = operations.parse(
            call(tool["function"]["name"], **{name: examples[name] for name in parameters["required"]})
        )
        assert isinstance(got, Operation)
    assert json.loads(json.dumps(operations.TOOLS)) == list(operations.TOOLS)
