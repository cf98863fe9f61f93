"""Tests of finemem_jax/input_pipeline.py: builders are found by name, and the order of streams can be resumed."""

import collections
import itertools
import json

import pytest

from finemem_jax import input_pipeline
from finemem_jax.episode import Chunk, Stream, StreamSpec

SPEC = StreamSpec("train", 0, 2, 1, 50, 1, 1)

BUILDER = """
from finemem_jax.episode import Chunk, Stream
from . import _words

def load(spec):
    return [Stream(f"{spec.split}-{i}", _words.NAME, (Chunk("c"),)) for i in range(spec.num_streams)]
"""


@pytest.fixture
def data_dir(tmp_path):
    def made(name="one"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "own.py").write_text(BUILDER)
        (folder / "other.py").write_text(BUILDER)
        (folder / "_words.py").write_text(f"NAME = {name!r}")
        return folder

    return made


def test_load_asks_the_builder(data_dir):
    streams = input_pipeline.load("own", SPEC, data_dir())
    assert [stream.stream_id for stream in streams] == ["train-0", "train-1"]


@pytest.mark.parametrize("name", ["owm", "", "_words", "../own", "own.py", "os"])
def test_an_unknown_builder_is_refused_with_what_there_is(data_dir, name):
    with pytest.raises(ValueError, match=r"data\.name must be a builder in .*: other, own; got .*load\(spec\)"):
        input_pipeline.load(name, SPEC, data_dir())


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    with pytest.raises(ValueError, match="the folder has none"):
        input_pipeline.load("own", SPEC, tmp_path)


def test_two_folders_do_not_mix(data_dir):
    first, second = data_dir("first"), data_dir("second")
    sources = [input_pipeline.load("own", SPEC, folder)[0].source for folder in (first, second, first)]
    assert sources == ["first", "second", "first"]


def test_the_projects_builders_are_there():
    for name in ("synthetic", "squad", "locomo"):
        assert callable(input_pipeline.builder(name).load)


def source(n):
    return [Stream(f"s{i}", "made up", (Chunk(f"text {i}"),)) for i in range(n)]


def ids(batches, n):
    return [[stream.stream_id for stream in next(batches)] for _ in range(n)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_batches_hold_whole_streams():
    streams = source(6)
    batch = next(input_pipeline.training_order(streams, seed=0, batch_size=4))
    assert isinstance(batch, list)
    assert len(batch) == 4
    assert all(stream in streams for stream in batch)


def test_the_same_seed_gives_the_same_order():
    def order(seed):
        return ids(input_pipeline.training_order(source(20), seed, 4), 8)

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_an_epoch_holds_each_stream_once_and_the_next_is_shuffled_anew():
    batches = input_pipeline.training_order(source(20), seed=3, batch_size=5)
    epochs = [flat(ids(batches, 4)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(s.stream_id for s in source(20))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [stream.stream_id for stream in source(20)]


def test_batches_run_over_the_end_of_an_epoch():
    # 7 streams in threes: after seven batches each was seen three times.
    batches = input_pipeline.training_order(source(7), seed=0, batch_size=3)
    seen = collections.Counter(flat(ids(batches, 7)))
    assert set(seen.values()) == {3}


@pytest.mark.parametrize("taken", [0, 1, 3, 9])
def test_a_resumed_order_goes_on_with_the_very_next_batch(taken):
    batches = input_pipeline.training_order(source(10), seed=5, batch_size=3)
    ids(batches, taken)
    position = json.loads(json.dumps(batches.get_state()))  # As a checkpoint keeps it.
    wanted = ids(batches, 6)
    resumed = input_pipeline.training_order(source(10), seed=5, batch_size=3)
    resumed.set_state(position)
    assert ids(resumed, 6) == wanted


def test_streams_are_read_as_they_are_needed():
    read = []

    class Lazy:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, index):
            read.append(int(index))
            return Stream(f"s{index}", "made up", (Chunk("c"),))

    batches = input_pipeline.training_order(Lazy(), seed=0, batch_size=2)
    ids(batches, 3)
    assert len(read) < 20
