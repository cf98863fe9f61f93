"""A memory agent whose manager writes down what it reads, word for word, and whose reader answers with the evidence.

No JAX, so that it is there at once. As a program it is `finemem_jax.serve` with this agent instead of a model.
"""

from finemem_jax import serve
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.operations import render
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.reading import reader
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.serving import agent
from finemem_jax.types import Action, Completion, Operation

TOKENS = ByteTokenizer()
ENVIRONMENT = Environment(TOKENS, 0, view_tokens=100, chunk_tokens=60, long_chunk="split", repair_json=False)
OPTIONS = RolloutOptions(1, 100, 0.0, "lucene", 3, 1.0, 50)


def chunk_of(request):
    """The text that a request to the manager is about."""
    return TOKENS.decode(request.group_prefix).removeprefix("New text:\n").strip()


def completion(*operations):
    """What a sampler returns for a manager that wrote these."""
    ids = TOKENS.encode("\n".join(render(operation) for operation in operations))
    return Completion((*ids, *TOKENS.end_ids), (0.0,) * (len(ids) + 1), "stop", 0)


def write_down(requests):
    """A manager that stores every text as it is."""
    return [completion(Operation(Action.INSERT, chunk_of(request))) for request in requests]


def make(store=None, policy=write_down, answer=None, waits=True):
    """An agent with this manager and reader."""
    players = Players(ENVIRONMENT, policy, answer or reader.evidence())
    return agent.MemoryAgent(players, OPTIONS, store, waits=waits)


if __name__ == "__main__":
    serve._load = lambda options: make(options.store)
    serve.main()
