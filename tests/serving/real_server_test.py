"""A run whose reader is a real OpenAI-compatible server; skipped unless FINEMEM_SERVER names one.

pip install 'llama-cpp-python[server]'
python -m llama_cpp.server --model SmolLM2-135M-Instruct.Q4_1.gguf --model_alias smollm2 --port 8123
FINEMEM_SERVER=http://localhost:8123/v1 FINEMEM_SERVER_MODEL=smollm2 python -m pytest tests/real_server_test.py
"""

import os

import pytest

import smoke_run
from finemem_jax.clients.endpoint import Endpoint, EndpointError
from finemem_jax.evaluation import held_out
from finemem_jax.runtime import files, workers
from finemem_jax.types import Chat, Message

URL = os.environ.get("FINEMEM_SERVER", "")
MODEL = os.environ.get("FINEMEM_SERVER_MODEL", "smollm2")
pytestmark = pytest.mark.skipif(not URL, reason="set FINEMEM_SERVER to the URL of an OpenAI-compatible server")


def config(**changes):
    settings = {"reader.kind": "server", "servers.main.urls": URL, "servers.main.model": MODEL}
    return smoke_run.config(**settings | {"servers.main.concurrency": 4, "data.num_test": 2} | changes)


def chat(text, **more):
    return Chat((Message("system", ("Reply with one word.",)), Message("user", (text,))), 8, **more)


def test_it_replies():
    with Endpoint(config().servers["main"]) as client:
        chats = [chat(f"What colour has grass in garden {i}?") for i in range(12)]
        first, second = (workers.run_all(client, chats) for _ in range(2))
        assert all(first) and first == second, "greedy replies are the same each time"
        assert workers.run_all(client, [chat("Say a number.", temperature=1.0, seed=s) for s in range(3)])
        stats = client.take_stats()
        assert stats.answered == 27 and stats.new_tokens > 0 and stats.prompt_tokens > 27


def test_what_it_cannot_answer():
    more = {"extra": '{"top_p": "nucleus"}', "total_seconds": 2.0}
    settings = config(**{f"servers.main.{name}": value for name, value in more.items()})
    with Endpoint(settings.servers["main"]) as client:
        client.submit(chat("x"))
        # Some servers call this their own error (500), and are asked again.
        with pytest.raises(EndpointError, match="answered [45].*(Asking again|the same command)"):
            client.collect()


def test_a_run(tmp_path):
    settings = config(**{"train.num_steps": 1, "train.evaluate_first": False, "reader.max_new_tokens": 8})
    smoke_run.run(tmp_path, settings)
    (metrics,) = files.read_metrics(tmp_path)
    assert metrics["reader/servers_answered"] > 0 and metrics["reader/unscored_fraction"] == 0
    assert metrics["reader/questions_asked"] == metrics["reader/servers_answered"]
    assert "after" in held_out.read_evaluations(tmp_path)
