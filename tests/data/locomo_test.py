"""LoCoMo streams: miniature conversations of our own, and laws on the real ones where the folder is there."""

import copy
import dataclasses
import gzip
import json
import os
import pathlib

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

locomo = input_pipeline.builder("locomo")

SPEC = StreamSpec(
    split="test",  # of one or two conversations, the first by hash
    seed=5,
    num_streams=0,
    chunks_per_stream=2,
    chunk_words=21,
    questions_per_chunk=5,
    questions_per_stream=5,
)


def _turn(dia_id, speaker, text, **more):
    return {"speaker": speaker, "dia_id": dia_id, "text": text, **more}


# With 21 words a chunk, of which the date line takes 6, each session below makes two chunks.
TALK = {
    "sample_id": "talk-1",
    "conversation": {
        "speaker_a": "Ilse",
        "speaker_b": "Tomas",
        "session_2_date_time": "9:05 am on 4 June",
        "session_2": [
            _turn("D2:1", "Tomas", "My cousin opened a bakery next to the old post office."),
            _turn("D2:2", "Ilse", "Nice!"),
            _turn("D2:3", "Ilse", "I baked rye bread for the fair."),
        ],
        "session_1_date_time": "8:00 pm on 3 May",
        "session_1": [
            _turn("D1:1", "Ilse", "I bought a green canoe yesterday.", blip_caption="a canoe on a lake"),
            _turn("D1:2", "Tomas", "Wonderful, where will you keep it all winter?"),
            _turn("D1:3", "Ilse", "In my uncle's barn."),
        ],
        "session_3_date_time": "a date without a session, as the published file has them",
    },
    "qa": [
        {"question": "When did Ilse buy a canoe?", "answer": "2 May", "evidence": ["D1:1"], "category": 2},
        {"question": "Where is it in winter?", "answer": "a barn", "evidence": ["D1:2", "D1:3 "], "category": 4},
        {"question": "What has Ilse shown?", "answer": "canoe, barn", "evidence": ["D1:1; D1:03"], "category": 1},
        {"question": "What did she do in two months?", "answer": 2, "evidence": ["D1:1", "D:2:3"], "category": 1},
        {"question": "Does she like food?", "answer": "Yes; she bakes", "evidence": ["D2:2", "D"], "category": 3},
        {"question": "Who sank it?", "adversarial_answer": "Tomas", "evidence": ["D1:1"], "category": 5},
        {"question": "Is it red?", "answer": "No", "adversarial_answer": "Yes", "evidence": ["D1:1"], "category": 5},
        {"question": "No evidence?", "answer": "none", "evidence": [], "category": 4},
        {"question": "No turn?", "answer": "none", "evidence": ["D1:1", "D9:1"], "category": 4},
        {"question": "No answer?", "evidence": ["D1:1"], "category": 4},
    ],
}

CHUNKS = [
    "Date: 8:00 pm on 3 May\nIlse: I bought a green canoe yesterday. [shares a photo: a canoe on a lake]",
    "Date: 8:00 pm on 3 May\nTomas: Wonderful, where will you keep it all winter?\nIlse: In my uncle's barn.",
    "Date: 9:05 am on 4 June\nTomas: My cousin opened a bakery next to the old post office.\nIlse: Nice!",
    "Date: 9:05 am on 4 June\nIlse: I baked rye bread for the fair.",
]


def _write(folder, *records, name="any.json"):
    (folder / name).write_text(json.dumps(records, indent=1))


def _load(folder, **changes):
    return locomo.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


def _by_id(source):
    return {stream.stream_id: stream for stream in source}


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, TALK)
    return tmp_path


def test_turns_fill_chunks_within_their_session(folder):
    streams = _by_id(_load(folder))
    assert sorted(streams) == ["talk-1/0000", "talk-1/0002"]
    assert [c.text for c in streams["talk-1/0000"].chunks + streams["talk-1/0002"].chunks] == CHUNKS
    assert {(s.source, s.competency) for s in streams.values()} == {("locomo", "AR")}
    # With room for everything, a session still ends its chunk.
    (stream,) = _load(folder, chunk_words=1000)
    assert [c.text.count("\n") for c in stream.chunks] == [3, 3]


def test_questions_go_where_their_evidence_is(folder):
    source = _load(folder)
    streams = _by_id(source)
    may, june = streams["talk-1/0000"], streams["talk-1/0002"]
    assert [[q.text for q in c.questions] for c in may.chunks] == [
        ["When did Ilse buy a canoe?"],
        ["Where is it in winter?"],
    ]
    assert [[q.text for q in c.questions] for c in june.chunks] == [["Does she like food?"], []]
    assert {q.text: (q.gold_steps, q.kind, q.answers) for q in may.questions} == {
        "When did Ilse buy a canoe?": ((0,), "temporal", ("2 May",)),
        "Where is it in winter?": ((1,), "single_hop", ("a barn",)),
        "What has Ilse shown?": ((0, 1), "multi_hop", ("canoe, barn",)),
    }
    assert [(q.gold_steps, q.kind, q.answers) for q in june.questions] == [((0,), "open_domain", ("Yes",))]
    assert {q.metric for s in (may, june) for q in s.questions} == {"token_f1"}
    assert source.left_out == {
        "adversarial": 2,
        "no answer": 1,
        "no evidence": 1,
        "evidence names no turn": 1,
        "evidence in two streams": 1,
    }


def test_a_longer_window_takes_what_a_shorter_one_cannot(folder):
    (stream,) = _load(folder, chunks_per_stream=4)
    (question,) = [q for q in stream.questions if q.text == "What did she do in two months?"]
    assert question.gold_steps == (0, 3)
    assert question.answers == ("2",)


def test_global_questions_prefer_those_over_several_chunks(folder):
    for seed in range(5):
        (stream,) = _load(folder, seed=seed, chunks_per_stream=4, questions_per_stream=2)
        assert [q.gold_steps for q in stream.questions] == [(0, 1), (0, 3)]
        (stream,) = _load(folder, seed=seed, chunks_per_stream=4, questions_per_stream=3)
        assert sorted(len(q.gold_steps) for q in stream.questions) == [1, 2, 2]


def test_long_turns_are_cut_and_stay_evidence(folder):
    (stream,) = _load(folder, chunk_words=14, chunks_per_stream=100)
    assert all(len(chunk.text.split()) <= 14 for chunk in stream.chunks)
    # 14 words less 6 of the date and 1 of the name leave 7; the sentence ends after 6, the caption has 8.
    assert [chunk.text.split("\n")[1:] for chunk in stream.chunks[:4]] == [
        ["Ilse: I bought a green canoe yesterday."],
        ["Ilse: [shares a photo: a canoe on a"],
        ["Ilse: lake]"],
        ["Tomas: Wonderful, where will you keep it all"],
    ]
    (question,) = [q for q in stream.questions if q.text == "When did Ilse buy a canoe?"]
    assert question.gold_steps == (0, 1, 2)


def test_no_word_is_lost(folder):
    said = " ".join(t["text"] for n in (1, 2) for t in TALK["conversation"][f"session_{n}"]).split()
    for chunk_words in (8, 9, 12, 50):
        (stream,) = _load(folder, chunk_words=chunk_words, chunks_per_stream=100)
        kept = [word for chunk in stream.chunks for word in chunk.text.split()]
        assert all(len(chunk.text.split()) <= chunk_words for chunk in stream.chunks)
        rest = iter(kept)
        assert all(word in rest for word in said)  # in order


def test_chunk_words_too_small_names_the_least(folder):
    with pytest.raises(ValueError, match=r"data.chunk_words must be at least 8 .*'Ilse:'.* turn 1 .*got 5; raise it"):
        _load(folder, chunk_words=5)
    assert _load(folder, chunk_words=8)


def test_lines_and_lists_and_gzip_are_alike(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("lines")
    (other / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(TALK).encode()))
    assert list(_load(other)) == list(_load(folder))


def test_splits_share_no_conversation(tmp_path):
    _write(tmp_path, *[{**TALK, "sample_id": f"talk-{i}"} for i in range(5)])
    ids = [{s.stream_id.split("/")[0] for s in _load(tmp_path, split=split)} for split in ("train", "test")]
    assert [len(names) for names in ids] == [4, 1]
    assert not ids[0] & ids[1]


def test_empty_split_names_the_remedy(folder):
    with pytest.raises(ValueError, match="Split 'train' of source 'locomo' is empty.*Add texts.*use split 'test'"):
        _load(folder, split="train")


def test_the_same_conversation_twice_is_one(folder):
    before = list(_load(folder))
    _write(folder, TALK, TALK, name="copy.json")
    assert list(_load(folder)) == before


def test_two_conversations_of_one_id(folder):
    other = copy.deepcopy(TALK)
    other["conversation"]["session_1"][0]["text"] = "Something else."
    _write(folder, other, name="copy.json")
    with pytest.raises(ValueError, match="copy.json:1, record 1|any.json:1, record 1") as caught:
        _load(folder)
    assert "'talk-1' is another conversation at" in str(caught.value)
    assert "Give one of them another sample_id, or move the outdated file" in str(caught.value)


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda c: c.pop("sample_id"), "sample_id: expected a text, the field is missing"),
        (lambda c: c.update(conversation=[]), "conversation: expected an object, got list"),
        (
            lambda c: c.update(conversation={}),
            "session_1: expected a list of turns, the field is missing",
        ),
        (lambda c: c.update(qa="x"), "qa: expected a list, got str 'x'"),
        (lambda c: c["conversation"].pop("session_2_date_time"), "conversation.session_2_date_time: expected a text"),
        (lambda c: c["conversation"].update(session_1=3), "conversation.session_1: expected a list, got int 3"),
        (lambda c: c["conversation"]["session_1"][2].pop("speaker"), r"session_1\[2\].speaker: expected a text"),
        (lambda c: c["conversation"]["session_1"][2].pop("text"), r"session_1\[2\].text: expected a text"),
        (lambda c: c["conversation"]["session_1"][2].update(dia_id="3"), r"dia_id: expected an id such as 'D1:3'"),
        (lambda c: c["conversation"]["session_1"][2].update(blip_caption=3), r"blip_caption: expected a text"),
        (lambda c: c["qa"][1].pop("question"), r"qa\[1\].question: expected a text"),
        (lambda c: c["qa"][1].update(category=6), r"qa\[1\].category: expected a whole number from 1 to 5, got int 6"),
        (lambda c: c["qa"][1].update(category=[1]), r"qa\[1\].category: expected a whole number from 1 to 5"),
        (lambda c: c["qa"][1].update(answer=["a"]), r"qa\[1\].answer: expected a text or a number, got list"),
        (lambda c: c["qa"][1].update(evidence="D1:1"), r"qa\[1\].evidence: expected a list of texts such as 'D1:3'"),
        (lambda c: c["qa"][1].update(evidence=[1]), r"qa\[1\].evidence: expected a list of texts"),
    ],
)
def test_wrong_fields_name_file_line_and_field(tmp_path, change, field):
    broken = copy.deepcopy(TALK)
    change(broken)
    (tmp_path / "any.jsonl").write_text(json.dumps(TALK | {"sample_id": "fine"}) + "\n" + json.dumps(broken))
    with pytest.raises(ValueError, match=rf"any.jsonl:2, field .*{field}.*Correct it, or move the file"):
        _load(tmp_path)


def test_missing_folder_names_the_format():
    with pytest.raises(ValueError, match="data.source_dir must be the folder that holds files of LoCoMo"):
        _load("")


# ---- the real files ----------------------------------------------------------------------------------------------


def _load_real(**changes):
    """Returns the streams of the real files and their folder; skips the test where there are none to read."""
    default = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = os.environ.get("FINEMEM_SOURCE_DIR", str(default))
    try:
        return _load(folder, **changes), folder
    except ValueError as error:
        # A broken file must still fail the test.
        if any(words in str(error) for words in ("does not exist", "holds no files", "is empty:")):
            pytest.skip(f"{error} (The folder comes from FINEMEM_SOURCE_DIR.)")
        raise


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("chunk_words", [40, 120])
def test_real_conversations(split, chunk_words):
    source, folder = _load_real(split=split, chunk_words=chunk_words, chunks_per_stream=4)
    turns, evidence = {}, {}  # read here without the builder, by the ids that are well-formed
    for record in locomo._files.read(folder, [("conversation", "qa")], "LoCoMo"):
        name = record.fields["sample_id"]
        for key, session in record.fields["conversation"].items():
            if key.startswith("session_") and not key.endswith("time"):
                turns |= {(name, turn["dia_id"]): turn["text"] for turn in session}
        evidence |= {
            (name, qa["question"].strip()): qa["evidence"] for qa in record.fields["qa"] if qa["category"] != 5
        }
    for stream in source:
        name = stream.stream_id.rsplit("/", 1)[0]
        assert all(chunk.text.startswith("Date: ") for chunk in stream.chunks)
        assert all(len(chunk.text.split()) <= chunk_words for chunk in stream.chunks)
        for question in [*stream.questions, *(q for c in stream.chunks for q in c.questions)]:
            text = " ".join(" ".join(stream.chunks[step].text.split()) for step in question.gold_steps)
            for turn_id in evidence[name, question.text]:
                # The first words suffice: a long turn may be cut.
                assert " ".join(turns.get((name, turn_id), "").split()[:3]) in text
