"""Tests of finemem_jax/questions/prompts.py: what the writer and the verifiers of questions are shown."""

import json

import pytest

from finemem_jax.questions import prompts, proposals
from finemem_jax.questions.proposals import Proposal


@pytest.mark.parametrize("num_examples", [0, 1])
def test_prompts_by_hand(num_examples):
    roles = ["system", *["user", "assistant"] * num_examples, "user"]
    made = (
        prompts.generator("Ana moved.", 7, num_examples),
        prompts.verifier("Ana moved.", "Who moved?", num_examples),
        prompts.closed_book("Who moved?", num_examples),
    )
    assert [message.role for messages in made for message in messages] == roles * 3
    assert [messages[-1].parts for messages in made] == [
        ("New text:\nAna moved.\n\n", "Write 7 questions about this text, one JSON object per line."),
        ("New text:\nAna moved.\n\n", "Question: Who moved?"),
        ("Question: Who moved?",),
    ]
    systems = (
        prompts.GENERATOR_SYSTEM,
        prompts.VERIFIER_SYSTEM,
        prompts.CLOSED_BOOK_SYSTEM,
    )
    assert tuple(messages[0].parts for messages in made) == tuple((system,) for system in systems)


def test_what_prompts_share_comes_first():
    first, second = (prompts.verifier("Ana moved.", question, 1) for question in ("Who?", "What?"))
    assert first[:-1] == second[:-1] and first[-1].parts[0] == second[-1].parts[0]
    assert prompts.generator("x", 3, 1)[:-1] == prompts.generator("y", 3, 1)[:-1]
    assert prompts.closed_book("Who?", 1)[:-1] == prompts.closed_book("What?", 1)[:-1]


def test_the_examples_pass_the_filters():
    text, proposed = prompts.GENERATOR_EXAMPLE
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in proposed]
    assert prompts.generator(text, 3, 1)[2].parts[0] == "\n".join(lines)
    assert proposals.parse(prompts.generator(text, 3, 1)[2].parts[0]) == list(proposed)
    for i, pair in enumerate(proposed):
        assert proposals.text_flaw(Proposal(*pair), text, 5) == ""
        assert not any(proposals.near_duplicates(pair, other, 0.8) for other in proposed[:i])
    assert (prompts.VERIFIER_EXAMPLE[1:]) in proposed
