"""Tests of finemem_jax/reading/likelihood.py: probabilities are those of plain rows, and greedy is greedy."""

# No request here is refused, unless a test says so: every result has `ids`.
# pyright: reportAttributeAccessIssue=false

import dataclasses
import math
import random

import jax
import numpy as np
import pytest

from experiments import smollm2_135m
from finemem_jax import build, input_pipeline
from finemem_jax import config as config_lib
from finemem_jax.clients import chat
from finemem_jax.config import sections
from finemem_jax.models import decoder, presets
from finemem_jax.models.tokenizer import ByteTokenizer, EncodedChat
from finemem_jax.reading import likelihood, reader
from finemem_jax.reading.likelihood import LEAST_LOG_PROB, Likelihoods
from finemem_jax.reading.reader import LikelihoodQuery, Query
from finemem_jax.runtime import compilation, workers
from finemem_jax.sampling.sampler import Sampler
from finemem_jax.types import Likelihood, Request

TINY = presets.preset("tiny")
TOKENS = ByteTokenizer()
OPTIONS = sections.Reader(max_new_tokens=8, temperature=0.0, num_examples=0)


def random_params(seed=0):
    params = decoder.init(TINY, seed)
    # So that some tokens are likelier than others, and greedy ones clearly so.
    return params | {"embedding": params["embedding"] * 15}


@pytest.fixture(scope="module")
def params():
    return random_params()


def make_sampler(params, end_ids=TOKENS.end_ids):
    return Sampler(TINY, params, end_ids, settings=sections.Sampler(num_slots=4, steps_per_call=4, prefill_tokens=32))


def prompt(query):
    return chat.encode(TOKENS, reader.to_chat(query, OPTIONS))


def likelihoods(params, together=256, most=1024, tokens=TOKENS, end_ids=TOKENS.end_ids, prompt=prompt):
    return Likelihoods(make_sampler(params, end_ids).engine, tokens, prompt, tokens_together=together, max_length=most)


@jax.jit
def _log_probs(params, tokens, length):
    (states,) = decoder.hidden_states(TINY, params, [tokens[None]], lengths=[length[None]])
    return jax.nn.log_softmax(states[0] @ params["embedding"].T)


def by_hand(params, query, text):
    """Log-probability of an answer and its end, and whether each of its tokens is the likeliest, from a plain row."""
    ids, answer = prompt(query).ids, TOKENS.encode(text)
    row = [*ids, *answer]
    log_probs = np.asarray(_log_probs(params, np.pad(row, (0, 512 - len(row))), np.asarray(len(row))), np.float64)
    places = range(len(ids) - 1, len(row))
    total = sum(log_probs[place, token] for place, token in zip(places, answer, strict=False))
    end = np.log(np.exp(log_probs[len(row) - 1, list(TOKENS.end_ids)]).sum())
    return total + end, len(answer) + 1


QUERY = Query("Where does Ana live?", ("Ana moved to Oslo.", "It rains."))
# What tokenizers treat specially at the start of a text.
GOLDS = ("Oslo", "14", '"Oslo"', "'s", "漢字", "é", "-3.5", "(a)", "🎉 x", "<|end|>", "\\boxed{3}")


@pytest.mark.parametrize("gold", GOLDS)
def test_of_one_gold(params, gold):
    ((_, found),) = collected(likelihoods(params), [LikelihoodQuery(QUERY, (gold,))])
    total, count = by_hand(params, QUERY, gold)
    assert found.log_prob == pytest.approx(total / count, abs=1e-4)
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-3) and found.closed is None


def collected(worker, claims):
    for claim in claims:
        worker.submit(claim)
    found = []
    while some := worker.collect():
        found += some
    return sorted(found)


def test_several_golds_share_a_prompt_and_do_not_see_each_other(params):
    worker = likelihoods(params)
    ((_, found),) = collected(worker, [LikelihoodQuery(QUERY, GOLDS)])
    each = [total / count for total, count in (by_hand(params, QUERY, gold) for gold in GOLDS)]
    assert found.log_prob == pytest.approx(max(each), abs=1e-4)
    assert len(set(each)) == len(GOLDS)
    # The prompt was computed once, for all of them, and its shared prefix stands apart.
    own = len(prompt(QUERY).ids) - prompt(QUERY).cuts[0]
    assert worker.stats.tokens == own + sum(len(TOKENS.encode(gold)) for gold in GOLDS)


def test_a_closed_set(params):
    choices = ("1", "2", "30", "17")
    totals = {text: by_hand(params, QUERY, text)[0] for text in (*choices, "5")}
    of = {gold: math.exp(totals[gold]) / sum(math.exp(totals[c]) for c in choices) for gold in choices}
    claims = [
        LikelihoodQuery(QUERY, ("17",), choices),
        LikelihoodQuery(QUERY, (" 1 ", "30"), choices),
        LikelihoodQuery(QUERY, ("5",), choices),
    ]
    (_, one), (_, two), (_, other) = collected(likelihoods(params), claims)
    assert one.closed == pytest.approx(of["17"], rel=1e-3) and one.value == one.closed
    assert two.closed == pytest.approx(of["1"] + of["30"], rel=1e-3)
    # A gold answer that is none of the choices is one more.
    mass = math.exp(totals["5"])
    assert other.closed == pytest.approx(mass / (mass + sum(math.exp(totals[c]) for c in choices)), rel=1e-3)
    assert sum(of.values()) == pytest.approx(1)


def test_blank_golds_are_matched_by_nothing(params):
    claims = [
        LikelihoodQuery(QUERY, ("  ", "")),
        LikelihoodQuery(QUERY, ("",), ("a", "b")),
        LikelihoodQuery(QUERY, ("", "Oslo")),
    ]
    (_, open_), (_, closed), (_, some) = collected(likelihoods(params), claims)
    assert open_ == Likelihood(LEAST_LOG_PROB, False) and open_.value < 1e-40
    assert closed == Likelihood(LEAST_LOG_PROB, False, 0.0) and closed.value == 0
    assert some.log_prob > LEAST_LOG_PROB


class Numbers:
    """A tokenizer whose texts are token ids; all that a likelihood needs of one."""

    def encode(self, text):
        return [int(word) for word in text.split()]


def test_greedy_is_what_greedy_decoding_gives(params):
    """500 questions: where every argmax matches, and only there, decoding at temperature 0 writes the gold answer."""
    rng = random.Random(0)
    ends = tuple(range(200, 384))  # So many that most answers end soon.
    prompts = {
        f"q{i}": EncodedChat(ids := tuple(rng.randrange(90) for _ in range(6 + rng.randrange(20))), (3, len(ids)))
        for i in range(500)
    }
    prompts = {name: dataclasses.replace(p, ids=(1, 2, 3, *p.ids[3:])) for name, p in prompts.items()}
    requests = [Request(p.ids, p.cuts, 16, 0.0, (0, 0)) for p in prompts.values()]
    answers = [completion.ids for completion in make_sampler(params, ends).generate(requests)]
    golds = []
    for answer in answers:
        # Of an answer that was cut off, nobody knows how it would have gone on.
        words = [*answer[:-1]] if answer[-1] in ends else [*answer[:3]]
        if rng.random() < 0.5:  # Nearly right: another token, one more, one less, or another answer altogether.
            change = rng.randrange(4)
            if change == 0 and words:
                words[rng.randrange(len(words))] = rng.randrange(90)
            elif change == 1:
                words.append(rng.randrange(90))
            elif change == 2:
                words = words[:-1]
            else:
                words = list(rng.choice(answers)[:3])
        # No text has the tokens that end a turn.
        golds.append(tuple(word for word in words if word not in ends) or (5,))
    expected = [answer[:-1] == gold and answer[-1] in ends for answer, gold in zip(answers, golds, strict=True)]
    worker = likelihoods(params, tokens=Numbers(), end_ids=ends, prompt=lambda query: prompts[query.question])
    claims = [LikelihoodQuery(Query(f"q{i}", ()), (" ".join(map(str, gold)),)) for i, gold in enumerate(golds)]
    assert [found.greedy for found in workers.run_all(worker, claims)] == expected
    assert 60 < sum(expected) < 440


def test_company_and_order_do_not_matter(params):
    rng = random.Random(1)
    claims = [
        LikelihoodQuery(
            Query("x" * rng.randrange(60), ("e" * rng.randrange(90),) * rng.randrange(3)), (rng.choice(GOLDS),)
        )
        for _ in range(40)
    ]
    together = workers.run_all(likelihoods(params), claims)
    alone = [workers.run_all(likelihoods(params, together=1), [claim])[0] for claim in claims[:6]]
    shuffled = rng.sample(range(40), 40)
    again = workers.run_all(likelihoods(params), [claims[i] for i in shuffled])
    for got, expected in ((alone, together[:6]), (again, [together[i] for i in shuffled])):
        np.testing.assert_allclose([x.log_prob for x in got], [x.log_prob for x in expected], rtol=0, atol=1e-4)
        assert [x.greedy for x in got] == [x.greedy for x in expected]


def test_equal_claims_are_computed_once(params):
    worker = likelihoods(params)
    remembering = workers.Memoized(worker)
    null = LikelihoodQuery(Query("Where does Ana live?", ()), ("Oslo",))
    assert len(set(workers.run_all(remembering, [null, LikelihoodQuery(QUERY, ("Oslo",)), null]))) == 2
    workers.run_all(remembering, [null])
    assert worker.take_stats().claims == 2 and worker.take_stats().claims == 0


def test_nothing_is_computed_for_who_does_not_wait(params):
    worker = likelihoods(params)
    request_ids = [worker.submit(LikelihoodQuery(QUERY, (gold,))) for gold in ("a", "", "b")]
    assert [request_id for request_id, _ in worker.collect(wait=False)] == request_ids[1:2]
    assert worker.collect(wait=False) == []
    assert worker.cancel(request_ids[0]) and not worker.cancel(request_ids[0]) and not worker.cancel(request_ids[1])
    assert [request_id for request_id, _ in worker.collect()] == request_ids[2:] and worker.collect() == []


def test_who_is_called_away_computes_nothing(params):
    worker = likelihoods(params)
    request_id = worker.submit(LikelihoodQuery(QUERY, ("a",)))
    worker.poll = lambda: True
    assert worker.collect() == [] and not worker.stats.tokens
    worker.poll = lambda: None
    assert [done for done, _ in worker.collect()] == [request_id]


def test_what_the_model_cannot_take(params):
    worker = likelihoods(params, most=len(prompt(QUERY).ids) + 4)
    worker.submit(LikelihoodQuery(QUERY, ("Oslo",)))
    with pytest.raises(ValueError, match=r"'Where does Ana live\?'.*lower memory.top_k"):
        worker.submit(LikelihoodQuery(QUERY, ("Oslos",)))


def test_nothing_is_compiled_after_the_warm_up(params):
    worker, steps = likelihoods(params, together=128), []
    worker.warm_up(prompt(QUERY).cuts[0], 200, lambda done, total: steps.append((done, total)))
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1]
    before = compilation.counts().programs
    rng = random.Random(0)
    queries = [Query("q" * rng.randrange(60), ("e" * rng.randrange(60),)) for _ in range(30)]
    workers.run_all(worker, [LikelihoodQuery(query, ("Oslo", "Bergen")) for query in queries])
    assert compilation.counts().programs == before


def test_rows_fall_into_few_lengths(params):
    worker = likelihoods(params)
    lengths = {1: 32, 32: 32, 33: 48, 48: 48, 49: 64, 65: 80, 97: 112, 128: 128, 129: 160, 300: 320, 512: 512, 513: 640}
    assert {longest: likelihood._length(longest) for longest in lengths} == lengths
    assert [worker._rows(length) for length in (32, 96, 384)] == [8, 2, 1]


@pytest.mark.slow
def test_the_real_model_and_its_tokenizer():
    """SmolLM2: greedy match is what greedy decoding writes, and golds keep their own tokens, however they begin."""
    chosen = {"reader.temperature": 0.0, "likelihood.chunk_share": "0.5"}
    settings = config_lib.changed(config_lib.parse(smollm2_135m.get_config()), chosen)
    parts = build.build(settings)
    streams = input_pipeline.streams(settings, "train", parts.environment)
    asked = [q for i in range(24) for chunk in streams[i].chunks for q in chunk.questions][:40]
    texts = [tuple(streams[i // 2].chunks[0].text.split("\n")[:2]) for i in range(len(asked))]
    queries = [Query(question.text, evidence) for question, evidence in zip(asked, texts, strict=True)]
    answers = workers.run_all(parts.answering.answer, queries)
    claims = [LikelihoodQuery(query, (answer,)) for query, answer in zip(queries, answers, strict=True)]
    wrong = [LikelihoodQuery(query, (f"{answer}!",)) for query, answer in zip(queries, answers, strict=True)]
    written = [parts.tokenizer.encode(answer) for answer in answers]
    # One that was cut off would have gone on; of the others, greedy decoding wrote just this.
    ended = [len(ids) < settings.reader.max_new_tokens for ids in written]
    greedy = [found.greedy for found in workers.run_all(parts.answering.likelihood_scorer, claims)]
    assert sum(ended) > 15 and [g for g, e in zip(greedy, ended, strict=True) if e] == [True] * sum(ended)
    assert not any(found.greedy for found in workers.run_all(parts.answering.likelihood_scorer, wrong))
    model, tokens = parts.model, parts.tokenizer
    for gold in GOLDS:
        prompt_ids, ids = parts.answering.prompt(queries[0]).ids, tokens.encode(gold)
        assert tokens.decode(ids) == gold
        row = np.pad([*prompt_ids, *ids], (0, 320 - len(prompt_ids) - len(ids)))
        (states,) = decoder.hidden_states(
            model, parts.params, [row[None]], lengths=[np.array([len(prompt_ids) + len(ids)])]
        )
        logits = np.asarray(states[0, len(prompt_ids) - 1 : len(prompt_ids) + len(ids)] @ parts.params["embedding"].T)
        log_probs = np.asarray(jax.nn.log_softmax(logits.astype(np.float64)))
        end = np.log(np.exp(log_probs[-1, list(tokens.end_ids)]).sum())
        mean = (sum(log_probs[i, token] for i, token in enumerate(ids)) + end) / (len(ids) + 1)
        (found,) = workers.run_all(parts.answering.likelihood_scorer, [LikelihoodQuery(queries[0], (gold,))])
        assert found.log_prob == pytest.approx(mean, abs=2e-3), gold
