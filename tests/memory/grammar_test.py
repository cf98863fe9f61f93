"""Tests of finemem_jax/memory/grammar.py: what is written under the grammar parses, and operations may be written."""

# No request here is refused, unless a test says so: every result has `ids`.
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="constrained decoding needs llguidance")

from finemem_jax.config import sections
from finemem_jax.memory import grammar as grammar_lib
from finemem_jax.memory import operations
from finemem_jax.memory.operations import Dialect
from finemem_jax.models import decoder, presets
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.sampling.sampler import Sampler
from finemem_jax.types import CORE, EPISODIC, SEMANTIC, Action, Malformed, Operation, Request

TOKENS = ByteTokenizer(['{"name": "memory_insert", "arguments": {"content": "', "memory", "content"])
FLAT, TYPED = Dialect(), Dialect("typed")


def allowed(matcher):
    words = matcher.mask()
    return [v for v in range(TOKENS.vocab_size) if words[v // 32] >> (v % 32) & 1]


def follow(grammar, text):
    """Whether a text may be written, and may end there."""
    matcher = grammar.start()
    for token in TOKENS.encode(text):
        if token not in allowed(matcher):
            return False
        matcher.advance(token)
    return set(TOKENS.end_ids) <= set(allowed(matcher))


@pytest.fixture(scope="module")
def flat():
    return grammar_lib.Grammar(TOKENS, grammar_lib.of_operations(FLAT))


@pytest.fixture(scope="module")
def typed():
    return grammar_lib.Grammar(TOKENS, grammar_lib.of_operations(TYPED))


FLAT_OPERATIONS = [
    Operation(Action.INSERT, "Ana lives in Oslo."),
    Operation(Action.UPDATE, 'quotes ", \\ and a\nnewline, é 中', 3),
    Operation(Action.DELETE, "", 17),
]
TYPED_OPERATIONS = [
    Operation(Action.INSERT, "Ana lives in Oslo.", None, SEMANTIC),
    Operation(Action.UPDATE, "On Monday it rained.", 3, EPISODIC),
    Operation(Action.UPDATE, "who the user is", None, CORE),
    Operation(Action.DELETE, "", 2, EPISODIC),
]


def test_every_operation_can_be_written(flat, typed):
    for grammar, dialect, all_ in ((flat, FLAT, FLAT_OPERATIONS), (typed, TYPED, TYPED_OPERATIONS)):
        written = [operations.render(operation, dialect) for operation in all_]
        for text in (*written, "\n".join(written), "\n".join(written) + "\n"):
            assert follow(grammar, text), text
    assert follow(flat, operations.render(Operation(Action.SKIP)))


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", '{"name": "memory_insert"}', '{"name": "memory_insert", "arguments": {}}',
        '{"name": "memory_insert", "arguments": {"content": ""}}', '{"name": "memory_fly", "arguments": {}}',
        '{"name": "memory_delete", "arguments": {"id": -1}}', '{"name": "memory_delete", "arguments": {"id": 1}} and',
        '{"name": "memory_delete", "arguments": {"id": 1}', '{"name": "memory_skip", "arguments": {}}\n' * 2,
    ],
)  # fmt: skip
def test_what_is_no_operation_cannot_be_written(flat, text):
    assert not follow(flat, text)


def test_random_walks_parse(flat, typed):
    """At every token a random choice of what is allowed."""
    rng = np.random.default_rng(0)
    for grammar, dialect in ((flat, FLAT), (typed, TYPED)):
        for _ in range(15):
            matcher, ids = grammar.start(), []
            while len(ids) < 400:
                choices = allowed(matcher)
                # Quotes and braces are chosen often, so that it comes to an end.
                short = [v for v in choices if v in (*TOKENS.end_ids, *b'"}]0123')]
                token = int(rng.choice(short if short and rng.random() < 0.5 else choices))
                if token in TOKENS.end_ids:
                    break
                ids.append(token)
                matcher.advance(token)
            else:
                continue
            written = operations.parse(TOKENS.decode(ids), dialect=dialect)
            assert not [(one.reason, one.text) for one in written if isinstance(one, Malformed)]


def test_a_sampler_draws_what_is_allowed_and_others_are_as_they_were(flat):
    """Constrained and free requests in the same slots."""
    config = presets.preset("tiny")
    params = decoder.init(config, 0)
    params |= {"embedding": params["embedding"] * 15}
    grammar = grammar_lib.Grammar(TOKENS, grammar_lib.of_operations(FLAT), config.vocab_size)

    def sampler(**settings):
        shape = {"num_slots": 3, "steps_per_call": 4, "prefill_tokens": 16} | settings
        return Sampler(config, params, TOKENS.end_ids, settings=sections.Sampler(**shape))

    def request(i, constraint, temperature):
        return Request((11, 12, 13, 100 + i), (2, 4), 40, temperature, (0, i), constraint=constraint)

    free = [request(i, None, 1.0) for i in range(4)]
    bound = [request(i, grammar, float(i % 2)) for i in range(4)]
    got = sampler().generate([one for pair in zip(bound, free, strict=True) for one in pair])
    expected = sampler().generate(free)
    assert [c.ids for c in got[1::2]] == [c.ids for c in expected]
    for completion in got[::2]:
        ids = [v for v in completion.ids if v not in TOKENS.end_ids]
        matcher = grammar.start()
        for token in ids:
            assert token in allowed(matcher)
            matcher.advance(token)
    # What they drew is likelier among what is allowed than among all; greedy ones report the model's own.
    for completion in got[2::4]:
        assert (np.array(completion.log_probs) >= np.array(completion.raw_log_probs) - 1e-5).all()
        assert max(np.subtract(completion.log_probs, completion.raw_log_probs)) > 0.1
    assert [c.ids for c in sampler(num_slots=1).generate(bound)] == [c.ids for c in got[::2]]


def test_a_wire_without_a_grammar_is_refused():
    with pytest.raises(ValueError, match=r"manager\.tool_call_format='hermes'; set manager\.constrained=False"):
        grammar_lib.of_operations(Dialect("flat", "hermes"))


def test_a_faulty_grammar_is_refused():
    with pytest.raises(ValueError, match="llguidance does not take the grammar"):
        grammar_lib.Grammar(TOKENS, "start: nowhere")
