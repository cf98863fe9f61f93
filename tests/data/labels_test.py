"""Streams of labelled sentences (nlu, trec, pubmed_rct): miniature files of our own text, then the real ones."""

import collections
import dataclasses
import functools
import gzip
import itertools
import math
import re
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest

from finemem_jax import input_pipeline
from finemem_jax.reading import scoring
from finemem_jax.types import StreamSpec

nlu, trec, pubmed_rct = map(input_pipeline.builder, ("nlu", "trec", "pubmed_rct"))
trec_fine = types.SimpleNamespace(NAME="trec_fine", load=functools.partial(input_pipeline.load, "trec_fine"))
_labels = nlu._labels

SPEC = StreamSpec("train", 3, 6, chunks_per_stream=3, chunk_words=60, questions_per_chunk=2, questions_per_stream=5)
NUMBER = {"desc": "0", "hum": "1", "loc": "2", "num": "3"}  # in the order of their names
WORDS = ("lamp", "gate", "mill", "boat", "hill", "bell", "well")


def _sentence(n):
    return f"Keeper {n} paints " + " and ".join(f"the {WORDS[(n + i) % 7]}" for i in range(1 + n % 3))


PAIRS = [(_sentence(n), [*NUMBER][n % 4]) for n in range(120)]
LABEL = dict(PAIRS)


def _nlu(pairs):
    return "text,intent\n" + "".join(f'"{text}",{label}\n' for text, label in pairs)


def _trec(pairs):
    return "".join(f"{label.upper()}:kind {text}\n" for text, label in pairs)


def _pubmed(pairs):
    """Three sentences an abstract, whose id is the number in the first."""
    lines = [f"{label.upper()}\t{text}\n" for text, label in pairs]
    heads = [f"\n###{re.search('[0-9]+', text)[0]}\n" if i % 3 == 0 else "" for i, (text, _) in enumerate(pairs)]
    return "".join(itertools.chain(*zip(heads, lines, strict=True)))


def _load(builder, folder, **changes):
    return builder.load(dataclasses.replace(SPEC, source_dir=str(folder), **changes))


class Case(NamedTuple):
    builder: types.ModuleType
    file: str
    write: Callable
    noun: str
    label: str

    def put(self, folder, pairs, file=None):
        (folder / (file or self.file)).write_text(self.write(pairs))

    def load(self, folder, **changes):
        return _load(self.builder, folder, **changes)

    def streams(self, folder, **changes):
        source = self.load(folder, **changes)
        return [source[i] for i in range(len(source))]

    def pairs(self, text):
        form = re.compile(rf"{self.noun}: (.+)\n{self.label}: (\d+)")
        found = [form.fullmatch(block) for block in text.split("\n\n")]
        assert all(found), text
        return [(one[1], one[2]) for one in found if one]

    def shown(self, stream):
        return [pair for chunk in stream.chunks for pair in self.pairs(chunk.text)]

    def sentence(self, question):
        return question.text.removeprefix(f"{self.noun}: ")

    def all_sentences(self, folder, **changes):
        streams = self.streams(folder, num_streams=40, **changes)
        return {text for s in streams for text in [*dict(self.shown(s)), *map(self.sentence, s.questions)]}


CASES = NLU, TREC, PUBMED = (
    Case(nlu, "a.csv", _nlu, "Sentence", "Label"),
    Case(trec, "a.label", _trec, "Sentence", "Label"),
    Case(pubmed_rct, "a.txt", _pubmed, "Sample", "Labels"),
)


@pytest.fixture(params=CASES, ids=lambda case: case.builder.NAME)
def case(request):
    return request.param


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_chunks_hold_numbered_sentences(case, tmp_path, split):
    case.put(tmp_path, PAIRS)
    streams = case.streams(tmp_path, split=split)
    assert len({s.stream_id for s in streams}) == len({s.chunks for s in streams}) == 6
    for stream in streams:
        assert (stream.source, stream.competency, len(stream.chunks)) == (case.builder.NAME, "TTL", 3)
        assert all(len(chunk.text.split()) <= 60 for chunk in stream.chunks)
        shown = case.shown(stream)
        assert len(set(shown)) == len(shown) and all(NUMBER[LABEL[text]] == number for text, number in shown)


def test_questions_are_held_out_or_of_their_chunk(case, tmp_path):
    case.put(tmp_path, PAIRS)
    for stream in case.streams(tmp_path):
        shown = dict(case.shown(stream))
        assert len(stream.questions) == 5 == len(set(stream.questions))
        for question in stream.questions:
            assert case.sentence(question) not in shown
            assert (question.kind.casefold(), question.gold_steps) == (LABEL[case.sentence(question)], ())
        for step, chunk in enumerate(stream.chunks):
            here = dict(case.pairs(chunk.text))
            assert len(chunk.questions) == 2 == len(set(chunk.questions))
            for question in chunk.questions:
                assert question.answers == (here[case.sentence(question)],)
                kind = f"shown:{LABEL[case.sentence(question)]}"
                assert (question.kind.casefold(), question.gold_steps) == (kind, (step,))
        for question in (*stream.questions, *(q for c in stream.chunks for q in c.questions)):
            assert question.answers == (NUMBER[LABEL[case.sentence(question)]],)
            assert (question.metric, question.choices) == ("boxed", ("0", "1", "2", "3"))
            assert question.prompt == (
                f"Which label has this {case.noun.lower()}? Answer with \\boxed{{n}}, where n is the number of the "
                f"label.\n{case.noun}: {case.sentence(question)}"
            )
            assert scoring.score(f"\\boxed{{{question.answers[0]}}}", question) == 1


def test_only_labels_that_were_shown_are_asked(case, tmp_path):
    case.put(tmp_path, PAIRS)
    streams = case.streams(tmp_path, chunks_per_stream=1, chunk_words=18, num_streams=30)
    numbers = [({n for _, n in case.shown(s)}, {q.answers[0] for q in s.questions}) for s in streams]
    assert all(asked <= shown for shown, asked in numbers)
    assert min(len(shown) for shown, _ in numbers) < 4  # else this test says nothing


def test_splits_share_nothing_and_lose_nothing(case, tmp_path):
    case.put(tmp_path, PAIRS)
    train, test, both = (case.all_sentences(tmp_path, split=split) for split in ("train", "test", "all"))
    assert not train & test
    assert train | test == both == LABEL.keys()
    assert len(test) == (36 if case is PUBMED else 22)  # Another number would mix the splits of runs under way.
    # What else is in the folder moves nothing across.
    case.put(tmp_path, [(f"No {1000 + n} {text}", label) for n, (text, label) in enumerate(PAIRS)], f"z{case.file}")
    assert not case.all_sentences(tmp_path, split="test") & train


def test_same_seed_same_streams(case, tmp_path):
    case.put(tmp_path, PAIRS)
    first, again, other = (case.streams(tmp_path, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert all(a.chunks[0].text != b.chunks[0].text for a, b in zip(first, other, strict=True))
    assert case.streams(tmp_path, num_streams=4) == first[:4]
    with pytest.raises(IndexError):
        case.load(tmp_path, num_streams=4)[4]


def test_number_of_streams_and_of_what_they_show(case, tmp_path):
    case.put(tmp_path, PAIRS)
    assert len(case.load(tmp_path, num_streams=500)) == 500
    words = sum(len(text.split()) + 3 for text in case.all_sentences(tmp_path))
    assert len(case.load(tmp_path, num_streams=0)) == math.ceil(words / (3 * 60))
    # Chunks that could hold all leave a fifth to ask about.
    for stream in case.streams(tmp_path, chunk_words=5000, questions_per_stream=500, split="all"):
        assert (len(case.shown(stream)), len(stream.questions)) == (96, 24)


def test_neither_names_nor_copies_nor_packing_of_files_matter(case, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("data") for _ in range(3)]
    case.put(folders[0], PAIRS)
    for name, pairs in {"0": PAIRS[60:], "1": PAIRS[:60], "2": PAIRS[30:90]}.items():
        case.put(folders[1], pairs, name + case.file.upper())
    (folders[2] / f"{case.file}.gz").write_bytes(gzip.compress(case.write(PAIRS).encode()))
    assert len({tuple(case.streams(folder)) for folder in folders}) == 1


def test_left_out(case, tmp_path):
    seventh, contrary = PAIRS[7][0], PAIRS[7][0].upper().replace(" ", "  ")
    long = [(f"{n} " + "very " * 56 + "long", "loc") for n in range(3)]
    case.put(tmp_path, [*PAIRS, (contrary, "hum"), *long])  # It is "num".
    assert case.load(tmp_path, split="all").left_out == {"two labels": 2, "longer than a chunk": 3}
    assert case.load(tmp_path, split="all", chunk_words=61).left_out == {"two labels": 2}
    assert case.all_sentences(tmp_path, split="all") == LABEL.keys() - {seventh}


def test_memalpha_frames_the_examples(case, tmp_path):
    case.put(tmp_path, PAIRS)
    words = []
    for stream in case.streams(tmp_path, style="memalpha", num_streams=30):
        for step, chunk in enumerate(stream.chunks):
            head, opener, *body, reply = chunk.text.split("\n")
            assert head == f"[Dialogue between User and Assistant on 2024-01-0{step + 1} 00:00]"
            assert opener.startswith("<User> ") and reply.startswith("<Assistant> ")
            assert case.pairs("\n".join(body))
            words.append(len(" ".join(body).split()))
    assert max(words) <= 60
    assert (min(words) < 30) == (case is PUBMED)  # only there, lengths are drawn


def test_splits_without_two_labels_name_the_remedy(case, tmp_path):
    for first in ("hum", "loc"):  # of "loc", there is nothing to ask then
        case.put(tmp_path, [(_sentence(n), "hum" if n else first) for n in range(12)])
        with pytest.raises(ValueError, match="Split 'all' .* needs two labels with two sentences .* has 1 in 12 sen"):
            case.load(tmp_path, split="all")
    case.put(tmp_path, PAIRS[:2])
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"Split '{split}' of source '{case.builder.NAME}' .* use another split"):
            case.load(tmp_path, split=split)
    case.put(tmp_path, PAIRS)
    with pytest.raises(ValueError, match=r"in 0 sentences; left out: {'longer than a chunk': \d+}.* data.chunk_words"):
        case.load(tmp_path, chunk_words=6)


def test_missing_and_damaged_files(case, tmp_path):
    with pytest.raises(ValueError, match="data.source_dir must exist and hold (files|tables) of .*'/no/such'"):
        case.load("/no/such")
    for name, text in {"x.csv": "a,b\n1,2\n", "y.txt": "Note: once\n", "z.jsonl": '{"title": ""}\n'}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"holds no (files|tables) of .*; \d files with these endings are of other"):
        case.load(tmp_path)
    (tmp_path / f"{case.file}.gz").write_bytes(gzip.compress(case.write(PAIRS).encode())[:-20])
    with pytest.raises(ValueError, match=r"\.gz:\d+: the gzip file is truncated or damaged"):
        case.load(tmp_path)
    with pytest.raises(ValueError, match="data.chunk_words must be at least 1"):
        case.load(tmp_path, chunk_words=0)


def test_all_formats_share_a_folder(tmp_path):
    for case in CASES:
        case.put(tmp_path, PAIRS)
    for case in CASES:
        assert case.all_sentences(tmp_path, split="all") == LABEL.keys()


@pytest.mark.parametrize(
    "builder, name, text, message",
    [
        (nlu, "a.csv", "text,intent\ngo,play\ngo\n", r"a.csv:3, .* expected 2 columns \(text, intent\), not 1, got"),
        (nlu, "a.csv", "text,intent\ngo on, \n", "a.csv:2, field intent: expected a text that is not blank"),
        (nlu, "a.csv", "text,intent\n ,play\n", "a.csv:2, field text: expected a text that is not blank"),
        (nlu, "a.csv", "text,intent\n\ngo,play\ncafé,eat\n", "a.csv:4, byte 24: not UTF-8. Convert"),
        (trec, "a.txt", "NUM:x How many ?\nNUM How many ?\n", "a.txt:2, field line: expected COARSE:fine question"),
        (trec, "a.txt", "NUM:x How many ?\nNUM:x \n", "a.txt:2, field line: expected COARSE:fine question"),
        (pubmed_rct, "a.txt", "###1\nRESULTS It works.\n", "a.txt:2, field line: expected LABEL<tab>sentence"),
        (pubmed_rct, "a.txt", "###1\n\tIt works.\n", "a.txt:2, field line: expected LABEL<tab>sentence"),
        (pubmed_rct, "a.txt", "###1\nRESULTS\t\n", "a.txt:2, field line: expected LABEL<tab>sentence"),
        (pubmed_rct, "a.txt", "###1\nRESULTS\tcafé\n", "a.txt:2, byte 16: not UTF-8"),
        (pubmed_rct, "a.json", '{"sentences": ["a"], "labels": ["x", "y"]}', "labels: expected 1 labels, .*, not 2"),
        (pubmed_rct, "a.json", '{"sentences": [5], "labels": ["x"]}', r"sentences\[0\]: expected a text, got int 5"),
        (pubmed_rct, "a.json", '{"sentences": ["a"], "labels": [" "]}', r"labels\[0\]: expected a text that is not"),
        (pubmed_rct, "a.json", '{"abstract_id": "1", "text": "a", "label": ""}', "label: expected a text that is not"),
        (pubmed_rct, "a.json", '{"abstract_id": null, "text": "a", "label": "x"}', "abstract_id: expected a text, got"),
    ],
)
def test_broken_rows_name_file_line_and_field(tmp_path, builder, name, text, message):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        _load(builder, tmp_path)


@pytest.mark.parametrize("split, chunk_words", [("all", 60), ("all", 900), ("test", 200)])  # the last two hold all
def test_the_first_chunk_shows_every_label_and_the_rest_is_even(tmp_path, split, chunk_words):
    NLU.put(tmp_path, PAIRS)
    for stream in NLU.streams(tmp_path, split=split, chunk_words=chunk_words):
        assert {number for _, number in NLU.pairs(stream.chunks[0].text)} == set("0123")
        words = [len(chunk.text.split()) for chunk in stream.chunks]
        assert max(words) - min(words) <= 14  # the longest pair


def test_labels_that_do_not_fit_into_the_first_chunk_come_in_the_next(tmp_path):
    NLU.put(tmp_path, [(f"Bell {label} rings {i}", f"l{label}") for label in range(12) for i in range(10)])
    for stream in NLU.streams(tmp_path, split="all", chunk_words=35):  # five pairs of seven words
        numbers = [{number for _, number in NLU.pairs(chunk.text)} for chunk in stream.chunks]
        assert [len(n) for n in numbers[:2]] == [5, 5] and len(set.union(*numbers)) == 12
    for stream in NLU.streams(tmp_path, split="all", chunk_words=21):
        assert len({number for _, number in NLU.shown(stream)}) == 9


def test_random_order_is_a_fair_permutation():
    orders = collections.Counter(tuple(_labels._in_random_order("abc", _labels.random.Random(n))) for n in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60


def test_abstracts_are_not_divided(tmp_path):
    PUBMED.put(tmp_path, PAIRS)
    place = {text: n for n, (text, _) in enumerate(PAIRS)}
    seen = collections.defaultdict(set)
    for split in ("train", "test"):
        for stream in PUBMED.streams(tmp_path, split=split):
            shown = [place[text] for text, _ in PUBMED.shown(stream)]
            # In order, and each whole but for the last.
            assert all(b == a + 1 if a % 3 < 2 else b % 3 == 0 for a, b in itertools.pairwise(shown))
            asked = {place[PUBMED.sentence(q)] // 3 for q in stream.questions}
            assert not asked & {n // 3 for n in shown}
            seen[split] |= asked | {n // 3 for n in shown}
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


def test_a_sentence_of_several_abstracts_is_in_one_split(tmp_path):
    PUBMED.put(tmp_path, [pair for n in range(0, 120, 2) for pair in (*PAIRS[n : n + 2], ("The end", "num"))])
    assert sum("The end" in PUBMED.all_sentences(tmp_path, split=split) for split in ("train", "test")) == 1


def _read(builder, folder, monkeypatch):
    found = []
    monkeypatch.setattr(_labels, "source", lambda name, examples, *rest, **more: found.extend(examples))
    _load(builder, folder)
    return found


def test_nlu_layouts(tmp_path, monkeypatch):
    (tmp_path / "corpus.csv").write_text(
        "userid;scenario;intent;status;answer_annotation;answer_normalised;answer;question\n"
        '1;alarm;set;;wake me at [time : six];wake me at six;"Wake me; at 6";"How; would you ask?"\n'
        "1;alarm;set;;null;null;null;How?\n"
        "2;audio;volume_up;IRR;;;;How?\n"
    )
    (tmp_path / "fold.csv").write_text(
        "answerid;scenario;intent;answer_annotation;answer_from_anno;answer_from_user\n"
        '7;audio;volume_up;"louder [x : please]";"louder please";"Louder, please!"\n'
    )
    (tmp_path / "plain.tsv").write_text("intent\ttext\nalarm_set\tring, then stop\n")
    found = {"Wake me; at 6": "alarm_set", "louder please": "audio_volume_up", "ring, then stop": "alarm_set"}
    assert {example.text: example.label for example in _read(nlu, tmp_path, monkeypatch)} == found


@pytest.mark.parametrize("builder, labels", [(trec, ("LOC", "NUM")), (trec_fine, ("LOC:city", "NUM:date"))])
def test_trec_classes(tmp_path, monkeypatch, builder, labels):
    (tmp_path / "a.txt").write_bytes(b"LOC:city Where is the caf\xe9 ?\r\n\r\n NUM:date  When ?\r\n")
    (tmp_path / "b.txt").write_text("PS:note this is a text\nLOC:city No question\n")
    found = {"Where is the café ?": labels[0], "When ?": labels[1]}
    assert {example.text: example.label for example in _read(builder, tmp_path, monkeypatch)} == found


def test_pubmed_layouts(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("###7\nMETHODS\tWe weigh\tit.\nMETHODS\tSo.\n\n###8\nRESULTS\tLight.\n")
    for name, text in {
        "b.jsonl": '{"abstract_id": 0, "sentences": ["We see.", "Ah."], "labels": ["methods", "Results"]}',
        "c.json": '[{"abstract_id": "9", "text": "It is.", "label": "results"}]',
        "d.jsonl": '{"abstract_id": "9", "text": "So.", "labels": "results"}',
        "e.jsonl": '{"text": "No abstract.", "label": "results"}',
    }.items():
        (tmp_path / name).write_text(text)
    read = [example[:3] for example in _read(pubmed_rct, tmp_path, monkeypatch)]
    assert read[:3] == [("We weigh\tit.", "methods", "7"), ("So.", "methods", "7"), ("Light.", "results", "8")]
    assert read[3:5] == [("We see.", "methods", "We see.\nAh."), ("Ah.", "results", "We see.\nAh.")]
    assert read[5:] == [("It is.", "results", "9"), ("So.", "results", "9")]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("builder", [nlu, trec, trec_fine, pubmed_rct], ids=lambda builder: builder.NAME)
def test_real_files(source_dir, builder, split):
    case = (PUBMED if builder is pubmed_rct else NLU)._replace(builder=builder)
    try:
        streams = case.streams(source_dir, split=split, chunk_words=120, num_streams=5)
    except ValueError as error:
        if "holds no" not in str(error):  # A broken file must still fail the test.
            raise
        pytest.skip(str(error))
    for stream in streams:
        shown = dict(case.shown(stream))
        assert (len(stream.chunks), len(stream.questions)) == (3, 5)
        assert all(len(chunk.text.split()) <= 120 for chunk in stream.chunks)
        assert all(q.answers[0] in shown.values() and case.sentence(q) not in shown for q in stream.questions)
