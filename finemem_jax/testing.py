"""Makes phrases for the tokenizer of the smoke test: whole operations, so that even random weights write valid ones."""

from __future__ import annotations

from finemem_jax import input_pipeline
from finemem_jax.config.sections import Config
from finemem_jax.memory import operations
from finemem_jax.memory.build import dialect
from finemem_jax.types import CORE, EPISODIC, SEMANTIC, Action, Operation

# How many of each call the tests' tokenizer knows; together with the bytes, 384 tokens.
_TEST_INSERTS, _TEST_UPDATES, _TEST_DELETES, _TEST_OTHERS = 80, 24, 12, 10


def operation_phrases(config: Config) -> list[str]:
    """Returns whole operations for the tests' tokenizer, so that even random weights write some.

    What they write down are questions of the first streams with their answers, by turns of training and held-out ones:
    for each stream some help, and most do not.
    """
    splits = [_facts(config, split) for split in ("train", "test")]
    facts = [fact for pair in zip(*splits, strict=False) for fact in pair] or ["nothing is known"]
    calls = dialect(config)
    typed = calls.layout == "typed"

    def kind(i: int) -> str:
        return (SEMANTIC, EPISODIC)[i % 2] if typed else ""

    def fact(i: int) -> str:
        return facts[i % len(facts)]

    written = [Operation(Action.INSERT, fact(i), None, kind(i)) for i in range(_TEST_INSERTS)]
    written += [Operation(Action.UPDATE, f"{fact(7 * i)} (now)", 1 + i % 4, kind(i)) for i in range(_TEST_UPDATES)]
    written += [Operation(Action.DELETE, "", 1 + i % 4, kind(i)) for i in range(_TEST_DELETES)]
    others = [Operation(Action.UPDATE, fact(3 * i), None, CORE) for i in range(_TEST_OTHERS)]
    written += others if typed else [Operation(Action.SKIP)] * _TEST_OTHERS
    return [f"{operations.render(operation, calls)}\n" for operation in written]


def _facts(config: Config, split: str) -> list[str]:
    source = input_pipeline.load_split(config, split)
    facts: list[str] = []
    for index in range(len(source)):
        facts += [f"{q.text} {q.answers[0]}"[:200] for chunk in source[index].chunks for q in chunk.questions]
        if len(facts) >= _TEST_INSERTS:
            break
    # Over and over, so that a split with few streams has as many phrases as the other; numbered, since a memory refuses
    # what it already holds, and random weights would write little that is valid.
    return [f"{facts[i % len(facts)]} ({i // len(facts) + 1})" for i in range(_TEST_INSERTS)] if facts else []
