"""What holds for the streams of every builder, on original files where there are some."""

import collections

import pytest

from finemem_jax import input_pipeline
from finemem_jax.reading import scoring
from finemem_jax.types import StreamSpec

SIZES = {"squality": (30, 512), "longmemeval": (30, 512)}
BUILDERS = (
    "squad", "hotpotqa", "nlu", "trec", "trec_fine", "pubmed_rct", "squality", "locomo", "longmemeval", "mquake",
    "needle",
)  # fmt: skip
# Words of a frame around a chunk, in Mem-alpha's style.
_FRAME = 60


@pytest.mark.parametrize("style", ["plain", "memalpha"])
@pytest.mark.parametrize("name", BUILDERS)
def test_streams_are_whole(source_dir, name, style):
    length, words = SIZES.get(name, (6, 160))
    ids, texts = collections.Counter(), {}
    for split in ("train", "test"):
        spec = StreamSpec(split, 3, 12, length, words, 3, 7, str(source_dir), style)
        try:
            source = input_pipeline.load(name, spec)
        except ValueError as error:
            if "holds no" not in str(error):
                raise
            pytest.skip(f"{error} (The folder comes from FINEMEM_SOURCE_DIR.)")
        assert 0 < len(source) <= 12
        texts[split] = set()
        for i in range(len(source)):
            stream = source[i]
            assert stream == source[i] and stream.source == name and stream.competency
            ids[split, stream.stream_id] += 1
            assert 1 <= len(stream.chunks) <= length and len(stream.questions) <= 7
            for t, chunk in enumerate(stream.chunks):
                assert 0 < len(chunk.text.split()) <= words + (style == "memalpha") * _FRAME
                assert len(chunk.questions) <= 3
                texts[split].add(chunk.text)
                assert all(question.gold_steps == (t,) for question in chunk.questions)
            for question in (*stream.questions, *(q for chunk in stream.chunks for q in chunk.questions)):
                assert question.text.strip() and question.answers and all(map(str.strip, question.answers))
                assert question.metric in scoring.METRICS or question.metric in scoring.JUDGED
                assert all(0 <= step < len(stream.chunks) for step in question.gold_steps)
                assert not question.choices or set(question.answers) <= set(question.choices)
                if question.metric in scoring.METRICS:
                    gold = question.answers[0]
                    assert scoring.score(f"\\boxed{{{gold}}}" if question.metric == "boxed" else gold, question) == 1
    assert set(ids.values()) == {1}
    assert not texts["train"] & texts["test"]


def test_another_seed_gives_other_streams(source_dir):
    for name in BUILDERS:
        length, words = SIZES.get(name, (6, 160))
        found = []
        for seed in (0, 0, 1):
            try:
                source = input_pipeline.load(name, StreamSpec("train", seed, 4, length, words, 3, 7, str(source_dir)))
            except ValueError:
                break
            found.append([source[i] for i in range(len(source))])
        else:
            assert found[0] == found[1]
            # Of few texts, all are taken, in another order.
            assert found[0] != found[2] or len(found[0]) < 4
