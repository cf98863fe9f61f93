"""Tests of finemem_jax/questions/proposals.py: whatever a model replies is read, and flaws are found by words."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from finemem_jax.questions import proposals
from finemem_jax.questions.proposals import AskedBefore, Proposal, Worded
from finemem_jax.reading import scoring
from finemem_jax.types import Malformed


def line(question, answer):
    return json.dumps({"question": question, "answer": answer})


@pytest.mark.parametrize(
    "first, second, expected",
    [
        (("Where does Ana live?", "Porto"), ("where does Ana live", "porto"), True),
        (("Where does Ana live?", "Porto"), ("Where does Ana live now?", "Lisbon"), True),
        (("In which city does Ana live now?", "Porto"), ("In what city does Ana live now?", "Lisbon"), True),
        (("In which city does Ana live now?", "Porto"), ("In which city does Omar live now?", "Lisbon"), False),
        (("In which city does Ana live now?", "Porto"), ("In which town does Ana live now?", "Porto"), True),
        (("Where does Ana live?", "Porto"), ("What is Ana's home?", "Porto"), False),
    ],
)
def test_near_duplicates(first, second, expected):
    assert proposals.near_duplicates(first, second, 0.8) == expected
    assert proposals.near_duplicates(second, first, 0.8) == expected


def test_near_duplicates_by_hand():
    # 5 words and 6 (articles are none), 5 in common: F1 = 2 * 5 / 11 = 0.909.
    pair = ("When was the old bridge built?", "1904"), ("When was the old wooden bridge built?", "1904")
    assert scoring.token_f1(pair[0][0], [pair[1][0]]) == pytest.approx(10 / 11)
    assert proposals.near_duplicates(*pair, 10 / 11 - 1e-9) and not proposals.near_duplicates(*pair, 0.92)


words = st.lists(
    st.sampled_from(("when", "where", "Ana", "Omar", "live", "city", "old", "new")), min_size=1, max_size=7
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(st.tuples(words, st.sampled_from("pq")), max_size=12), words, st.floats(0.3, 1.0))
def test_looking_up_finds_what_comparing_with_all_does(known, asked, threshold):
    asked_before = AskedBefore(threshold)
    for question, answer in known:
        asked_before.add(Worded.of(" ".join(question), (answer,)))
    like = any(proposals.near_duplicates((" ".join(q), a), (" ".join(asked), "p"), threshold) for q, a in known)
    assert asked_before.holds_like(Worded.of(" ".join(asked), ("p",))) == like


@pytest.mark.parametrize(
    "question",
    [
        "According to the passage, who won?", "Who won in this text?", "What does the following paragraph say of Ana?",
        "Who is described in the article?", "What does the story tell of Ana?", "What did the author find?",
        "Which city is mentioned above?", "In the given context, who won?",
    ],
)  # fmt: skip
def test_questions_about_the_text(question):
    assert proposals.text_flaw(Proposal(question, "Ana"), "Ana won", 5) in ("refers_to_text", "gives_away")
    assert proposals.text_flaw(Proposal(question, "Biscuit"), "Biscuit", 5) == "refers_to_text"


@pytest.mark.parametrize(
    "question",
    [
        "Who is the author of Emma?", "Who wrote the article?", "Which story did Ana tell?",
        "According to Omar, who won?", 'Which label did the message "the door is stuck" get?',
    ],
)  # fmt: skip
def test_questions_about_other_things(question):
    assert proposals.text_flaw(Proposal(question, "Biscuit"), "Biscuit", 5) == ""


# --------------------------------------------------------------------------------------
# Replies
# --------------------------------------------------------------------------------------

A, B = Proposal("Who?", "Ana"), Proposal("Where is it?", "New York")
LINES = [line(*A), line(*B)]


@pytest.mark.parametrize(
    "reply",
    [
        "\n".join(LINES),
        "```json\n" + "\n".join(LINES) + "\n```",
        f"1. {LINES[0]}\n2) {LINES[1]}",
        f"- {LINES[0]},\n* {LINES[1]},",
        json.dumps([A._asdict(), B._asdict()]),
        json.dumps([A._asdict(), B._asdict()], indent=2),
        json.dumps({"questions": [A._asdict(), B._asdict()]}, indent=2),
        "[\n" + ",\n".join(LINES) + "\n]",
        f"{LINES[0]} {LINES[1]}",
        '{"Question": "Who?", "ANSWER ": " Ana ", "why": {"x": [1]}}\n\n' + LINES[1],
        "{'question': 'Who?', 'answer': 'Ana'}\n{question: \"Where is it?\", answer: \"New York\"}",
        '{"question": "Who?" "answer": "Ana",}\n{"question": "Where is it?", "answer": New York}',
        '{"question": "Who?", "answer": "Ana"\n{"question": "Where is\\n it?", "answer": "New York"',
        '{\n  "question": "Who?",\n  "answer": "Ana",\n}\n' + LINES[1],
        f"<think>\n{LINES[1]}\n</think>\n{LINES[0]}\n{LINES[1]}",
    ],
)
def test_replies_that_can_be_read(reply):
    assert proposals.parse(reply) == [A, B]


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("Sure, here are some:", "no JSON object"),
        ('{"question": "Where is it?", "answer": "New', "not JSON"),
        ('{"question": "Where is', "not JSON"),
        ('{"question": "Who?"}', "missing answer"),
        ("{}", "missing question and answer"),
        ('{"question": "Who?", "answer": ["Ana"]}', "not texts"),
        ('{"question": "Who?", "answer": true}', "not texts"),
        ('{"question": "Who?", "answer": " "}', "nothing in it"),
        ('{"question": "?", "answer": "Ana"}', "nothing in it"),
        ('{"question": "Who?", "answer": "\\ud83d"}', "half a surrogate pair"),
        ("<think>" + LINES[0], "thinking that never ends"),
        ("{" * 3_000, "not JSON"),
        ('{"question": ' + "[" * 3_000, "not JSON"),
    ],
)
def test_replies_that_cannot(reply, reason):
    (found,) = proposals.parse(reply)
    assert isinstance(found, Malformed) and found.reason == reason and len(found.text) < 250
    # What follows is read all the same.
    if "think" not in reason:
        assert proposals.parse(f"{reply}\n{LINES[0]}")[-1] == A


def test_numbers_stay_as_they_are_written():
    assert proposals.parse('{"question": "How old?", "answer": 3.50}') == [("How old?", "3.50")]
    assert proposals.parse('{"question": "How old?", "answer": 3,}') == [("How old?", "3")]
    assert proposals.parse("") == proposals.parse("\n```\n[\n]\n") == []


def test_what_would_take_long_is_not_repaired(monkeypatch):
    repaired = []
    monkeypatch.setattr(proposals.json_repair, "loads", lambda piece, **_: repaired.append(piece))
    for piece in ('{"question": ' + "x" * 2_000 + "}", '{"question": ' + "[" * 20 + "}", '{"question": x}'):
        assert [type(item) for item in proposals.parse(piece)] == [Malformed]
    assert repaired == ['{"question": x}']


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.one_of(st.text(max_size=60), st.lists(st.sampled_from(['{"', "question", "answer", '"', ":", "}", "{", "[", "]",
              ",", "\n", "Ana", " ", "1", "\\"]), max_size=30).map("".join))
)  # fmt: skip
def test_any_reply_is_read_to_its_end(reply):
    for item in proposals.parse(reply):
        assert isinstance(item, Proposal | Malformed)
    assert proposals.parse(f"{reply}\n{line(*B)}\n")[-1:] != []
