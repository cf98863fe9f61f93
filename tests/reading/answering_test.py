"""Tests of finemem_jax/reading/answering.py: who is asked, what is on file, and runs whose reader is on servers."""

import contextlib
import dataclasses
import json
import threading
import time

import jax
import pytest

import programs
import smoke_run
from fault_server import FaultServer, reply_to
from finemem_jax import build
from finemem_jax.clients import language_models
from finemem_jax.reading import answering
from finemem_jax.reading.reader import Query
from finemem_jax.rl.method import rollout_options, with_likelihoods
from finemem_jax.runtime import files, workers
from finemem_jax.types import Action, Chat, Chunk, Memory, Message, Operation

KEY = "sk-very-secret-key"


def servers(*urls, name="reader", **more):
    """Settings with which a role asks servers: the reader those of the entry "main", others those of "second"."""
    entry = "main" if name == "reader" else "second"
    of_entry = {f"servers.{entry}.{field}": value for field, value in ({"model": "m"} | more).items()}
    return {f"{name}.kind": "server", f"{name}.server": entry, f"servers.{entry}.urls": ",".join(urls)} | of_entry


def config(**changes):
    return smoke_run.config(**changes)


@contextlib.contextmanager
def built(workdir=None, **changes):
    parts = build.build(config(**changes), workdir)
    with contextlib.closing(parts.answering):
        yield parts


# --------------------------------------------------------------------------------------
# Who is asked
# --------------------------------------------------------------------------------------


def test_the_frozen_model():
    with built() as parts:
        assert (
            parts.answering.generates
            and parts.answering.likelihood_scorer is None
            and parts.answering.content_judge is None
        )
        assert parts.answering.answer_judge is not None
        assert len(workers.run_all(parts.answering.answer, [Query("Where?", ("Here.",))])) == 1
        assert parts.answering.take_stats().requests == 1 and parts.answering.take_stats().requests == 0


def test_the_evidence_alone():
    with built(**{"reader.kind": "evidence"}) as parts:
        assert (
            not parts.answering.generates
            and parts.answering.answer_judge is None
            and parts.answering.take_metrics() == {}
        )
        assert workers.run_all(parts.answering.answer, [Query("Where?", ("Here.",))]) == ["Here."]
        # It needs no weights, so nothing of it is compiled.
        parts.answering.warm_up(8, 64, lambda line: pytest.fail(line))
    with pytest.raises(ValueError, match="'mem_alpha' needs a judge of contents.*judge.kind"):
        build.build(config(**{"reader.kind": "evidence", "credit.rule": "mem_alpha"}))
    with built(**{"reader.kind": "evidence", "credit.rule": "mem_alpha", "judge.kind": "model"}) as parts:
        assert (
            parts.answering.content_judge is not None
            and parts.answering.answer_judge is not None
            and parts.answering.generates
        )


def test_servers_for_all(monkeypatch):
    with FaultServer() as server, built(**servers(server.url) | {"credit.rule": "mem_alpha"}) as parts:
        assert not parts.answering.generates
        (answer,) = workers.run_all(parts.answering.answer, [Query("Where?", ("Here.",))])
        assert answer == reply_to("Notes:\n- Here.\nQuestion: Where?").strip()
        workers.run_all(parts.answering.content_judge, [Operation(Action.INSERT, "x")])
        # The judge is asked three times, and comes to no verdict.
        metrics = parts.answering.take_metrics()
        assert metrics["reader/servers_answered"] == 4 and metrics["judge/retried"] == 2
        assert metrics["judge/undecided"] == 1 and metrics["reader/servers_failed"] == 0
        assert parts.answering.take_metrics()["judge/undecided"] == 0
        assert {body["model"] for body in server.bodies} == {"m"}


def test_a_judge_of_its_own():
    with FaultServer() as one, FaultServer() as other:
        with built(**servers(one.url) | servers(other.url, name="judge", model="j")) as parts:
            question = dataclasses.replace(QUESTION, metric="judge")
            workers.run_all(parts.answering.answer_judge, [answering.judges.JudgedAnswer(question, "a")])
            assert not one.bodies and {body["model"] for body in other.bodies} == {"j"}


QUESTION = answering.judges.Question("Where?", ("Oslo",))


def test_likelihoods_need_the_model():
    with FaultServer() as server, built(**servers(server.url) | {"likelihood.chunk_share": "0.5"}) as parts:
        claim = answering.reader.likelihood_query(QUESTION, ("Ana lives in Oslo.",))
        (found,) = workers.run_all(parts.answering.likelihood_scorer, [claim])
        assert 0 < found.value < 1
        assert parts.answering.take_metrics()["likelihood/claims"] == 1


def test_prompts_are_replaced():
    changes = {"reader.system": "READ!", "manager.system": "MANAGE!", "judge.answer_system": "JUDGE!"}
    with FaultServer() as server, built(**servers(server.url) | changes) as parts:
        workers.run_all(parts.answering.answer, [Query("Where?", ())])
        workers.run_all(
            parts.answering.answer_judge,
            [answering.judges.JudgedAnswer(dataclasses.replace(QUESTION, metric="judge"), "a")],
        )
        systems = [body["messages"][0]["content"] for body in server.bodies]
        assert systems[0] == "READ!" and set(systems[1:]) == {"JUDGE!"}
        ids = parts.environment.observe(Chunk("x"), Memory()).ids
        assert "MANAGE!" in parts.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", r"servers\.main\.urls: 'localhost:8000' is no URL of a server"),
        (f"http://me:{KEY}@localhost/v1", r"servers\.main\.urls: The URL of the server at 'localhost' holds"),
        (" , ", r"servers\.main\.urls: An endpoint needs a URL"),
    ],
)
def test_servers_that_cannot_be(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        build.build(config(**servers(url)))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("0.5", {0: 0.5, 9: 0.5}),
        ("0:1,10:0", {0: 1.0, 5: 0.5, 10: 0.0, 11: 0.0}),
        ("0:0,4:1", {0: 0.0, 1: 0.25, 99: 1.0}),
        ("0:1,4:1,8:0.5", {0: 1.0, 4: 1.0, 6: 0.75, 8: 0.5, 99: 0.5}),
    ],
)
def test_the_share_of_likelihoods(schedule, shares):
    chosen = config(**{"likelihood.chunk_share": schedule})
    assert {step: answering.chunk_share(chosen, step) for step in shares} == pytest.approx(shares)


@pytest.mark.parametrize(
    ("changes", "step", "expected"),
    [
        # chunk_answers, chunk_likelihoods, final_likelihoods, probe_likelihoods
        ({}, 0, (True, False, False, False)),
        ({"chunk_share": "1"}, 1, (False, True, False, False)),
        ({"chunk_share": "1"}, 10, (True, True, True, False)),
        ({"chunk_share": "1", "check_every": 0}, 0, (False, True, False, False)),
        ({"chunk_share": "0.5"}, 1, (True, True, False, False)),
        ({"probes": True}, 1, (True, False, False, True)),
        ({"chunk_share": "0:1,5:0"}, 5, (True, False, False, False)),
    ],
)
def test_what_is_generated_at_a_step(changes, step, expected):
    chosen = config(**{f"likelihood.{name}": value for name, value in changes.items()})
    options = with_likelihoods(chosen, rollout_options(chosen, evaluation=False), step)
    got = options.chunk_answers, options.chunk_likelihoods, options.final_likelihoods, options.probe_likelihoods
    assert got == expected
    # Evaluation knows nothing of it: reported numbers are generated answers.
    plain = rollout_options(chosen, evaluation=True)
    assert plain.chunk_answers and not (plain.chunk_likelihoods or plain.probe_likelihoods)


# --------------------------------------------------------------------------------------
# What is on file
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_servers", [False, True])
def test_what_was_asked_in_another_run_is_not_asked_again(tmp_path, on_servers):
    queries = [Query(f"Question {i}?", ("A note.",)) for i in range(5)]
    with FaultServer() as server:
        changes = servers(server.url) if on_servers else {}
        with built(tmp_path, **changes) as parts:
            first = workers.run_all(parts.answering.answer, queries)
            assert parts.answering.take_metrics()["answers/on_file_fraction"] == 0
        assert (tmp_path / "answers.sqlite").exists()
        with built(tmp_path / "other", **changes | {"answers.file": str(tmp_path / "answers.sqlite")}) as parts:
            assert workers.run_all(parts.answering.answer, queries) == first
            assert parts.answering.take_metrics()["answers/on_file_fraction"] == 1
            assert parts.answering.take_stats().requests == 0
        assert server.asked.total() == 5 * on_servers
        # Another model, another answer.
        other = servers(server.url, model="other") if on_servers else {"seed": 1}
        with built(tmp_path, **other) as parts:
            workers.run_all(parts.answering.answer, queries)
            assert parts.answering.take_metrics()["answers/on_file_fraction"] == 0
        with built(tmp_path, **changes | {"answers.file": ""}) as parts:
            workers.run_all(parts.answering.answer, queries)
            assert "answers/on_file_fraction" not in parts.answering.take_metrics()


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "answers.sqlite").write_text("text " * 1000)
    with pytest.raises(ValueError, match="cannot be used as a file of replies"):
        build.build(config(), tmp_path)


def test_models_have_names_of_their_own():
    parts = build.build(config())
    name = language_models.local_name(config(), parts.params)
    assert name == language_models.local_name(config(), build.build(config()).params)
    assert name != language_models.local_name(config(**{"sampler.int8": True}), parts.params)
    # Every bit counts, and where it stands.
    changed = jax.tree.map(lambda x: x, parts.params)
    changed["embedding"] = changed["embedding"].at[3, 5].multiply(1 + 2**-23)
    swapped = parts.params | {"embedding": parts.params["embedding"][::-1]}
    turned = parts.params | {"embedding": parts.params["embedding"][:, ::-1]}
    names = {language_models.local_name(config(), params) for params in (parts.params, changed, swapped, turned)}
    assert len(names) == 4
    half = jax.tree.map(lambda x: x.astype("bfloat16"), parts.params)
    assert language_models.local_name(config(), half) not in names


# --------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------

SHORT = {"train.num_steps": 2, "train.evaluate_first": False, "data.num_test": 2}


def trajectories(workdir):
    return [path.read_bytes() for path in sorted((workdir / "trajectories").glob("*.jsonl.gz"))]


def test_faults_change_nothing(tmp_path, monkeypatch):
    """A run whose servers fail at 30 % of all calls has the trajectories of one whose servers do not."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name, share, patience in (("well", 0.0, 60.0), ("ill", 0.3, 0.5)):
        with FaultServer(share, seed=3) as server:
            more = servers(server.url, call_seconds=patience)
            smoke_run.run(tmp_path / name, config(**SHORT | more | {"train.num_steps": 1}))
            assert server.answered.total() >= 10 and (share or max(server.answered.values()) == 1)
    assert trajectories(tmp_path / "well") == trajectories(tmp_path / "ill") != []
    (first,) = files.read_metrics(tmp_path / "ill")
    assert first["reader/servers_failed"] > 0 and first["reader/servers_answered"] > 0
    # No file of the run holds the key, though servers have quoted it.
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if KEY.encode() in path.read_bytes()]


def test_a_run_outlives_its_server(tmp_path):
    """Down for good: the command stops and says so; later it goes on, and nothing is asked twice."""
    with FaultServer(latency=0.002) as server:
        more = servers(server.url, total_seconds=1.0, concurrency=4)
        settings = SHORT | more
        smoke_run.run(tmp_path / "whole", config(**settings))
        asked = server.asked.total()
        server.asked.clear()
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        breaker = threading.Thread(target=break_after, args=(server, asked // 2), daemon=True)
        breaker.start()
        stopped = programs.main(f"--workdir={tmp_path / 'parts'}", *flags)
        breaker.join(timeout=10)
        assert stopped.returncode == 75, stopped.stderr
        assert f"{server.url} answered 503" in stopped.stderr and "the same command goes on" in stopped.stderr
        assert "Traceback" not in stopped.stderr and "is saved; the same command continues" in stopped.stdout
        server.down = False
        # What the same command does.
        smoke_run.run(tmp_path / "parts", config(**settings))
        assert set(server.answered.values()) == {2}  # Once for each of the two runs.
    assert trajectories(tmp_path / "parts") == trajectories(tmp_path / "whole") != []


def break_after(server, count):
    while server.asked.total() < count:
        time.sleep(0.001)
    server.down = True


@pytest.mark.parametrize(
    "changes",
    [
        {"likelihood.chunk_share": "1", "likelihood.check_every": 2},
        {"credit.rule": "step_gain", "likelihood.probes": True, "likelihood.chunk_share": "0.5"},
        {"credit.rule": "shapley", "likelihood.probes": True, "likelihood.check_every": 0},
    ],
)
def test_training_on_likelihoods(tmp_path, changes):
    smoke_run.run(tmp_path, config(**SHORT | changes))
    first, second = files.read_metrics(tmp_path)
    assert first["time/likelihood_seconds"] > 0 and first["likelihood/claims"] > 0
    if changes.get("likelihood.chunk_share") == "1":
        assert first["reward/likelihood"] > 0 and first["reward/chunk"] >= 0
        # Generated beside it at every second step only.
        assert 0 < first["likelihood/mean"] < 1 and second["reward/chunk"] == 0
        assert second["reader/questions_asked"] < first["reader/questions_asked"]
    # What is reported is generated.
    assert json.loads((tmp_path / "evaluation.json").read_text())["after"]["estimates"]["chunk_score"]["n"] == 2


def test_chats_are_shared_out_to_their_askers():
    with FaultServer() as server, built(**servers(server.url)) as parts:
        one, other = (parts.answering.model("reader", config(**servers("x")).reader) for _ in range(2))
        first, second = (port.submit(Chat((Message("user", (text,)),), 5)) for port, text in ((one, "a"), (other, "b")))
        assert other.collect() == [(second, reply_to("b"))] and one.collect() == [(first, reply_to("a"))]
