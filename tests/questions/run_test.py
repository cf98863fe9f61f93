"""Tests of finemem_jax/questions/run.py: the command makes a dataset, stops and goes on, and training reads it."""

import json
import re

import pytest

import programs
import smoke_run
from fault_server import FaultServer
from finemem_jax.evaluation import held_out
from finemem_jax.questions import run
from finemem_jax.questions.costs import BudgetError


def replied(question):
    """What a model that knows its task says: proposals about a text, or the word after "is" as an answer."""
    if question.startswith("New text:"):
        words = [word.strip(".,") for word in question.split() if word.strip(".,").isalpha()]
        names = sorted({word for word in words if word[0].isupper() and word not in ("New", "Day")})
        return "\n".join(json.dumps({"question": f"Who of them begins with {n[:3]}?", "answer": n}) for n in names[:6])
    return next((word for word in question.split() if word.startswith(question.rstrip("?")[-3:])), "nobody")


def settings(url, **changes):
    of_servers = {"servers.main.urls": url, "servers.main.model": "m"}
    of_servers |= {f"questions.{who}.kind": "server" for who in ("generator", "verifier")}
    small = {"data.num_train": 3, "data.num_test": 2, "questions.keep": 2, "questions.proposals": 4}
    return of_servers | small | changes


def read(workdir, split):
    lines = (workdir / "questions" / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def server(monkeypatch):
    # The command asks for questions in one message, of which the fault server sees the whole.
    with FaultServer(reply=replied) as running:
        yield running


def test_questions_are_made_and_trained_on(tmp_path, server):
    lines = run.run(smoke_run.config(**settings(server.url)), tmp_path / "asked")
    assert "questions kept of" in lines[0] and "report_train.md" in lines[1]
    assert lines[-1].endswith(f"--config.data.source_dir={tmp_path / 'asked' / 'questions'}")
    assert [len(read(tmp_path / "asked", split)) for split in ("train", "test")] == [3, 2]
    made = [
        question
        for stream in read(tmp_path / "asked", "train")
        for c in stream["chunks"]
        for question in c["questions"]
    ]
    assert made and {question["kind"] for question in made} == {"generated"}
    # Another time, nothing is asked.
    asked = server.asked.total()
    run.run(smoke_run.config(**settings(server.url)), tmp_path / "asked")
    assert server.asked.total() == asked
    changes = {"data.name": "streams", "data.source_dir": str(tmp_path / "asked" / "questions"), "data.num_train": 0}
    smoke_run.run(tmp_path / "trained", smoke_run.config(**changes, **{"train.num_steps": 1, "data.num_test": 0}))
    assert held_out.read_evaluations(tmp_path / "trained")["after"]["estimates"]["chunk_score"]["n"] > 0


def test_too_small_a_budget_asks_nothing(tmp_path, server):
    with pytest.raises(ValueError, match=r"questions.max_tokens=10 will not do"):
        run.run(smoke_run.config(**settings(server.url, **{"questions.max_tokens": 10})), tmp_path)
    assert not server.asked


def test_a_budget_that_is_used_up_can_be_raised(tmp_path, server):
    """By the same command in the same workdir; what was paid for is not asked again."""
    few = settings(server.url, **{"questions.splits": "train", "questions.rounds": 9, "questions.keep": 9})
    estimated = {"questions.max_tokens": 1}
    with pytest.raises(ValueError, match="is estimated to take") as refused:
        run.run(smoke_run.config(**few | estimated), tmp_path)
    tokens = int(re.search(r"to take ([\d,]+) tokens", str(refused.value))[1].replace(",", ""))
    with pytest.raises(BudgetError, match="is used up"):
        run.run(smoke_run.config(**few | {"questions.max_tokens": tokens}), tmp_path)
    asked = server.asked.total()
    assert asked > 0 and not (tmp_path / "questions" / "train.jsonl").exists()
    run.run(smoke_run.config(**few | {"questions.max_tokens": 100 * tokens}), tmp_path)
    assert len(read(tmp_path, "train")) == 3 and server.asked.total() > asked


def test_the_command(tmp_path, server):
    flags = [f"--config.{name}={value}" for name, value in settings(server.url).items()]
    command = ["--mode=questions", f"--workdir={tmp_path}", *flags]
    server.down = True
    stopped = programs.main(*command, "--config.servers.main.total_seconds=0.5")
    assert stopped.returncode == 75 and server.url in stopped.stderr and "Traceback" not in stopped.stderr
    server.down = False
    done = programs.main(*command)
    assert done.returncode == 0, done.stderr
    assert "tokens for" in done.stdout and "--config.data.name=streams" in done.stdout
    assert (tmp_path / "questions" / "report_test.md").exists()


def test_the_frozen_model_may_do_both(tmp_path):
    changes = {"data.num_train": 2, "data.num_test": 2, "questions.proposal_tokens": 12, "questions.answer_tokens": 4}
    changes |= {"questions.splits": "test", "questions.rounds": 1, "questions.proposals": 5}
    lines = run.run(smoke_run.config(**changes), tmp_path)
    # Random weights propose nothing that is a question.
    assert lines[0].startswith("test") and " 0 questions kept" in lines[0]
    assert len(read(tmp_path, "test")) == 2 and not (tmp_path / "questions" / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions.splits": "dev"}, "split"),
        ({"questions.keep": 0}, "questions.keep must be at least 1"),
        ({"questions.metric": "judge"}, "questions.metric must be one of"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run.run(smoke_run.config(**changes), tmp_path)
    assert not (tmp_path / "questions").exists()
