"""Tests of finemem_jax/serving/agent.py: what evaluation does, call by call; nothing is lost in company."""

import contextlib
import doctest
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any, cast

import pytest

import finemem_jax
import hf_folders
import scripted_agent
import smoke_run
from finemem_jax import build
from finemem_jax import config as config_lib
from finemem_jax.evaluation import evaluate
from finemem_jax.memory.store import Store
from finemem_jax.models import decoder, presets
from finemem_jax.reading import reader
from finemem_jax.rl.method import rollout_options
from finemem_jax.serving import agent, load
from finemem_jax.types import Action, Chunk, Memory, MemoryItem, Operation, Question, Refusal, Status, Stream
from finemem_jax.weights import hf_weights, tokenizer_files

TESTS = pathlib.Path(__file__).parents[1]


def texts(held):
    return [item.text for item in held]


def together(count, call):
    """Calls call(i) from as many threads; returns what each has raised."""
    raised = [None] * count

    def run(i):
        try:
            call(i)
        except Exception as error:
            raised[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


class Gate:
    """A policy that writes down what it reads once it may; it notes what it was asked together."""

    def __init__(self):
        self.batches, self.opened = [], threading.Event()

    def __call__(self, requests):
        self.batches.append([scripted_agent.chunk_of(request) for request in requests])
        assert self.opened.wait(60)
        return scripted_agent.write_down(requests)


def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


# --------------------------------------------------------------------------------------
# With a model
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke():
    config = smoke_run.config(seed=5)  # Whose random weights write some valid operations, greedily.
    return config, build.build(config)


def test_it_does_what_evaluation_does(smoke):
    config, parts = smoke
    options = rollout_options(config, evaluation=True)
    pieces = [f"Ship {i} came into the harbour with {goods}." for i, goods in enumerate(("tea", "silk", "tin", "oil"))]
    question = Question("Which ship came with tea?", ("0",))
    stream = Stream("s", "test", tuple(map(Chunk, pieces)), (question,))
    (trajectory,) = evaluate.run([stream], options, parts.players, key=(0,))
    with agent.MemoryAgent(parts.players, options) as made:
        seen = [made.observe(piece) for piece in pieces]
        reply = made.ask(question.text)
        assert made.memory() == trajectory.steps[-1].memory.items
    assert [one.outcomes for one in seen] == [step.outcomes for step in trajectory.steps]
    assert any(one.valid for one in seen) and not all(one.valid == len(one.outcomes) for one in seen)
    assert (reply.answer, reply.evidence) == (trajectory.answers[0].text, trajectory.answers[0].evidence)
    assert seen[-1].items == len(trajectory.steps[-1].memory.items)
    assert seen[-1].tokens == parts.environment.memory_tokens(trajectory.steps[-1].memory)


def test_who_else_calls_makes_no_difference(smoke):
    config, parts = smoke
    options = rollout_options(config, evaluation=True)

    def life(made, i):
        for day in range(3):
            made.observe(f"On day {day} ship {i} came into the harbour with tea.", f"user {i}")
            made.ask("Which ship came?", f"user {i}")

    with agent.MemoryAgent(parts.players, options) as alone, agent.MemoryAgent(parts.players, options) as crowded:
        for i in range(6):
            life(alone, i)
        assert together(6, lambda i: life(crowded, i)) == [None] * 6
        assert [crowded.memory(user) for user in crowded.users()] == [alone.memory(user) for user in alone.users()]
        assert len(alone.users()) == 6


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(agent, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("rank", [0, 2])
def test_a_runs_workdir(tmp_path, rank):
    settings = {"train.num_steps": 1, "train.evaluate_first": False, "lora.rank": rank}
    smoke_run.run(tmp_path / "run", smoke_run.config(**settings))
    overrides = {"reader.kind": "evidence"}
    with finemem_jax.MemoryAgent.load(tmp_path / "run", tmp_path / "m.sqlite", **overrides) as made:
        made.observe("Ada moved to Oslo.", "ada")
    with Store(tmp_path / "m.sqlite") as store:
        assert store.load("ada")[1] == {"step": 1, "weights": 1}
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read .*name a whole folder"):
        agent.MemoryAgent.load(tmp_path / "run")


def export(folder, **about):
    """Writes an exported folder as --mode=export does."""
    model = presets.preset("tiny")
    tokens = tokenizer_files.from_folder(hf_folders.write_tokenizer(folder.parent))
    hf_weights.save(folder, model, decoder.init(model, 3), tokenizer=tokens)
    config = config_lib.flatten(smoke_run.config(**{"model.tokenizer": "weights", "lora.rank": 2}))
    (folder / load.EXPORTED).write_text(json.dumps({"format": 1, "step": 7, "config": config} | about))
    return folder


def test_an_exported_folder(tmp_path):
    folder = export(tmp_path / "out")
    with agent.MemoryAgent.load(folder, **{"reader.kind": "evidence", "rollout.max_new_tokens": 4}) as made:
        assert made.observe("Ada moved to Oslo.").chunks == 1
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter alone .*export.form=merged, or load its workdir"):
        agent.MemoryAgent.load(folder)
    with pytest.raises(ValueError, match=r"has the format 2, and only 1 can be read"):
        agent.MemoryAgent.load(export(tmp_path / "newer", format=2))


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        ("nowhere", {}, r"'nowhere' is neither a run's workdir with checkpoints nor an exported model"),
        ("nowhere.py", {}, r"'nowhere.py': there is no such file; name an experiment"),
        ("experiments/smoke.py", {"memory.topk": 3}, r"there is no setting 'memory.topk'; is it memory.top_k"),
        ("experiments/smoke.py", {"memory.top_k": "3"}, r"memory.top_k must be a whole number, got '3'"),
        ("experiments/smoke.py", {"memory.top_k": 0}, r"memory.top_k must be at least 1"),
    ],
)
def test_what_cannot_be_loaded(path, overrides, message):
    path = str(TESTS.parent / path) if path.startswith("experiments") else path
    with pytest.raises(ValueError, match=message):
        agent.MemoryAgent.load(path, **overrides)


def test_importing_it_does_not_import_jax():
    program = "import sys; from finemem_jax import MemoryAgent; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=TESTS.parent, check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'MemoryAgents'"):
        _ = finemem_jax.MemoryAgents


# --------------------------------------------------------------------------------------
# Many at once
# --------------------------------------------------------------------------------------


def test_those_of_different_users_are_served_together_and_those_of_one_in_order():
    gate = Gate()
    with scripted_agent.make(policy=gate) as made:
        first = threading.Thread(target=made.observe, args=("first", "a"))
        first.start()
        wait_until(lambda: gate.batches)
        calls = [("second", "a"), ("third", "a"), ("one", "b"), ("two", "c")]
        threads = [threading.Thread(target=made.observe, args=call) for call in calls]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        gate.opened.set()
        for thread in [first, *threads]:
            thread.join()
        assert [sorted(batch) for batch in gate.batches] == [["first"], ["one", "second", "two"], ["third"]]
        assert texts(made.memory("a")) == ["first", "second", "third"]


def test_a_thousand_calls_lose_nothing_and_mix_nothing(tmp_path):
    with scripted_agent.make(tmp_path / "m.sqlite") as made:

        def life(i):
            for n in range(40):
                made.observe(f"thing {n} of {i % 8}, by {i}", f"user {i % 8}")
                assert all(f"of {i % 8}" in item.text for item in made.ask(f"thing {n}", f"user {i % 8}").evidence)

        assert together(16, life) == [None] * 16
        for user in range(8):
            wanted = {f"thing {n} of {user}, by {i}" for n in range(40) for i in (user, user + 8)}
            held = made.memory(f"user {user}")
            assert set(texts(held)) == wanted and len(held) == 80
            assert sorted(item.source_step for item in held) == list(range(80))


def test_two_agents_on_one_file_lose_nothing(tmp_path):
    path = tmp_path / "m.sqlite"
    with scripted_agent.make(path) as one, scripted_agent.make(path) as other:

        def life(i):
            for n in range(25):
                (one, other)[i].observe(f"thing {n} by {i}", "a")

        assert together(2, life) == [None] * 2
        assert set(texts(one.memory("a"))) == {f"thing {n} by {i}" for n in range(25) for i in range(2)}
        assert one.memory("a") == other.memory("a")


def test_what_was_written_for_an_older_memory_is_written_again(tmp_path):
    gate, path = Gate(), tmp_path / "m.sqlite"
    with scripted_agent.make(path) as other, scripted_agent.make(path, policy=gate) as made:
        other.observe("old", "a")
        thread = threading.Thread(target=made.observe, args=("new", "a"))
        thread.start()
        wait_until(lambda: gate.batches)
        other.forget("a", [1])
        gate.opened.set()
        thread.join()
        assert gate.batches == [["new"], ["new"]] and texts(made.memory("a")) == ["new"]


def test_a_kill_loses_nothing_that_was_returned(tmp_path):
    program = textwrap.dedent(
        """
        import sys, threading, scripted_agent
        made = scripted_agent.make(sys.argv[1])
        def life(i):
            n = len(made.memory(f"user {i}"))
            while True:
                made.observe(f"thing {n} of {i}", f"user {i}")
                print(f"{i} {n}\\n", end="", flush=True)
                n += 1
        for i in range(4):
            threading.Thread(target=life, args=(i,)).start()
        """
    )
    path, told = tmp_path / "m.sqlite", {}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        for _ in range(60):
            user, n = process.stdout.readline().split()
            told[int(user)] = int(n)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with scripted_agent.make(path) as made:
            for user, n in told.items():
                held = texts(made.memory(f"user {user}"))
                assert held == [f"thing {i} of {user}" for i in range(len(held))] and len(held) > n


def test_a_question_does_not_wait_for_another_s_text():
    """With a model: whoever comes while the manager writes is answered meanwhile."""
    done, asking = [], []
    changes = {"rollout.max_new_tokens": 256, "manager.chunk_tokens": 256}
    with agent.MemoryAgent.from_config(smoke_run.config(**changes, seed=5)) as made:
        engine = cast(Any, made._calls._manager.pending.worker).engine
        decode = engine.decode

        def ask():
            made.ask("Which ship came?", "b")
            done.append("question")

        def decode_and_ask(*arguments, **keywords):
            if not asking:
                asking.append(threading.Thread(target=ask))
                asking[0].start()
                wait_until(made._calls.is_wanted)
            return decode(*arguments, **keywords)

        engine.decode = decode_and_ask
        made.observe("Ship 1 came into the harbour with tea.", "a")
        done.append("text")
        asking[0].join()
    assert done == ["question", "text"]


# --------------------------------------------------------------------------------------
# Long texts, and faults
# --------------------------------------------------------------------------------------

LONG = "The first piece is as long as a chunk may be, and ends. " + "The second is another piece of this text."


def refusing(word):
    """A policy that refuses texts with a word in them."""

    def policy(requests):
        return [
            Refusal("too long; lower it.") if word in scripted_agent.chunk_of(request) else completion
            for request, completion in zip(requests, scripted_agent.write_down(requests), strict=True)
        ]

    return policy


def test_long_texts_become_several_chunks():
    with scripted_agent.make() as made:
        seen = made.observe(LONG)
        assert seen.chunks == 2 == seen.valid == seen.items and " ".join(texts(made.memory())) == LONG
        assert seen.tokens == len(LONG) - 1


@pytest.mark.parametrize("known", [False, True])
def test_an_error_leaves_the_memory_as_it_was(known):
    with scripted_agent.make(policy=refusing("second")) as made:
        if known:
            made.observe("known", "a")
        before = made.users(), made.memory("a")
        with pytest.raises(ValueError, match="too long; lower it"):
            made.observe(LONG, "a")
        assert (made.users(), made.memory("a")) == before
        made.observe("more", "a")
        assert texts(made.memory("a")) == ["known", "more"][1 - known :]


def test_undoing_keeps_what_others_have_written(tmp_path):
    path, refuse = tmp_path / "m.sqlite", refusing("second")
    with scripted_agent.make(path) as other:

        def policy(requests):
            if "second" in scripted_agent.chunk_of(requests[0]):
                with contextlib.suppress(ValueError):
                    other.observe("theirs", "a")
            return refuse(requests)

        with scripted_agent.make(path, policy=policy) as made, pytest.raises(ValueError):
            made.observe(LONG, "a")
        assert "theirs" in texts(other.memory("a"))


def test_an_error_is_for_one_call_only():
    opened = threading.Event()

    def answer(queries):
        assert opened.wait(60)
        if any("bad" in query.question for query in queries):
            raise ZeroDivisionError
        return reader.evidence()(queries)

    with scripted_agent.make(answer=answer) as made:
        made.observe("good things", "u")
        threading.Timer(0.3, opened.set).start()
        raised = together(6, lambda i: made.ask("bad" if i == 3 else "good", "u" if i < 5 else "v"))
        assert [type(error) for error in raised] == [type(None)] * 3 + [ZeroDivisionError] + [type(None)] * 2
        assert made.ask("good", "u").answer == "good things"


class Servers:
    """A reader whose answers come by themselves, some time after they were asked for."""

    def __init__(self):
        self._due = {}

    def submit(self, query):
        request_id = len(self._due)
        self._due[request_id] = time.monotonic() + 0.2, query
        return request_id

    def collect(self, wait=True):
        assert not wait
        now = time.monotonic()
        done = [request_id for request_id, due in self._due.items() if due and due[0] <= now]
        found = [(request_id, f"answer to {self._due[request_id][1].question}") for request_id in done]
        self._due |= dict.fromkeys(done)
        return found

    def cancel(self, request_id):
        return False


def test_nobody_waits_for_servers_but_who_asked():
    with scripted_agent.make(answer=Servers(), waits=False) as made:
        order = []

        def run(i):
            if i < 5:
                assert made.ask(f"question {i}", f"user {i}").answer == f"answer to question {i}"
            else:
                time.sleep(0.05)
                made.observe("text", "another")
            order.append(i)

        assert together(6, run) == [None] * 6
        assert order[0] == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: made.observe(" \n"), "The text must hold words"),
        (lambda made: made.ask(""), "The question must hold words"),
        (lambda made: made.observe("x", ""), "A user's name must be 1 to 256 printable characters"),
        (lambda made: made.memory("\ud800"), "A user's name must be"),
        (lambda made: made.ask("x", "u" * 257), "A user's name must be"),
        (lambda made: made.forget("a", [1, 5]), r"There are no items \[5\] in this memory"),
    ],
)
def test_what_is_refused_at_the_door(call, message):
    with scripted_agent.make() as made:
        made.observe("kept", "a")
        with pytest.raises(ValueError, match=message):
            call(made)
        assert made.users() == ["a"] and texts(made.memory("a")) == ["kept"]


def test_closing_ends_what_waits():
    gate = Gate()
    made = scripted_agent.make(policy=gate)
    raised = []

    def call(user):
        try:
            made.observe("text", user)
        except RuntimeError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=call, args=(user,)) for user in ("a", "a", "b")]
    for thread in threads:
        thread.start()
    wait_until(lambda: gate.batches)
    closing = threading.Thread(target=made.close)
    closing.start()
    wait_until(lambda: not made._calls._open)
    gate.opened.set()
    for thread in [closing, *threads]:
        thread.join()
    # What the manager had already begun may be done; the second text of "a" cannot be.
    assert set(raised) == {"This agent has been closed; load it again."}
    with pytest.raises(RuntimeError, match="has been closed"):
        made.observe("text")


# --------------------------------------------------------------------------------------
# Memories
# --------------------------------------------------------------------------------------


def test_outcomes_say_why_not():
    def policy(requests):
        operations = (Operation(Action.INSERT, "a"), Operation(Action.INSERT, "a"), Operation(Action.DELETE, "", 9))
        return [scripted_agent.completion(*operations) for _ in requests]

    with scripted_agent.make(policy=policy) as made:
        seen = made.observe("x")
        assert [one.status for one in seen.outcomes] == [Status.APPLIED, Status.DUPLICATE, Status.UNKNOWN_ID]
        assert seen.valid == 1


def test_forgetting(tmp_path):
    with scripted_agent.make(tmp_path / "m.sqlite") as made:
        for n in range(4):
            made.observe(f"secret {n}", "a")
        assert made.forget("a", [1, 3]) == 2 and texts(made.memory("a")) == ["secret 1", "secret 3"]
        assert made.forget("a", []) == 0
        made.observe("later", "a")
        assert [item.item_id for item in made.memory("a")] == [2, 4, 5]  # Ids are not given out again.
        assert made.ask("secret 0", "a").evidence[0].text != "secret 0"
        assert made.forget("a") == 3 and made.users() == [] and made.memory("a") == ()
    assert b"secret" not in (tmp_path / "m.sqlite").read_bytes()


def test_copies(tmp_path):
    with scripted_agent.make() as made:
        made.observe("öne", "a")
        made.observe("two", "b")
        made.save(tmp_path / "copy.json")
        made.observe("more", "a")
        assert made.restore(tmp_path / "copy.json") == ["a", "b"]
        assert texts(made.memory("a")) == ["öne"]
    with scripted_agent.make(tmp_path / "m.sqlite") as other:
        other.restore(tmp_path / "copy.json")
        assert texts(other.memory("b")) == ["two"]
        other.observe("again", "b")
        assert [item.source_step for item in other.memory("b")] == [0, 1]
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8"))["memories"]["a"]["steps"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copy: copy.update(format=2), "its format is 2"),
        (lambda copy: copy["memories"]["a"].update(next_id=1), "outside"),
        (lambda copy: copy["memories"]["a"]["items"][0].pop("text"), "no copy of memories .*MemoryAgent.save"),
        (lambda copy: copy["memories"].update(b=[]), "no copy of memories"),
        (
            lambda copy: copy["memories"]["a"]["items"][0].update(memory_type="semantic"),
            "not written in this manager's",
        ),
    ],
)
def test_a_broken_copy_changes_nothing(tmp_path, change, message):
    with scripted_agent.make() as made:
        made.observe("kept", "a")
        made.save(tmp_path / "copy.json")
        copy = json.loads((tmp_path / "copy.json").read_text())
        change(copy)
        (tmp_path / "copy.json").write_text(json.dumps(copy))
        made.observe("later", "a")
        with pytest.raises(ValueError, match=message):
            made.restore(tmp_path / "copy.json")
        assert texts(made.memory("a")) == ["kept", "later"]


def test_a_memory_of_another_layout_is_refused(tmp_path):
    with Store(tmp_path / "m.sqlite") as store:
        store.save("a", Memory((MemoryItem(1, "x", 0, 0, "semantic"),), 2), {})
    with scripted_agent.make(tmp_path / "m.sqlite") as made:
        with pytest.raises(ValueError, match=r"'a' was not written in this manager's layout \(memory.layout='flat'\)"):
            made.observe("y", "a")
