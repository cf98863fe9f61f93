"""MQuAKE streams: cases of our own, and the law that the largest number holds, also on the real ones."""

import copy
import dataclasses
import gzip
import json
import re

import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

mquake = input_pipeline.builder("mquake")
EDITS = "requested_rewrite"
SPEC = StreamSpec(
    "train", seed=3, num_streams=0, chunks_per_stream=3, chunk_words=60, questions_per_chunk=9, questions_per_stream=99
)


def _edit(cloze, subject, question, old, new):
    targets = {"target_true": {"str": old}, "target_new": {"str": new}}
    return {"prompt": cloze.replace(subject, "{}"), "subject": subject, "question": question} | targets


def _hop(cloze, question, answer, *aliases):
    return {"cloze": cloze, "answer": answer, "answer_alias": list(aliases), "question": question}


def _case(number, new, boat):
    """A case: a boat moves from Aker to port `new`, which in every other case gets a new harbour master too."""
    lies = (f"{boat} lies in", f"Where does {boat} lie?")
    old_master, new_master = ((f"The master of {port} is", f"Master of {port}?") for port in ("Aker", new))
    edits = [_edit(lies[0], boat, lies[1], "Aker", new), _edit(new_master[0], new, new_master[1], "Ole", f"Ada{new}")]
    return {
        **{"case_id": number, EDITS: edits[: 1 + number % 2]},
        "questions": [f"Who is the master where {boat} lies? ({number}, wording {i})" for i in range(3)],
        **{"answer": "Olaf", "new_answer": f"Ada{new}", "new_answer_alias": ["Ad", f"Madam Ada{new}"]},
        "single_hops": [_hop(*lies, "Aker", "Port Aker"), _hop(*old_master, "Olaf")],
        "new_single_hops": [_hop(*lies, new, "Po", f"Port of {new}"), _hop(*new_master, f"Ada{new}")],
    }


CASES = [_case(n, f"Port{n}", f"Boat{n}") for n in range(20)]


def _write(folder, cases, name="any.jsonl"):
    (folder / name).write_text("".join(json.dumps(case) + "\n" for case in cases))


def _load(folder, **changes):
    return mquake.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, CASES)
    return tmp_path


def _check(stream, records, chunk_words):
    """Checks by texts and records alone that all answers go by the largest number: after a chunk, and in the end."""
    edits = [edit | {"cloze": edit["prompt"].replace("{}", edit["subject"])} for r in records for edit in r[EDITS]]
    hops = [hop for record in records for hop in record["single_hops"] + record["new_single_hops"]]
    said = [(hop["cloze"], hop["answer"], hop["question"]) for hop in hops]
    said += [(e["cloze"], e[key]["str"], e["question"]) for e in edits for key in ("target_true", "target_new")]
    of_fact = {f"{cloze} {answer}".removesuffix("."): (cloze, answer) for cloze, answer, _ in said}
    of_question = {question: cloze for cloze, _, question in said}
    case_of = {question: record for record in records for question in record["questions"]}
    latest, step_of, count = {}, {}, 0
    for step, chunk in enumerate(stream.chunks):
        assert sum(len(line.split()) for line in chunk.text.split("\n") if line[0].isdigit()) <= chunk_words
        for number, fact in re.findall(r"^(\d+)\. (.*)\.$", chunk.text, re.MULTILINE):
            cloze, answer = of_fact[fact]
            assert int(number) == (count := count + 1) and (cloze, answer) not in step_of
            latest[cloze], step_of[cloze, answer] = answer, step
        for question in chunk.questions:
            if question.kind != "multi_hop":
                cloze = of_question[question.text]
                assert (question.answers[0], question.gold_steps) == (latest[cloze], (step,))
                assert step_of[cloze, latest[cloze]] == step
    for edit in edits:
        old, new = (step_of.get((edit["cloze"], edit[key]["str"])) for key in ("target_true", "target_new"))
        assert new is None or old < new or len(stream.chunks) == 1
    for question in stream.questions:
        if question.kind == "multi_hop":
            chain = [(hop["cloze"], hop["answer"]) for hop in case_of[question.text]["new_single_hops"]]
        else:
            chain = [(of_question[question.text], question.answers[0])]
        assert all(latest[cloze] == answer for cloze, answer in chain) and question.answers[0] == chain[-1][1]
        assert question.gold_steps == tuple(sorted({step_of[key] for key in chain}))


@pytest.mark.parametrize("style", ["plain", "memalpha"])
@pytest.mark.parametrize("num_chunks, chunk_words", [(1, 60), (2, 40), (3, 60), (9, 200)])
def test_the_largest_number_holds(folder, style, num_chunks, chunk_words):
    changes = {"style": style, "chunks_per_stream": num_chunks, "chunk_words": chunk_words}
    sources = [_load(folder, split=split, **changes) for split in ("train", "test")]
    streams = [*sources[0], *sources[1]]
    for stream in streams:
        assert len(stream.chunks) <= num_chunks and (stream.source, stream.competency) == ("mquake", "CR")
        assert style == "plain" or all(chunk.text.startswith("[Dialogue ") for chunk in stream.chunks)
        _check(stream, CASES, chunk_words)
    dropped = sum(sum(source.left_out.values()) for source in sources)
    asked = [q.text for stream in streams for q in stream.questions if q.kind == "multi_hop"]
    assert len(set(asked)) == len(asked) == 20 - dropped and dropped <= 20 * (style == "memalpha")  # in short chunks


def test_by_hand(tmp_path):
    _write(tmp_path, [_case(2, "Lund", "Ark"), _case(4, "Moss", "Bee")])
    (stream,) = _load(tmp_path, chunks_per_stream=2, chunk_words=200)
    first, second = stream.chunks
    single, multi = stream.questions
    (before,) = [q for q in first.questions if q.text == single.text]
    boat, port = ("Ark", "Lund") if "Ark" in single.text else ("Bee", "Moss")
    assert f"{boat} lies in Aker." in first.text and f"{boat} lies in {port}." in second.text
    assert single.text == f"Where does {boat} lie?" and all("larger number" in q.instruction for q in (single, multi))
    assert before.answers == ("Aker", "Port Aker") and before.kind == "original"
    assert single.answers == (port, f"Port of {port}") and single in second.questions  # "Po" is too short to tell
    assert multi.answers == (f"Ada{port}", f"Madam Ada{port}") and multi.metric == "substring"


def test_contradicting_cases_are_in_different_streams(tmp_path):
    # One boat goes to two ports, so that the cases share an edit and are in one split.
    _write(tmp_path, [_case(n, f"Port{n % 2}", "Ark") for n in range(4)])
    streams = _load(tmp_path, split="test", chunk_words=200)
    assert [sum(q.kind == "multi_hop" for q in s.questions) for s in streams] == [2, 2]
    with pytest.raises(ValueError, match="Split 'train' of source 'mquake' is empty"):
        _load(tmp_path)


def test_seed_copies_file_names_and_numbers_of_questions(folder):
    stream = _load(folder, chunks_per_stream=9, chunk_words=200, questions_per_stream=7, questions_per_chunk=0)[0]
    assert sorted([q.kind for q in stream.questions]) == ["multi_hop"] * 4 + ["single_hop"] * 3
    first = list(_load(folder))
    assert first != list(_load(folder, seed=4))
    (folder / "b.json").write_text(json.dumps({"data": CASES[::-1]}, indent=1))
    (folder / "a.jsonl").write_text('{"case_id": 1, "of": "another format"}\n')
    assert list(_load(folder)) == first and list(_load(folder, num_streams=2)) == first[:2]


def test_what_is_left_out(tmp_path):
    cases = copy.deepcopy(CASES)
    cases[0]["answer"] = "the late Madam AdaPort0"  # which passes for the new answer
    cases[1]["new_single_hops"][0]["answer"] = "Elsewhere"
    cases[2][EDITS][0]["target_true"]["str"] = "word " * 70
    _write(tmp_path, cases)
    reasons = ("an overridden answer counts", "facts contradict each other", "facts too long for a stream")
    assert _load(tmp_path).left_out | _load(tmp_path, split="test").left_out == dict.fromkeys(reasons, 1)
    with pytest.raises(ValueError, match=r"no case fits a stream \({.*'facts too long for a stream'.*raise data.chunk"):
        _load(tmp_path, chunk_words=5)


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda c: c.update(case_id=None), "case_id: expected a number or a text, got NoneType"),
        (lambda c: c.update(questions=[]), "questions: expected a list that is not empty"),
        (lambda c: c.update(questions=[1]), "questions: expected a list of texts"),
        (lambda c: c.update(requested_rewrite=[]), "requested_rewrite: expected a list that is not empty"),
        (lambda c: c.pop("new_answer_alias"), "new_answer_alias: expected a list, the field is missing"),
        (lambda c: c[EDITS][0].update(prompt="is in"), r"requested_rewrite\[0\].prompt: expected a text with '{}'"),
        (lambda c: c[EDITS][0].update(target_new="x"), r"requested_rewrite\[0\].target_new: expected an object"),
        (lambda c: c[EDITS][0]["target_true"].clear(), r"requested_rewrite\[0\].target_true.str: expected a text"),
        (lambda c: c["single_hops"][1].pop("cloze"), r"single_hops\[1\].cloze: expected a text"),
        (lambda c: c["single_hops"][1].update(answer_alias="x"), r"single_hops\[1\].answer_alias: expected a list"),
    ],
)
def test_wrong_fields_name_file_line_and_field(tmp_path, change, field):
    broken = copy.deepcopy(CASES[1])
    change(broken)
    _write(tmp_path, [CASES[0], broken])
    with pytest.raises(ValueError, match=rf"any.jsonl:2, field {field}.*Correct it, or move the file"):
        _load(tmp_path)


def test_broken_folders_and_files(tmp_path):
    def raises(message, folder=tmp_path):
        with pytest.raises(ValueError, match=message):
            _load(folder)

    raises("data.source_dir must be the folder that holds files of MQuAKE-CF", "")
    raises("does not exist", tmp_path / "none")
    raises("holds no files of MQuAKE-CF")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(CASES).encode())[:-9])
    raises("b.json.gz:1: the gzip file is truncated or damaged")
    (tmp_path / "a.jsonl").write_bytes('{"case_id": "ø"}'.encode("latin-1"))
    raises("a.jsonl:1, byte 13: not UTF-8")


def test_real_cases(source_dir):
    try:
        records = [record.fields for record in mquake._files.read(source_dir, [mquake._KEYS], "MQuAKE-CF")]
    except ValueError as error:
        if "holds no files" not in str(error):
            raise
        pytest.skip(f"no MQuAKE-CF at {source_dir}")
    for num_chunks, words in ((4, 120), (10, 512)):
        for stream in _load(source_dir, split="test", num_streams=12, chunks_per_stream=num_chunks, chunk_words=words):
            _check(stream, records, words)
