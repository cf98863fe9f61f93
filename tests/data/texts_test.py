"""Streams of the user's own texts and chats: what is read, how it is cut, where questions go, what errors say."""

import dataclasses
import json

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

texts = input_pipeline.builder("texts")
SPEC = StreamSpec("train", 1, 0, chunks_per_stream=2, chunk_words=12, questions_per_chunk=3, questions_per_stream=9)


def _load(folder, **changes):
    return texts.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


def _read(folder, chunk_words=12):
    """The chunks of each text of both splits by its name; one that is alone is a test text."""
    spec = dataclasses.replace(SPEC, chunk_words=chunk_words)
    return {own.name: texts._chunks(own, spec) for own in texts._read(str(folder)).values()}


def _jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


STORY = (
    "# A mill\n\nIt stood by\nThe River.\r\n\r\nIt had four sails on the roof. "
    + "It turned all day and all night long. " * 2
)


def test_a_text_is_cut_at_the_ends_of_paragraphs_and_sentences(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mill.md").write_bytes(b"\xef\xbb\xbf" + STORY.encode())
    assert _read(tmp_path) == {
        "sub/mill.md": [
            "# A mill\n\nIt stood by\nThe River.",
            *("It had four sails on the roof.", *["It turned all day and all night long."] * 2),
        ]
    }
    streams = sorted(_load(tmp_path, split="test"), key=lambda stream: stream.stream_id)
    assert [stream.stream_id for stream in streams] == ["sub/mill.md/0000", "sub/mill.md/0002"]
    assert {(stream.source, stream.competency, stream.questions) for stream in streams} == {("texts", "", ())}


def test_records_are_texts(tmp_path):
    _jsonl(tmp_path / "a.jsonl", {"text": "1.", "id": 7}, {"text": "2.", "title": "T", "name": "x"}, {"text": "3."})
    (tmp_path / "b.json").write_text(json.dumps([{"text": "4.", "id": 7}, {"text": " "}, {"text": "1."}], indent=1))
    for name in (".hidden.txt", "blank.txt", "page.html", "package.json", "numbers.json"):
        other = {"blank.txt": " \n", "package.json": '{"name": "p", "version": 3}', "numbers.json": "[1, 2]"}
        (tmp_path / name).write_text(other.get(name, "No."))
    assert _read(tmp_path) == {"7": ["1."], "T": ["2."], "a.jsonl:3": ["3."], "7 (b.json:1, record 1)": ["4."]}


def test_splits_go_by_what_texts_say(tmp_path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(f"The story of house {n}.")
        (other / f"renamed {9 - n}.md").write_text(f"The story of house {n}.")
    (other / "copy.txt").write_text("The story of house 3.")
    splits = [(folder, split) for folder in (tmp_path, other) for split in ("train", "test")]
    told = [{c.text for s in _load(folder, split=split) for c in s.chunks} for folder, split in splits]
    assert told[:2] == told[2:] and list(map(len, told[:2])) == [8, 2] and not told[0] & told[1]
    assert len(_load(tmp_path, num_streams=3)) == 3
    assert len({tuple(s.stream_id for s in _load(tmp_path, seed=seed)) for seed in range(4)}) > 1


def _node(parent, role=None, *parts, time=1704067200.5):
    message = role and {"author": {"role": role}, "content": {"parts": list(parts)}, "create_time": time}
    return {"parent": parent, "children": [], "message": message}


TREE = {
    "root": _node(None),
    "hidden": _node("root", "system", "Be kind."),
    "ask": _node("hidden", "user", "What is a lamp?", {"asset_pointer": "picture"}),
    "first": _node("ask", "assistant", "A light."),
    "other": _node("ask", "assistant", "A thing that shines.", time=1704153600),
    "thanks": _node("other", "user", "Thanks."),
}


def test_chatgpt(tmp_path):
    chats = [
        {"title": "Lamps", "create_time": 1.7e9, "mapping": TREE, "current_node": "first"},
        {"title": "Lamps", "create_time": 1.7e9, "mapping": TREE, "current_node": None},
        {"title": "Empty", "mapping": {}, "current_node": None},
    ]
    (tmp_path / "conversations.json").write_text(json.dumps(chats))
    (tmp_path / "user.json").write_text(json.dumps({"id": "u", "email": "a@b"}))
    shown, longest = _read(tmp_path, chunk_words=50).items()
    assert shown == ("Lamps", ["Date: 2024-01-01\nuser: What is a lamp?\nassistant: A light."])
    assert longest[0] == "Lamps (conversations.json:1, record 2)"
    said = ["Date: 2024-01-01\nuser: What is a lamp?", "Date: 2024-01-02\nassistant: A thing that shines."]
    assert longest[1] == ["\n".join([*said, "Date: 2024-01-01\nuser: Thanks."])]


def test_other_exports(tmp_path):
    parts = [{"type": "text", "text": "Hello"}, {"type": "tool_use"}]
    first = {"sender": "human", "text": "Hi", "created_at": "2024-03-01T09:00:00Z"}
    second = {"sender": "assistant", "text": "", "content": parts}
    called = {"role": "assistant", "content": None, "tool_calls": []}
    chats = [
        {"name": "Claude", "chat_messages": [first, second], "created_at": "2024-03-02T00:00:00Z"},
        {"id": "ShareGPT", "conversations": [{"from": "human", "value": "Hi"}]},
        {"title": "messages", "messages": [called, {"role": "assistant", "content": parts}]},
    ]
    (tmp_path / "x.json").write_text(json.dumps(chats))
    assert _read(tmp_path) == {
        "Claude": ["Date: 2024-03-01\nhuman: Hi\nDate: 2024-03-02\nassistant: Hello"],
        "ShareGPT": ["human: Hi"],
        "messages": ["assistant: Hello"],
    }


def test_lines_of_turns_are_one_chat_cut_between_turns(tmp_path):
    turns = [{"user": "Ann", "text": f"This is line number {n}.", "ts": str(1704067200 + n * 43200)} for n in range(4)]
    _jsonl(tmp_path / "chat.jsonl", *turns, {"role": "user", "content": None})
    both = "Date: 2024-01-0{}\nAnn: This is line number {}.\nAnn: This is line number {}."
    assert _read(tmp_path, chunk_words=14)["chat.jsonl"] == [both.format(1, 0, 1), both.format(2, 2, 3)]
    assert len(_read(tmp_path, chunk_words=8)["chat.jsonl"]) == 4
    with pytest.raises(ValueError, match=r"data.chunk_words must be at least 4 to hold 'Date: .*chat.jsonl\), got 3"):
        _read(tmp_path, chunk_words=3)


@pytest.mark.parametrize(
    "first, second, date",
    [
        ("31/12/2023, 10:00 - ", "01/01/2024, 10:05 - ", "31/12/2023"),
        ("[31/12/2023, 10:00:00] ", "\u200e[01/01/2024, 10:05:01] ", "31/12/2023"),
        ("12/31/23, 9:05\u202fPM - ", "1/1/24, 9:06\u202fPM - ", "12/31/23"),
    ],
)
def test_whatsapp(tmp_path, first, second, date):
    notice = f"{first}Messages are encrypted.\n"
    (tmp_path / "chat.txt").write_text(f"{notice}{first}Ann: See:\nthe lamp\n\nworks\n{second}Bo B: Good\n")
    (chunk,) = _read(tmp_path, chunk_words=50)["chat.txt"]
    assert chunk.startswith(f"Date: {date}\nMessages are encrypted.\nAnn: See:\nthe lamp\n\nworks\nDate: ")
    assert chunk.endswith("\nBo B: Good")
    (tmp_path / "chat.txt").write_text(f"{first}We went home.\nIt rained.")  # a diary
    assert _read(tmp_path)["chat.txt"] == [f"{first}We went home.\nIt rained."]


def test_questions_go_where_their_answer_is(tmp_path):
    (tmp_path / "mill.txt").write_text(STORY)
    _jsonl(
        tmp_path / "mill.questions.jsonl",
        {"question": "Where?", "answer": "by the river"},
        {"question": "How many?", "answers": ["four", "4"], "metric": "exact"},
        {"question": "When?", "answer": "all night"},  # in two chunks
        {"question": "Why?", "answer": 4},  # nowhere
    )
    first, last = sorted(_load(tmp_path, split="test"), key=lambda stream: stream.stream_id)
    assert [[q.text for q in chunk.questions] for chunk in first.chunks] == [["Where?"], ["How many?"]]
    where, how_many = first.questions
    assert (where.answers, where.metric, where.gold_steps) == (("by the river",), "substring", (0,))
    assert (how_many.answers, how_many.metric, how_many.gold_steps) == (("four", "4"), "exact", (1,))
    assert [(q.answers, q.gold_steps) for q in last.questions] == [(("all night",), ()), (("4",), ())]


def test_questions_of_records_and_of_copies(tmp_path):
    asked = [{"question": "Who?", "answer": "Ann"}]
    _jsonl(tmp_path / "a.jsonl", {"text": "Ann came.", "questions": asked}, {"text": "Bo came.", "questions": []})
    (tmp_path / "b.txt").write_text("Ann came.")
    _jsonl(tmp_path / "b.questions.jsonl", *asked, {"question": "What?", "answer": "came"})
    assert [[q.text for q in own.questions] for own in texts._read(str(tmp_path)).values()] == [["Who?", "What?"], []]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9 au lait", r"a.txt, byte 3: not UTF-8. Convert the file to UTF-8, or move it out of data."),
        ("a.txt", "as Windows saves".encode("utf-16"), r"a.txt, byte 0: not UTF-8"),
        ("a.md", b"PK\x03\x04\x00\x00", r"a.md, byte 4: a zero, which no text has. Save it as plain text in UTF-8"),
        ("a.txt", b"is " + b"x" * 10_001, r"a.txt: 'xxxxxxxxxxxxxxxxxxxx'… has no space for more than 10,000 char"),
        ("a.jsonl", b'{"text": "a"}\n{"text": b}\n', r"a.jsonl:2, column 10: broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl:2: expected a text or a chat, as before it. Corr"),
        ("a.jsonl", b'{"text": 5}', r"a.jsonl:1, field text: expected a text, got int 5"),
        ("a.jsonl", b'{"messages": [{"role": "user", "body": "b"}]}', r"messages\[0\].content: expected a text"),
        ("a.jsonl", b'{"messages": [{"role": 3, "content": "b"}]}', r"messages\[0\].role: expected a text, got int"),
        ("a.jsonl", b'{"role": "a", "text": {}}', r"a.jsonl:1, field text: expected a text, or a list of parts"),
        ("a.json", b'{"mapping": {"n": {"parent": 3}}}', r"a.json:1, field mapping.n.parent: expected a text"),
        ("a.json", b'{"messages": [], "date": []}', r"a.json:1, field date: expected a date as a text, or in sec"),
        ("a.jsonl", b'{"text": "a", "questions": [{"question": "b"}]}', r"questions\[0\].answer: .*field is missing"),
        ("a.jsonl", b'{"text": "a", "questions": [{"answers": ["b", true]}]}', r"questions\[0\].answers: .*got li"),
        ("a.jsonl", b'{"text": "a", "questions": [{"answer": "b"}]}', r"questions\[0\].question: expected a text"),
        ("a.questions.jsonl", b'{"question": "b", "answer": "c"}', r"a.questions.jsonl: the text .*is not beside it"),
        ("it.questions.jsonl", b'{"question": "b", "answer": " "}', r"it.questions.jsonl:1, field answer: expected a"),
        ("it.questions.jsonl", b'{"question": "b", "answer": "c", "metric": "d"}', r"field metric: expected one of s"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / "it.txt").write_text("A small one.")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _load(tmp_path)


def test_folders_without_texts(tmp_path):
    with pytest.raises(ValueError, match=r"holds no texts or chats \(.txt, .md, .jsonl, .json\); 0 files"):
        _load(tmp_path)
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "two.questions.jsonl").write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(
        ValueError, match=r"two.questions.jsonl: two.jsonl holds 2 texts, .*not clear which one .*records"
    ):
        _load(tmp_path)


def test_many_files_and_an_endless_line(tmp_path):
    for n in range(1_000):
        (tmp_path / f"{n}.txt").write_text(f"Story {n}. " + "The lamp is lit, and they all sit down to eat. " * 30)
    (tmp_path / "long.txt").write_text("All of it is one line. " * 100_000)
    assert sum(len(_load(tmp_path, split=s, chunks_per_stream=10, chunk_words=512)) for s in ("train", "test")) == 1118
