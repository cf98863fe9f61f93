"""Tests of finemem_jax/input_pipeline.py: builders are found by name, and the order of streams can be resumed."""

import collections
import itertools
import json

import pytest

from finemem_jax import input_pipeline
from finemem_jax.input_pipeline import Stage
from finemem_jax.types import Chunk, Stream, StreamSpec

SPEC = StreamSpec("train", 0, 2, 1, 50, 1, 1)

BUILDER = """
from finemem_jax.types import Chunk, Stream
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


def test_a_module_may_hold_several_builders(data_dir):
    folder = data_dir()
    (folder / "own.py").write_text(f"{BUILDER}\n\ndef load_twice(spec):\n    return load(spec) * 2\n")
    assert len(input_pipeline.load("own_twice", SPEC, folder)) == 2 * len(input_pipeline.load("own", SPEC, folder))
    assert input_pipeline.builder("own_twice", folder) is input_pipeline.builder("own", folder)
    with pytest.raises(ValueError, match=r"builder in .*: other, own, own_twice; got 'own_once'"):
        input_pipeline.load("own_once", SPEC, folder)


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
    for name in ("synthetic", "squad", "memalpha_full", "memalpha_mab", "trec_fine"):
        assert callable(input_pipeline.builder(name).load)


def source(n):
    return [Stream(f"s{i}", "made up", (Chunk(f"text {i}"),)) for i in range(n)]


def order(source, seed, batch_size):
    """The order of a run without a curriculum."""
    return input_pipeline.TrainingOrder([Stage(0, lambda: source)], seed, batch_size)


def ids(batches, n):
    return [[stream.stream_id for stream in next(batches)] for _ in range(n)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_batches_hold_whole_streams():
    streams = source(6)
    batch = next(order(streams, seed=0, batch_size=4))
    assert isinstance(batch, list)
    assert len(batch) == 4
    assert all(stream in streams for stream in batch)


def test_the_same_seed_gives_the_same_order():
    first, again, other = (ids(order(source(20), seed, 4), 8) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_an_epoch_holds_each_stream_once_and_the_next_is_shuffled_anew():
    batches = order(source(20), seed=3, batch_size=5)
    epochs = [flat(ids(batches, 4)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(s.stream_id for s in source(20))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [stream.stream_id for stream in source(20)]


def test_batches_run_over_the_end_of_an_epoch():
    # 7 streams in threes: after seven batches each was seen three times.
    batches = order(source(7), seed=0, batch_size=3)
    seen = collections.Counter(flat(ids(batches, 7)))
    assert set(seen.values()) == {3}


@pytest.mark.parametrize("taken", [0, 1, 3, 9])
def test_a_resumed_order_goes_on_with_the_very_next_batch(taken):
    batches = order(source(10), seed=5, batch_size=3)
    ids(batches, taken)
    position = json.loads(json.dumps(batches.get_state()))  # As a checkpoint keeps it.
    wanted = ids(batches, 6)
    resumed = order(source(10), seed=5, batch_size=3)
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

    batches = order(Lazy(), seed=0, batch_size=2)
    ids(batches, 3)
    assert len(read) < 20


def test_a_position_of_an_older_checkpoint_still_counts_batches():
    # What Grain's own iterator saved, before there were stages.
    wanted = ids(order(source(10), seed=5, batch_size=3), 4)[3]
    resumed = order(source(10), seed=5, batch_size=3)
    resumed.set_state({"next_index": 3})
    assert ids(resumed, 1) == [wanted]


@pytest.mark.parametrize("state", [{}, {"stage": 1, "next_index": 2}, {"position": 3}])
def test_a_position_of_another_form_is_refused(state):
    with pytest.raises(ValueError, match="another version.*start in another --workdir"):
        order(source(10), seed=5, batch_size=3).set_state(state)


def staged(name, n, chunks):
    return [Stream(f"{name}{i}", "made up", (Chunk("c"),) * chunks) for i in range(n)]


def curriculum(loaded=None):
    """Batches 0 and 1 have streams of 1 chunk, 2 to 4 of 2, and the rest of 4."""
    loaded = [] if loaded is None else loaded

    def load(chunks):
        loaded.append(chunks)
        return staged(f"{chunks}-", 12, chunks)

    stages = [Stage(start, lambda chunks=chunks: load(chunks)) for start, chunks in ((0, 1), (2, 2), (5, 4))]
    return input_pipeline.TrainingOrder(stages, seed=5, batch_size=3)


def test_each_stage_gives_streams_of_its_length():
    lengths = [{len(stream.chunks) for stream in next(batches)} for batches in [curriculum()] for _ in range(8)]
    assert lengths == [{1}, {1}, {2}, {2}, {2}, {4}, {4}, {4}]


def test_stages_share_an_epoch():
    # 12 streams in threes: batches 0 to 3 are one epoch, though batch 2 begins another stage.
    epoch = flat(ids(curriculum(), 4))
    assert sorted(int(name.split("-")[1]) for name in epoch) == list(range(12))


@pytest.mark.parametrize("taken", range(8))
def test_resumes_within_a_stage_and_at_its_borders(taken):
    batches = curriculum()
    ids(batches, taken)
    position = json.loads(json.dumps(batches.get_state()))
    wanted = ids(batches, 5)
    for resumed in (curriculum(), batches):  # In a new process, and going back in the same.
        resumed.set_state(position)
        assert ids(resumed, 5) == wanted
        assert resumed.get_state() == {"next_index": taken + 5}


def test_a_stage_is_loaded_when_it_begins():
    loaded = []
    batches = curriculum(loaded)
    assert loaded == []
    ids(batches, 2)
    assert loaded == [1]
    ids(batches, 1)
    assert loaded == [1, 2]
    resumed = curriculum(loaded)
    resumed.set_state({"next_index": 5})
    ids(resumed, 1)
    assert loaded == [1, 2, 4]


@pytest.mark.parametrize("starts", [[], [1], [0, 3, 3], [0, 4, 2]])
def test_stages_out_of_order_are_refused(starts):
    with pytest.raises(ValueError, match="ascending batches from 0"):
        input_pipeline.TrainingOrder([Stage(start, lambda: source(3)) for start in starts], 0, 1)


# --------------------------------------------------------------------------------------
# Mixtures and processes
# --------------------------------------------------------------------------------------


def mixture(*sizes, weights=None):
    parts = [
        [Stream(f"s{i}", f"source {n}", (Chunk(f"text {i}"),)) for i in range(size)] for n, size in enumerate(sizes)
    ]
    return input_pipeline.Mixture(parts, weights or [1.0] * len(sizes))


def test_a_mixture_is_one_source_after_the_other_with_ids_of_its_own():
    mixed = mixture(2, 3)
    assert [stream.stream_id for stream in mixed] == [
        "source 0/s0", "source 0/s1", "source 1/s0", "source 1/s1", "source 1/s2"
    ]  # fmt: skip
    assert [stream.stream_id for stream in mixture(2)] == ["s0", "s1"]
    with pytest.raises(IndexError):
        mixed[5]


def test_sources_come_as_often_as_their_weights_say():
    mixed = mixture(50, 10, 7, weights=[1, 2, 5])
    seen = collections.Counter(name.split("/")[0] for name in flat(ids(order(mixed, 3, 8), 100)))
    assert seen == {"source 0": 100, "source 1": 200, "source 2": 500}
    # Evenly: never far from it.
    for batch in ids(order(mixed, 3, 8), 20):
        assert 4 <= sum(name.startswith("source 2") for name in batch) <= 6


def test_each_source_of_a_mixture_is_shuffled_by_itself():
    mixed = mixture(6, 4, weights=[1, 1])
    names = flat(ids(order(mixed, 0, 4), 30))
    for place, size in (("source 0", 6), ("source 1", 4)):
        own = [name for name in names if name.startswith(place)]
        for start in range(0, 60 // size * size, size):
            assert len(set(own[start : start + size])) == size


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="data.weights must be a number above 0 for each of the 2"):
        mixture(3, 3, weights=weights)


def read_by(count, streams, start=0, batches=250, batch_size=4):
    """The streams that so many processes read together, batch by batch."""
    stages = [Stage(0, lambda: streams)]
    readers = [input_pipeline.TrainingOrder(stages, 7, batch_size, process=(index, count)) for index in range(count)]
    for reader in readers:
        reader.set_state({"next_index": start})
    found = []
    for _ in range(batches):
        shares = [[stream.stream_id for stream in next(reader)] for reader in readers]
        found.append([shares[i % count][i // count] for i in range(batch_size)])
    return found, readers[0].get_state()


@pytest.mark.parametrize("streams", [source(37), mixture(30, 11, weights=[2, 1])], ids=["one", "mixed"])
def test_the_first_thousand_streams_are_the_same_for_any_number_of_processes(streams):
    alone, _ = read_by(1, streams)
    assert sum(map(len, alone)) == 1000
    for count in (2, 4):
        assert read_by(count, streams)[0] == alone


def test_another_number_of_processes_goes_on_with_the_very_next_batch():
    streams = mixture(30, 11, weights=[2, 1])
    alone, _ = read_by(1, streams, batches=60)
    first, state = read_by(4, streams, batches=13)  # In the middle of an epoch.
    then, state = read_by(1, streams, state["next_index"], batches=5)
    last, _ = read_by(2, streams, state["next_index"], batches=42)
    assert first + then + last == alone


def test_a_batch_must_be_shared_evenly():
    with pytest.raises(ValueError, match="streams_per_step=3 must be a multiple of the number of processes, 2"):
        input_pipeline.TrainingOrder([Stage(0, lambda: source(3))], 0, 3, process=(0, 2))
