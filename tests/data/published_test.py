"""Tests of the published data sets, on miniature parquet files of their schemas."""

import dataclasses
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemem_jax import input_pipeline
from finemem_jax.types import StreamSpec

SPEC = StreamSpec("test", 0, 0, 10, 40, 5, 100)
MEMALPHA = ("instance_id", "prompt", "chunks", "questions_and_answers", "data_source", "metadata")


@pytest.fixture(autouse=True)
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def load(name, folder, split="test", **changes) -> Any:
    spec = dataclasses.replace(SPEC, split=split, source_dir=str(folder), **changes)
    return input_pipeline.load(name, spec)


def row(number, source="squad", answer="Oslo", **changes):
    fields = {
        "instance_id": number,
        "prompt": "Remember it.",
        "chunks": json.dumps([f"Text {number}, part {t}: Ada läuft." for t in range(12)]),
        "questions_and_answers": json.dumps([{"question": f"Where {i}?", "answer": answer} for i in range(3)]),
        "data_source": source,
        "metadata": json.dumps({"sub_source": "x"}),
        "num_chunks": 12,
        "num_questions": 3,
    }
    return fields | changes


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_memalpha(folder):
    write(folder / "train-00000-of-00002.parquet", [row(0), row(1, "perltqa", "a; B")])
    write(folder / "train-00001-of-00002.parquet", [row(2, "pubmed-rct", 3)])
    write(
        folder / "test-00000-of-00001.parquet", [row(0, "icl_nlu_8296shot_balance", ["7"]), row(1, "booksum", "a, b")]
    )
    train, test = load("memalpha", folder, "train"), load("memalpha", folder)
    assert [stream.stream_id for stream in train] == ["squad/000000", "perltqa/000001", "pubmed-rct/000002"]
    # Whole, whatever chunks_per_stream says.
    assert [chunk.text for chunk in train[1].chunks] == [f"Text 1, part {t}: Ada läuft." for t in range(12)]
    first = train[0].questions[0]
    assert (first.text, first.answers, first.metric, first.instruction) == ("Where 0?", ("Oslo",), "contains", "")
    assert [stream.competency for stream in train] == ["AR", "AR", "TTL"]
    assert train[2].questions[0].answers == ("3",) and "\\boxed" in train[2].questions[0].instruction
    assert "\\boxed" not in train[2].questions[0].text
    nlu, book = test
    assert nlu.questions[0].metric == "boxed" and nlu.questions[0].answers == ("7",)
    assert book.questions[0].metric == "keyword_recall" and book.competency == "LRU"
    assert len(load("memalpha", folder, "all")) == 5 and len(load("memalpha", folder, "train", num_streams=2)) == 2
    assert len(load("memalpha", folder, "train", questions_per_stream=1)[0].questions) == 1


def test_rules_as_published(folder):
    write(folder / "train.parquet", [row(0, "perltqa", "a; B")])
    assert load("memalpha", folder, "train")[0].questions[0].metric == "parts"
    assert load("memalpha", folder, "train", rules="published")[0].questions[0].metric == "parts_cased"


def test_a_folder_under_its_name_on_the_hub(folder):
    for name, number in (("Memalpha-Memoryagentbench", 3), ("Memalpha", 1)):
        (folder / name).mkdir()
        write(folder / name / "test.parquet", [row(i, "ruler_qa1_197K") for i in range(number)])
    assert len(load("memalpha_mab", folder)) == 3 and len(load("memalpha", folder)) == 1


def test_made_once_and_anew_when_files_change(folder, tmp_path):
    write(folder / "train.parquet", [row(0)])
    assert len(load("memalpha_full", folder, "train")) == 1
    made = sorted((tmp_path / "tfds").rglob("*.array_record*"))
    before = [path.stat().st_mtime_ns for path in made]
    load("memalpha_full", folder, "train")
    assert [path.stat().st_mtime_ns for path in made] == before
    info = json.loads(next((tmp_path / "tfds").rglob("metadata.json")).read_text())
    assert list(info["sha256"]) == ["train.parquet"] and len(info["sha256"]["train.parquet"]) == 64
    write(folder / "train.parquet", [row(0), row(1)])
    assert len(load("memalpha_full", folder, "train")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": '["a", "b"'}, r"train.parquet, row 1, column chunks: broken JSON"),
        ({"chunks": "[]"}, r"row 1, field chunks: expected a JSON list of texts"),
        ({"chunks": '["a", 3]'}, r"row 1, field chunks: expected a JSON list of texts"),
        ({"chunks": None}, r"row 1, field chunks: expected a text, got NoneType"),
        ({"questions_and_answers": "{}"}, r"row 1, field questions_and_answers: expected a JSON list"),
        ({"questions_and_answers": '[{"question": "?", "answer": {"a": 1}}]'}, r"questions_and_answers\[0\].answer"),
        ({"questions_and_answers": '[{"question": "?", "answer": true}]'}, r"questions_and_answers\[0\].answer"),
        ({"questions_and_answers": '[{"question": "?", "answer": []}]'}, r"questions_and_answers\[0\].answer"),
        ({"questions_and_answers": '[{"answer": "x"}]'}, r"questions_and_answers\[0\].question: expected a text"),
        ({"instance_id": 0}, r"row 1: instance_id 0 of squad stands in .*row 0 as well"),
        ({"data_source": " "}, r"row 1, field data_source: expected a text that is not blank"),
    ],
)
def test_broken_cells_are_named_by_row(folder, changes, message):
    write(folder / "train.parquet", [row(0), row(1, **changes)])
    with pytest.raises(ValueError, match=message):
        load("memalpha", folder, "train")
    # Nothing half made is left that a second try would take for whole.
    with pytest.raises(ValueError, match=message):
        load("memalpha", folder, "train")


def test_an_unknown_source_is_named(folder):
    write(folder / "train.parquet", [row(0, "mystery")])
    with pytest.raises(ValueError, match="No rule is known for the data source 'mystery'"):
        load("memalpha", folder, "train")[0]


def test_equal_rows_count_once(folder):
    write(folder / "train-0.parquet", [row(0), row(1)])
    write(folder / "train-1.parquet", [row(1), row(2)])
    assert [stream.stream_id[-1] for stream in load("memalpha", folder, "train")] == ["0", "1", "2"]


def test_missing_splits_columns_and_files(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no parquet files of YuWangX/Memalpha .*it has no parquet files"):
        load("memalpha", folder)
    write(folder / "train.parquet", [row(0)])
    with pytest.raises(ValueError, match=r"has no split 'test' of YuWangX/Memalpha, only train"):
        load("memalpha", folder)
    with pytest.raises(ValueError, match="Memalpha-full has no split 'test'"):
        load("memalpha_full", folder)
    lacking = row(0)
    del lacking["chunks"]
    other = tmp_path / "other"
    other.mkdir()
    write(other / "test.parquet", [lacking])
    with pytest.raises(ValueError, match=r"test.parquet \(lacks chunks\)"):
        load("memalpha", other)
    with pytest.raises(ValueError, match="does not exist"):
        load("memalpha", tmp_path / "nowhere")


def test_truncated_files(folder):
    write(folder / "train.parquet", [row(i) for i in range(50)])
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train.parquet: no whole parquet file"):
        load("memalpha", folder, "train")
    damaged = bytearray(whole)
    damaged[40 : len(whole) // 3] = bytes(len(whole) // 3 - 40)
    (folder / "train.parquet").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"train.parquet, (from )?row \d"):
        load("memalpha", folder, "train")


def test_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def fails(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ValueError, match=r"could not be fetched .*no route to host.*set data.source_dir"):
        input_pipeline.load("memalpha", SPEC)


# --------------------------------------------------------------------------------------
# MemoryAgentBench
# --------------------------------------------------------------------------------------


def context(number, facts=60):
    return "\n".join(f"{i}. Item {i} of text {number} costs {i * 7} crowns." for i in range(facts))


def mab_row(source, text, questions=("What?",), answers=(("7",),), **metadata):
    return {
        "context": text,
        "questions": list(questions),
        "answers": [list(golds) for golds in answers],
        "metadata": {"source": source, "question_types": None, "haystack_sessions": None} | metadata,
    }


@pytest.fixture
def benchmark(folder):
    sessions = [
        "2023/05/20",
        [{"role": "user", "content": 'My cat\'s name is "Io".'}, {"role": "assistant", "content": "Ok"}],
    ]
    rows = {
        "Accurate_Retrieval": [
            mab_row("ruler_qa1_197K", context(0)),
            mab_row("longmemeval_s*", str(sessions), question_types=["single-session-user"]),
        ],
        "Test_Time_Learning": [
            mab_row("icl_banking77_5900shot_balance", context(1)), mab_row("recsys_redial_full", context(2))
        ],
        "Long_Range_Understanding": [mab_row("infbench_sum_eng_shots2", context(3), answers=[("a", "b")])],
        "Conflict_Resolution": [mab_row("factconsolidation_sh_6k", context(4))],
    }  # fmt: skip
    for split, some in rows.items():
        write(folder / f"{split}-00000-of-00001.parquet", some)
    return folder


def test_memoryagentbench(benchmark):
    source = load("memoryagentbench", benchmark)
    ruler, lme, icl, book, facts = source
    assert source.left_out == {"recall of recommended films is not computed": 1}
    assert [stream.competency for stream in source] == ["AR", "AR", "TTL", "LRU", "CR"]
    assert ruler.stream_id == "Accurate_Retrieval/000" and icl.source == "icl_banking77_5900shot_balance"
    # Whole, in chunks of 40 words at most, which end with a fact.
    assert "\n".join(chunk.text for chunk in ruler.chunks) == context(0)
    assert len(ruler.chunks) > 10 and all(len(chunk.text.split()) <= 40 for chunk in ruler.chunks)
    assert lme.chunks[0].text == '[Dialogue at timestamp 2023/05/20]\n<user> My cat\'s name is "Io".\n<assistant> Ok'
    assert lme.questions[0].kind == "single-session-user" and lme.questions[0].metric == "judge_longmemeval"
    assert icl.questions[0].metric == "boxed" and book.questions[0].answers == ("a", "b")
    assert "larger number" in facts.questions[0].instruction


def test_it_is_no_training_set(benchmark):
    with pytest.raises(ValueError, match="has no training streams"):
        load("memoryagentbench", benchmark, "train")
    with pytest.raises(ValueError, match="split must be"):
        load("memoryagentbench", benchmark, "Conflict_Resolution")


def test_a_missing_split_of_it(benchmark):
    (benchmark / "Conflict_Resolution-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"no split 'Conflict_Resolution' of ai-hyz/MemoryAgentBench"):
        load("memoryagentbench", benchmark)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": [["7"], ["8"]]}, "answers: expected an answer for each of the 1 questions"),
        ({"answers": [[]]}, r"answers\[0\]: expected a list of texts, at least one"),
        ({"metadata": {"other": "x"}}, "metadata.source: expected a text, the field is missing"),
        ({"context": ""}, "context: expected a text that is not blank"),
    ],
)
def test_broken_rows_of_it(benchmark, changes, message):
    write(
        benchmark / "Conflict_Resolution-00000-of-00001.parquet", [mab_row("factconsolidation_mh_6k", "x.") | changes]
    )
    with pytest.raises(ValueError, match=f"row 0, field {message}"):
        load("memoryagentbench", benchmark)
