"""Tests of --mode=follow: the command goes on where it was, and its memory keeps to its budget."""

import pathlib

import pytest

import programs
from finemem_jax.memory.store import Store
from finemem_jax.serving import follow

FLAGS = ["--mode=follow", "--config.reader.kind=evidence", "--config.data.chunk_words=30",
         "--config.memory.budget_tokens=400"]  # fmt: skip


def command(tmp_path, *flags):
    return programs.main(f"--workdir={tmp_path / 'run'}", f"--config.follow.file={tmp_path / 'a.txt'}", *FLAGS, *flags)


def held(tmp_path):
    with Store(tmp_path / "run" / follow.FILE) as store:
        return store.load(str((tmp_path / "a.txt").resolve()))


def sentences(count):
    return "".join(f"On day {i} the ship number {i * 37} came into the harbour with tea.\n" for i in range(count))


def test_the_command_goes_on_where_it_was(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(sentences(8))
    first = command(tmp_path)
    assert first.returncode == 0, first.stderr
    memory, state = held(tmp_path)
    assert state["offset"] == path.stat().st_size - 1 and state["step"] >= 3
    assert sum(len(item.text) for item in memory.items) <= 400
    with path.open("a") as file:
        file.write(sentences(12)[len(sentences(8)) :])
    second = command(tmp_path)
    assert second.returncode == 0, second.stderr
    assert f"going on at byte {state['offset']:,}" in second.stdout
    _, later = held(tmp_path)
    assert later["step"] > state["step"] and later["offset"] == path.stat().st_size - 1
    # Steps go on counting, so later items have later sources.
    assert all(item.source_step < later["step"] for item in held(tmp_path)[0].items)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "a.txt' is no file. Name the text file"),
        ("x", ["--config.follow.idle_seconds=-1"], "follow.idle_seconds must be at least 0"),
        ("x", ["--config.memory.eviction=random"], "memory.eviction must be one of oldest, stale"),
        ("x", ["--config.memory.view=all"], "memory.view must be one of recent, retrieved, both"),
    ],
)
def test_bad_settings(tmp_path, content, flags, message):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    result = command(tmp_path, *flags)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not pathlib.Path(tmp_path / "run" / "config.json").exists()
