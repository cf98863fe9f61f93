"""Tests of finemem_jax/memory/operations.py: one written call, one operation or one reason why not."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

import fuzz_operations
from finemem_jax.memory import operations
from finemem_jax.memory.operations import LAYOUTS, TOOL_CALL_FORMATS, Dialect
from finemem_jax.types import CORE, EPISODIC, SEMANTIC, Action, Malformed, Operation

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
typed_well_formed = st.one_of(
    st.builds(Operation, st.just(Action.INSERT), contents, st.none(), st.sampled_from([SEMANTIC, EPISODIC])),
    st.builds(Operation, st.just(Action.UPDATE), contents, ids, st.sampled_from([SEMANTIC, EPISODIC])),
    st.builds(Operation, st.just(Action.UPDATE), contents, st.none(), st.just(CORE)),
    st.builds(Operation, st.just(Action.DELETE), st.just(""), ids, st.sampled_from([SEMANTIC, EPISODIC])),
    st.just(Operation(Action.DELETE, memory_type=CORE)),
)

TYPED = Dialect("typed", "json_lines")
HERMES = Dialect("flat", "hermes")
QWEN_AGENT = Dialect("typed", "qwen_agent")
DIALECTS = [Dialect(layout, call_format) for layout in LAYOUTS for call_format in TOOL_CALL_FORMATS]
FUNCTION, ARGS, RESULT, RETURN = (f"\u273f{word}\u273f" for word in ("FUNCTION", "ARGS", "RESULT", "RETURN"))

# One operation of each kind that the typed layout has, and its call by hand.
TYPED_CALLS = [
    (
        Operation(Action.INSERT, "Ana moved to Oslo.", None, SEMANTIC),
        '{"name": "new_memory_insert", "arguments": '
        '{"memory_type": "semantic_memory", "content": "Ana moved to Oslo."}}',
    ),
    (
        Operation(Action.UPDATE, "In May Ana moved.", 3, EPISODIC),
        '{"name": "memory_update", "arguments": '
        '{"memory_type": "episodic_memory", "new_content": "In May Ana moved.", "memory_id": 3}}',
    ),
    (
        Operation(Action.UPDATE, "About Ana.", None, CORE),
        '{"name": "memory_update", "arguments": {"memory_type": "core_memory", "new_content": "About Ana."}}',
    ),
    (
        Operation(Action.DELETE, "", 3, SEMANTIC),
        '{"name": "memory_delete", "arguments": {"memory_type": "semantic_memory", "memory_id": 3}}',
    ),
    (
        Operation(Action.DELETE, "", None, CORE),
        '{"name": "memory_delete", "arguments": {"memory_type": "core_memory"}}',
    ),
]


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def short(value):
    """Names a parametrized case; some inputs here are too long to be the name of a test."""
    return repr(value)[:40]


def reason(written, repair=False, dialect=operations.DEFAULT):
    """The reason for which a single call is refused."""
    (malformed,) = operations.parse(written, repair, dialect)
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
    assert isinstance(malformed, Malformed) and malformed.text == "y" * (operations.MAX_MALFORMED_CHARS - 1) + "…"
    (whole,) = operations.parse("y" * operations.MAX_MALFORMED_CHARS)
    assert isinstance(whole, Malformed) and whole.text == "y" * operations.MAX_MALFORMED_CHARS


def test_malformed_text_can_be_written_as_utf8():
    (malformed,) = operations.parse("no \udcff good")
    assert isinstance(malformed, Malformed) and malformed.text == "no ? good"


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


def test_fuzz():
    # A sample of what `python tests/fuzz_operations.py` tries by the million.
    chains = fuzz_operations.fuzz("sample", 3000)
    assert sum(chain.num_applied for chain in chains) > 500
    reasons = set().union(*(chain.reasons for chain in chains))
    assert {"not JSON", "unclosed tag", "unknown memory_type", "unknown name"} <= reasons


def test_fuzz_act():
    fuzz_operations.fuzz_act("sample", 40)


@pytest.mark.parametrize("unit", ["[", f"{FUNCTION}{ARGS}{{", "<tool_call>{", "x\n"])
@pytest.mark.parametrize("call_format", TOOL_CALL_FORMATS)
def test_time_is_linear(call_format, unit):
    # Twice, since another process can spoil one measurement.
    ratios = (fuzz_operations.growth(unit, Dialect("typed", call_format), True, size=5_000)[0] for _ in range(2))
    assert any(ratio < 3 for ratio in ratios)


def test_time_of_quadratic_code_would_be_noticed(monkeypatch):
    def slow(text, repair, dialect):
        sum(i < j for i in range(len(text)) for j in range(len(text)))
        return ()

    monkeypatch.setattr(operations, "parse", slow)
    assert fuzz_operations.growth("x", operations.DEFAULT, False, size=250)[0] > 3


# --------------------------------------------------------------------------------------
# Tools
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [operations.DEFAULT, TYPED])
def test_tools_describe_what_parse_accepts(dialect):
    examples = {
        "id": 3,
        "memory_id": 3,
        "content": "Ana lives in Oslo.",
        "new_content": "Ana lives in Oslo.",
        "memory_type": "episodic_memory",
    }
    for tool in operations.tools(dialect.layout):
        function, parameters = tool["function"], tool["function"]["parameters"]
        assert all(schema["description"] for schema in parameters["properties"].values())
        line = call(function["name"], **{name: examples[name] for name in parameters["properties"]})
        (got,) = operations.parse(line, dialect=dialect)
        assert isinstance(got, Operation)
        for memory_type in parameters["properties"].get("memory_type", {}).get("enum", ()):
            named = {name: examples[name] for name in parameters["properties"]} | {"memory_type": memory_type}
            (got,) = operations.parse(call(function["name"], **named), dialect=dialect)
            assert isinstance(got, Operation) and got.memory_type == memory_type.removesuffix("_memory")
        # What is required is enough, if only for the core memory.
        needed = {name: examples[name] for name in parameters["required"]}
        needed |= {"memory_type": parameters["properties"].get("memory_type", {}).get("enum", [""])[0]}
        needed = {name: value for name, value in needed.items() if name in parameters["required"]}
        (got,) = operations.parse(call(function["name"], **needed), dialect=dialect)
        assert isinstance(got, Operation)
    tools = operations.tools(dialect.layout)
    assert json.loads(json.dumps(tools)) == list(tools)


def test_tools_of_the_flat_layout():
    assert operations.tools("flat") is operations.TOOLS
    assert [tool["function"]["name"] for tool in operations.TOOLS] == [action.value for action in Action]
    for tool in operations.TOOLS:
        assert set(tool["function"]["parameters"]["required"]) == set(tool["function"]["parameters"]["properties"])


def test_tools_of_the_typed_layout():
    names = [tool["function"]["name"] for tool in operations.tools("typed")]
    assert names == ["new_memory_insert", "memory_update", "memory_delete"]
    insert, update, delete = (tool["function"]["parameters"] for tool in operations.TYPED_TOOLS)
    assert insert["properties"]["memory_type"]["enum"] == ["semantic_memory", "episodic_memory"]
    assert update["properties"]["memory_type"]["enum"] == ["core_memory", "semantic_memory", "episodic_memory"]
    assert update["required"] == ["memory_type", "new_content"]
    assert delete["required"] == ["memory_type"]


# --------------------------------------------------------------------------------------
# Dialects
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, call_format, field", [("tree", "hermes", "memory.layout"), ("flat", "xml", "manager.tool_call_format")]
)
def test_unknown_dialects_are_refused(layout, call_format, field):
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        Dialect(layout, call_format)


@pytest.mark.parametrize("call_format", TOOL_CALL_FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parse_undoes_render_in_every_dialect(layout, call_format):
    dialect = Dialect(layout, call_format)
    marks = [
        "<tool_call>",
        "</tool_call>",
        "\\</tool_call>",
        FUNCTION,
        f"\\{ARGS}",
        RESULT,
        "a } b",
        "{",
        "a\nb",
        '"',
        "Done",
    ]
    texts = st.one_of(contents, st.sampled_from(marks))
    kinds = well_formed if layout == "flat" else typed_well_formed

    @few_examples
    @hypothesis.given(st.lists(kinds, max_size=5), texts, st.booleans())
    def check(written, text, repair):
        written = [Operation(o.action, text, o.item_id, o.memory_type) if o.content else o for o in written]
        lines = [operations.render(operation, dialect) for operation in written]
        assert operations.parse("\n".join(lines), repair, dialect) == tuple(written)
        # Each rendered call is one span, from its first character to its last.
        joined = "\n".join(lines)
        assert [joined[start:end] for start, end in operations.spans(joined, dialect)] == lines

    check()


def test_typed_calls_by_hand():
    for operation, line in TYPED_CALLS:
        assert operations.render(operation, TYPED) == line
        assert operations.parse(line, dialect=TYPED) == (operation,)
    text = "\n".join(line for _, line in TYPED_CALLS)
    assert operations.parse(text, dialect=TYPED) == tuple(operation for operation, _ in TYPED_CALLS)


def test_hermes_by_hand():
    text = (
        "I will store this.\n"
        '<tool_call>\n{"name": "memory_insert", "arguments": {"content": "Ana moved to Oslo."}}\n</tool_call>\n'
        "and\n<tool_call>nonsense</tool_call></tool_call>"
        '<tool_call>{"name": "skip",\n "arguments": {}}</tool_call> Done.'
    )
    assert operations.parse(text, dialect=HERMES) == (
        INSERT,
        Malformed("<tool_call>nonsense</tool_call>", "not JSON"),
        SKIP,
    )
    assert operations.render(DELETE, HERMES) == (
        '<tool_call>\n{"name": "memory_delete", "arguments": {"id": 3}}\n</tool_call>'
    )


@pytest.mark.parametrize("repair", [False, True])
def test_hermes_tags_must_be_closed(repair):
    skip = operations.render(SKIP)
    cut_off = f"<tool_call>\n{skip}"
    assert reason(cut_off, repair, HERMES) == "unclosed tag"
    assert reason("<tool_call>", repair, HERMES) == "unclosed tag"
    assert reason(cut_off + "\n</tool_call", repair, HERMES) == "unclosed tag"
    # The next tag ends it, and is read.
    got = operations.parse(f"{cut_off}\n<tool_call>{skip}</tool_call>", repair, HERMES)
    assert got == (Malformed(cut_off, "unclosed tag"), SKIP)


def test_qwen_agent_by_hand():
    semantic, episodic, *_ = [operation for operation, _ in TYPED_CALLS]
    text = (
        "Let me think.\n"
        f"{FUNCTION}: new_memory_insert\n"
        f'{ARGS}: {{"memory_type": "semantic_memory", "content": "Ana moved to Oslo."}}\n'
        f"{FUNCTION}: memory_update\n"
        f'{ARGS}: {{"memory_type": "episodic_memory", "new_content": "In May Ana moved.", "memory_id": "3"}}'
        " as asked.\n"
        f"{RESULT}: ok\n{FUNCTION}: memory_delete\n{ARGS}: {{}}"
    )
    assert operations.parse(text, dialect=QWEN_AGENT) == (semantic, episodic)
    (_, end_of_first), (start, end) = operations.spans(text, QWEN_AGENT)
    assert text[end_of_first] == "\n"
    assert text[start:].startswith(f"{FUNCTION}: memory_update")
    assert text[end:].startswith(" as asked.")
    assert operations.render(TYPED_CALLS[4][0], QWEN_AGENT) == (
        f'{FUNCTION}: memory_delete\n{ARGS}: {{"memory_type": "core_memory"}}'
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"{FUNCTION}", "missing 'arguments'"),
        (f"{FUNCTION}: memory_delete", "missing 'arguments'"),
        (f"{FUNCTION}: memory_delete {{}}", "missing 'arguments'"),
        (f"{FUNCTION}: memory_delete\n{ARGS}:", "not JSON"),
        (f"{FUNCTION}: memory_delete\n{ARGS}: 3", "arguments are not an object"),
        (f"{FUNCTION}: memory_delete\n{ARGS}: {{}}", "missing argument 'memory_type'"),
        (f"{FUNCTION}: search_memory\n{ARGS}: {{}}", "unknown name"),
        (f"{FUNCTION}: memory_delete\n{ARGS}: {{'memory_type': 'core_memory'}}", "not JSON"),
    ],
)
def test_qwen_agent_reasons(text, expected):
    assert reason(text, dialect=QWEN_AGENT) == expected
    # What the model says after RETURN is an answer, and no part of the call.
    assert reason(f"{text}\n{RETURN}: }}", dialect=QWEN_AGENT) == expected


def test_qwen_agent_arguments_are_repaired():
    # A quote that is missing, and a reply cut off in its content.
    broken = (
        f"{FUNCTION}: new_memory_insert\n{ARGS}: {{'memory_type': 'semantic_memory', content: 'Ana moved to Oslo.'}} ok"
    )
    assert reason(broken, dialect=QWEN_AGENT) == "not JSON"
    assert operations.parse(broken, True, QWEN_AGENT) == (TYPED_CALLS[0][0],)
    cut_off = (
        f'{FUNCTION}: new_memory_insert\n{ARGS}: {{"memory_type": "semantic_memory", "content": "Ana moved to Oslo.'
    )
    assert operations.parse(cut_off, True, QWEN_AGENT) == (TYPED_CALLS[0][0],)


@pytest.mark.parametrize("text", ["Done", "Done.", " Done. \r\n\n", "Done\nDone"])
def test_done_writes_nothing(text):
    for dialect in DIALECTS:
        if dialect.layout == "typed" or dialect.tool_call_format != "json_lines":
            assert operations.parse(text, dialect=dialect) == ()
    # A flat manager has SKIP for that.
    assert {getattr(entry, "reason", "") for entry in operations.parse(text)} == {"not JSON"}
    assert reason("Done!", dialect=TYPED) == "not JSON"


def test_typed_has_no_skip():
    with pytest.raises(ValueError, match="no call for Action.SKIP"):
        operations.render(SKIP, TYPED)
    assert reason(operations.render(SKIP), dialect=TYPED) == "unknown name"
    assert reason(operations.render(INSERT), dialect=TYPED) == "unknown name"
    assert reason(TYPED_CALLS[0][1]) == "unknown name"


@pytest.mark.parametrize(
    "line, expected",
    [
        (call("new_memory_insert", content="x"), "missing argument 'memory_type'"),
        (call("new_memory_insert", memory_type="core_memory", content="x"), "core_memory takes no insert"),
        (call("new_memory_insert", memory_type="semantic", content="x"), "unknown memory_type"),
        (call("new_memory_insert", memory_type=["semantic_memory"], content="x"), "unknown memory_type"),
        (call("new_memory_insert", memory_type=None, content="x"), "unknown memory_type"),
        (call("new_memory_insert", memory_type="semantic_memory"), "missing argument 'content'"),
        (call("new_memory_insert", memory_type="semantic_memory", content="x", memory_id=1), "unexpected argument"),
        (call("memory_update", memory_type="semantic_memory", new_content="x"), "missing argument 'memory_id'"),
        (call("memory_update", memory_type="core_memory"), "missing argument 'new_content'"),
        (call("memory_update", memory_type="core_memory", content="x"), "missing argument 'new_content'"),
        (call("memory_update", memory_type="core_memory", new_content="x", id=1), "unexpected argument"),
        (call("memory_delete", memory_type="episodic_memory"), "missing argument 'memory_id'"),
        (call("memory_delete", memory_type="episodic_memory", memory_id=None), "id is not an integer"),
        (call("memory_delete", memory_type="episodic_memory", memory_id="a3f0"), "id is not an integer"),
    ],
    ids=short,
)
def test_typed_reasons(line, expected):
    assert reason(line, dialect=TYPED) == expected


@pytest.mark.parametrize("given", [1, None, "", "core", [1], -1, 10**30])
def test_the_core_needs_no_id_and_ignores_one(given):
    core = call("memory_update", memory_type="core_memory", new_content="About Ana.", memory_id=given)
    assert operations.parse(core, dialect=TYPED) == (TYPED_CALLS[2][0],)
    core = call("memory_delete", memory_type="core_memory", memory_id=given)
    assert operations.parse(core, dialect=TYPED) == (TYPED_CALLS[4][0],)


def test_spans_by_hand():
    # 0 " ", 1-3 "ab", 3 "\r", 4 "\n", 5 "\n", 6 "Done" and a newline, 11 "c".
    assert operations.spans(" ab\r\n\nDone\nc", operations.DEFAULT) == ((1, 3), (6, 10), (11, 12))
    assert operations.spans(" ab\r\n\nDone\nc", TYPED) == ((1, 3), (11, 12))
    # Tags are 11 and 12 characters long.
    assert operations.spans("a<tool_call>b</tool_call>\n<tool_call> c ", HERMES) == ((1, 25), (26, 39))
    # Markers are 10 and 6 characters long.
    assert operations.spans(f"a{FUNCTION}b{ARGS}{{}}, {FUNCTION}c \n{RETURN}{FUNCTION}", QWEN_AGENT) == (
        (1, 20),
        (22, 33),
        (43, 53),
    )
