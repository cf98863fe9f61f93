"""Tests of finemem_jax/questions/pipeline.py with scripted workers: what is asked and kept."""

import dataclasses
import json
import random
import re

import pytest

from finemem_jax.clients import reply_cache
from finemem_jax.config.sections import Prices, QuestionModel
from finemem_jax.questions import costs, prompts, proposals
from finemem_jax.questions import pipeline as pipeline_lib
from finemem_jax.questions import report as question_report
from finemem_jax.questions.costs import BudgetError, Tokens
from finemem_jax.questions.options import QuestionOptions
from finemem_jax.questions.pipeline import Models, Pipeline
from finemem_jax.reading import scoring
from finemem_jax.runtime import workers
from finemem_jax.types import Chat, Chunk, Malformed, Question, Stream, to_json

# --------------------------------------------------------------------------------------
# A world of facts, and models that know it
# --------------------------------------------------------------------------------------

PEOPLE = ("Ana", "Omar", "Priya", "Nadia", "Tom", "Ines", "Jo", "Kim")
THINGS = ("city", "job", "pet", "tool", "song", "meal", "book", "game")


def value_of(person, thing, stream):
    return f"{person}{thing}{stream}".lower()


def fact_streams(num_streams, num_chunks, facts=6):
    """Streams whose chunks state facts, "Ana's city is anacity0." among them, none of them twice."""
    streams = []
    for s in range(num_streams):
        pairs = [(p, t) for p in PEOPLE for t in THINGS]
        random.Random(s).shuffle(pairs)
        chunks = []
        for c in range(num_chunks):
            of_chunk = pairs[c * facts : (c + 1) * facts]
            chunks.append(Chunk(" ".join(f"{p}'s {t} is {value_of(p, t, s)}." for p, t in of_chunk)))
        asked = (Question("Who is there?", ("Ana",), gold_steps=(0,)),)
        streams.append(Stream(f"s{s}", "made up", tuple(chunks), asked, "AR"))
    return streams


_FACT = re.compile(r"(\w+)'s (\w+) is (\w+)\.")


def line(question, answer):
    return json.dumps({"question": question, "answer": answer})


def text_of(chat):
    """The chunk that a chat is about, its own and not the example's."""
    return chat.messages[-1].parts[0].removeprefix("New text:\n").removesuffix("\n\n")


def generate(chat):
    """Proposes what the chunk states, and some of what filters are for; another seed, another part of it."""
    rng = random.Random(f"{text_of(chat)}{chat.seed}")
    facts = _FACT.findall(text_of(chat))
    lines = []
    for person, thing, value in rng.sample(facts, len(facts) * 2 // 3):
        lines.append(line(f"What is the {thing} of {person}?", value))
        if rng.random() < 0.5:
            lines.append(line(f"What is the {thing} of {person} now?", value))
    lines += [
        line("What does the text say?", facts[0][2]),
        line(f"Is {facts[0][2]} a {facts[0][1]}?", facts[0][2]),
        line(f"Which {facts[1][1]} has {facts[1][0]}?", "nobodyknows"),
        "Here you are:",
    ]
    rng.shuffle(lines)
    return "\n".join(lines)


def verify(chat):
    """Reads the chunk, and is wrong now and then; knows the job of everybody without a chunk."""
    *parts, question = chat.messages[-1].parts
    found = re.search(r"What is the (\w+) of (\w+)(?: now)?\?", question)
    if not parts:
        return " ".join(value_of(found[2], found[1], s) for s in range(9)) if found and found[1] == "job" else "no idea"
    known = {(person, thing): value for person, thing, value in _FACT.findall(text_of(chat))}
    value = known.get((found[2], found[1]), "unknown") if found else "unknown"
    return "unknown" if sum(map(ord, question + value)) % 3 == 0 else f"It is {value}."


def batched(function, asked=None):
    def reply(chats):
        if asked is not None:
            asked.extend(chats)
        return list(map(function, chats))

    return workers.Batched(reply)


class Shuffled:
    """Replies to one chat a call, or to a few, in random order; sometimes it has some ready that nobody waited for."""

    def __init__(self, function, seed, most=1):
        self._function, self._random, self._most = function, random.Random(seed), most
        self.asked, self._waiting = [], {}
        self.most_waiting = 0

    def submit(self, chat):
        self.asked.append(chat)
        self._waiting[len(self.asked)] = chat
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        return len(self.asked)

    def collect(self, wait=True):
        if not (wait or self._random.random() < 0.3):
            return []
        count = min(len(self._waiting), self._random.randint(1, self._most))
        request_ids = self._random.sample(sorted(self._waiting), count)
        return [(request_id, self._function(self._waiting.pop(request_id))) for request_id in request_ids]

    def cancel(self, request_id):
        return self._waiting.pop(request_id, None) is not None


def count_tokens(text):
    return len(text.split())


def ask(streams, options=None, generator=None, verifier=None, **more):
    options = options or QuestionOptions(keep=3, proposals=8)
    progress = more.pop("progress", None)
    models = Models(generator or batched(generate), verifier or batched(verify), count_tokens, **more)
    pipeline = Pipeline(streams, options, models, progress=progress)
    return list(pipeline.run()), pipeline.report


def adds_up(report):
    assert report.proposed == report.kept + sum(report.rejected.values())
    assert report.chunks == report.full + report.partial + report.empty
    return True


def one_chunk(text, replies, answer=lambda question: "unknown", **settings):
    """Questions of one chunk, of a generator that replies so, round by round, and a verifier that is a function."""
    chosen = {"keep": 5, "rounds": len(replies)} | settings
    stream = Stream("one", "made up", (Chunk(text),))
    (got,), report = ask(
        [stream],
        QuestionOptions(**chosen),
        batched(lambda chat: replies[chat.seed]),
        batched(lambda chat: answer(chat.messages[-1].parts[-1].removeprefix("Question: "))),
    )
    assert adds_up(report)
    return [(q.text, *q.answers) for q in got.chunks[0].questions], report


# --------------------------------------------------------------------------------------
# The whole of it
# --------------------------------------------------------------------------------------


def test_chunks_get_questions_that_they_answer():
    streams = fact_streams(4, 3)
    got, report = ask(streams)
    assert adds_up(report) and report.kept > 20 and report.streams == 4 and report.chunks == 12
    for before, after in zip(streams, got, strict=True):
        assert dataclasses.replace(after, chunks=before.chunks) == before
        for t, (old, new) in enumerate(zip(before.chunks, after.chunks, strict=True)):
            assert old.text == new.text and len(new.questions) <= 3
            for question in new.questions:
                assert (question.kind, question.gold_steps, question.metric) == ("generated", (t,), "substring")
                assert scoring.supports(new.text, *question.answers)
    assert sum(len(chunk.questions) for stream in got for chunk in stream.chunks) == report.kept
    assert all(report.rejected[name] for name in ("malformed", "unsupported", "gives_away", "refers_to_text"))
    assert report.rejected["unanswerable"] and report.rejected["surplus"]


@pytest.mark.parametrize("closed_book", [False, True])
def test_the_order_of_replies_changes_nothing(closed_book):
    # The same facts again at the end of a stream, so that chunks have near-duplicates in common.
    streams = [
        dataclasses.replace(s, chunks=(*s.chunks, Chunk(s.chunks[0].text + " " + s.chunks[1].text)))
        for s in fact_streams(5, 4)
    ]
    options = QuestionOptions(keep=4, proposals=8, rounds=3, closed_book=closed_book, chunks_in_flight=7)
    proposing, verifying = [], []
    expected, report = ask(streams, options, batched(generate, proposing), batched(verify, verifying))
    assert adds_up(report) and report.rejected["duplicate"] and bool(report.rejected["closed_book"]) == closed_book
    assert max(chat.seed for chat in proposing) == 2
    for seed in range(12):
        generator, verifier = Shuffled(generate, seed, 1 + seed % 3), Shuffled(verify, -seed, 1 + seed % 2)
        got, other = ask(streams, dataclasses.replace(options), generator, verifier)
        assert got == expected and other == report
        assert sorted(map(repr, generator.asked)) == sorted(map(repr, proposing))
        assert sorted(map(repr, verifier.asked)) == sorted(map(repr, verifying))


def test_exactly_those_are_verified_that_would_be_one_by_one():
    """Against the plain loop that the pipeline stands for."""
    streams = fact_streams(6, 1, facts=12)
    options = QuestionOptions(keep=3, proposals=20, rounds=2)
    for stream in streams:
        verifying = []
        ((got,), _) = ask([stream], options, verifier=batched(verify, verifying))
        (chunk,) = stream.chunks
        kept, asked = [], []
        for seed in range(options.rounds):
            if len(kept) == options.keep:
                break
            reply = generate(Chat(tuple(prompts.generator(chunk.text, 20, 1)), 1, seed=seed))
            for proposal in proposals.parse(reply):
                if len(kept) == options.keep:
                    break
                if isinstance(proposal, Malformed) or proposals.text_flaw(proposal, chunk.text, 5) or proposal in asked:
                    continue
                if any(proposals.near_duplicates(proposal, other, 0.8) for other in kept):
                    continue
                asked.append(proposal)
                chat = Chat(tuple(prompts.verifier(chunk.text, proposal.question, 1)), 1)
                if scoring.supports(verify(chat), proposal.answer):
                    kept.append(proposal)
        assert [(q.text, *q.answers) for q in got.chunks[0].questions] == kept
        wanted = sorted(proposal.question for proposal in asked)
        assert sorted(chat.messages[-1].parts[-1].removeprefix("Question: ") for chat in verifying) == wanted


def test_one_worker_may_do_both():
    streams = fact_streams(2, 2)
    expected, _ = ask(streams)

    def both(chat):
        return generate(chat) if chat.messages[0].parts == (prompts.GENERATOR_SYSTEM,) else verify(chat)

    worker = Shuffled(both, 0)
    assert ask(streams, None, worker, worker)[0] == expected


def test_streams_may_be_any_source():
    streams = fact_streams(3, 2)

    class Source:
        def __len__(self):
            return len(streams)

        def __getitem__(self, index):
            return streams[index]

    assert ask(Source())[0] == ask(streams)[0]


def test_progress_is_told():
    told = []
    ask(fact_streams(2, 3), progress=lambda done, chunks: told.append((done, chunks)))
    assert told == [(i + 1, 6) for i in range(6)]


# --------------------------------------------------------------------------------------
# Filters
# --------------------------------------------------------------------------------------

TEXT = "Ana moved to New York in 1904. Her dog Biscuit is 3.50 years old. The audit is due on the next Friday in May."
GOOD = line("To which city did Ana move?", "New York")


def answering(question):
    return {"To which city did Ana move?": "New York, I think", "What is Ana's dog called?": "Biscuit"}.get(
        question, ""
    )


@pytest.mark.parametrize(
    "reason, proposal",
    [
        ("malformed", "What is Ana's dog called? Biscuit"),
        ("too_long", line("When is the audit due?", "on the next Friday in May")),
        ("unsupported", line("Where does Ana live?", "New Orleans")),
        ("unsupported", line("Who is old?", "the")),
        ("gives_away", line("Is Ana's dog called Biscuit?", "Biscuit")),
        ("refers_to_text", line("According to the passage, what is Ana's dog called?", "Biscuit")),
        ("duplicate", line("To which city did Ana move?", "York")),
        ("duplicate", GOOD),
        ("unanswerable", line("When did Ana move?", "1904")),
    ],
)
def test_each_filter(reason, proposal):
    kept, report = one_chunk(TEXT, [f"{GOOD}\n{proposal}"], answering)
    assert kept == [("To which city did Ana move?", "New York")]
    assert report.rejected == dict.fromkeys(question_report.REASONS, 0) | {reason: 1}
    example = report.examples[reason][0]
    assert proposal in (example.question, line(example.question, example.answer))


def test_what_the_verifier_knows_without_the_chunk_goes():
    def verifier(chat):
        return "New York" if len(chat.messages[-1].parts) == 1 else "New York, Biscuit"

    stream = Stream("one", "", (Chunk(TEXT),))
    replies = batched(lambda chat: f"{GOOD}\n{line('What is her dog called?', 'Biscuit')}")
    for closed_book in (False, True):
        verifying = []
        (got,), report = ask(
            [stream], QuestionOptions(rounds=1, closed_book=closed_book), replies, batched(verifier, verifying)
        )
        assert [q.text for q in got.chunks[0].questions][-1] == "What is her dog called?"
        assert report.rejected["closed_book"] == closed_book and report.kept == 2 - closed_book
        # What is known is not verified any more.
        assert len(verifying) == report.chats["verifier"] == 2 + closed_book


def test_more_than_needed_is_not_looked_at():
    facts = [(f"Which word has number {i}?", f"w{i}") for i in range(6)]
    text = " ".join(answer for _, answer in facts)
    verifying = []

    def answer(question):
        verifying.append(question)
        return dict(facts)[question]

    kept, report = one_chunk(text, ["\n".join(line(*fact) for fact in facts)], answer, keep=2, proposals=5)
    assert kept == facts[:2] and len(verifying) == 2
    assert report.rejected["surplus"] == 4 and report.full == 1


def test_an_answer_counts_by_its_score():
    replies = [line("What is Ana's dog called?", "dog Biscuit")]
    for metric, min_score, number in (("substring", 0.5, 0), ("token_f1", 0.6, 1), ("token_f1", 0.7, 0)):
        # F1 = 2 * 1 / (1 + 2) = 2/3.
        kept, report = one_chunk(TEXT, replies, lambda question: "Biscuit", metric=metric, min_score=min_score)
        assert len(kept) == number and report.rejected["unanswerable"] == 1 - number


def test_thinking_is_no_answer():
    thought = "<think>New York or Biscuit</think>"
    assert one_chunk(TEXT, [GOOD], lambda question: f"{thought} unknown")[0] == []
    assert one_chunk(TEXT, [GOOD], lambda question: "<think>New York")[0] == []
    assert len(one_chunk(TEXT, [f"<think>{GOOD}</think>{GOOD}"], lambda question: f"{thought}New York")[0]) == 1


# --------------------------------------------------------------------------------------
# Rounds, streams, and what was there before
# --------------------------------------------------------------------------------------


def test_another_round_fills_up():
    second = line("What is Ana's dog called?", "Biscuit")
    kept, report = one_chunk(TEXT, [GOOD, f"{GOOD}\n{second}"], answering, keep=2)
    assert [answer for _, answer in kept] == ["New York", "Biscuit"]
    # The proposal that came again was not verified again.
    assert report.chats == {"generator": 2, "verifier": 2} and report.rejected["duplicate"] == 1
    assert (report.full, report.partial, report.empty) == (1, 0, 0)
    kept, report = one_chunk(TEXT, [GOOD, second], answering, keep=1)
    assert report.chats["generator"] == 1 and len(kept) == 1


def test_rounds_differ_in_their_seed_and_end():
    asked = []
    _, report = ask(
        [Stream("one", "", (Chunk(TEXT),))],
        QuestionOptions(rounds=3, seed=40, temperature=0.9),
        batched(lambda chat: "nothing", asked),
    )
    assert [(chat.seed, chat.temperature, chat.max_new_tokens) for chat in asked] == [
        (40, 0.9, 1_024), (41, 0.9, 1_024), (42, 0.9, 1_024),
    ]  # fmt: skip
    assert len({chat.messages for chat in asked}) == 1
    assert report.rejected["malformed"] == report.proposed == 3 and report.empty == 1


def test_a_stream_asks_nothing_twice():
    """The second chunk states what the first does; its place is filled by a further proposal, or a further round."""
    chunk = Chunk("Ana's city is Porto. Ana's job is baker. Ana's pet is Rex.")
    things = ("city of Ana", "Porto"), ("city of Ana now", "Porto"), ("job of Ana", "baker")
    facts = [line(f"What is the {thing}?", value) for thing, value in things]
    more = line("What is the pet of Ana?", "Rex")
    streams = [Stream(name, "", (chunk, chunk)) for name in "xy"]

    def reply(chat):
        return more if chat.seed else "\n".join(facts)

    verifier = batched(lambda chat: "Porto, baker, Rex")
    got, report = ask(streams, QuestionOptions(keep=1, rounds=2), batched(reply), verifier)
    for stream in got:  # Other streams may ask the same.
        assert [[q.answers[0] for q in c.questions] for c in stream.chunks] == [["Porto"], ["baker"]]
    got, report = ask(streams[:1], QuestionOptions(keep=2, rounds=2), batched(reply), verifier)
    assert [[q.answers[0] for q in c.questions] for c in got[0].chunks] == [["Porto", "baker"], ["Rex"]]
    assert report.rejected["duplicate"] == 4 and (report.full, report.partial) == (1, 1) and adds_up(report)


def test_questions_that_are_there_can_stay():
    old = Question("To which town did Ana move?", ("New York",), "exact", (0,), "old")
    streams = [Stream("one", "", (Chunk(TEXT, (old,)), Chunk(TEXT)))]
    reply = f"{GOOD}\n{line('What is her dog called?', 'Biscuit')}\n{line('Who moved?', 'Ana')}"
    settings = {"keep": 2, "rounds": 1}

    def again(**more):
        asked = []
        model = batched(lambda chat: "New York, Biscuit, Ana")
        (got,), report = ask(streams, QuestionOptions(**settings, **more), batched(lambda chat: reply, asked), model)
        assert adds_up(report)
        return [[q.text for q in chunk.questions] for chunk in got.chunks], report, len(asked)

    assert again()[0] == [["To which city did Ana move?", "What is her dog called?"], ["Who moved?"]]
    kept, report, _ = again(keep_existing=True)
    assert kept == [["To which town did Ana move?", "What is her dog called?"], ["Who moved?"]]
    assert (report.existing, report.kept) == (1, 2)
    # A chunk that has enough is not asked about.
    settings["keep"] = 1
    kept, report, asked = again(keep_existing=True)
    assert kept[0] == ["To which town did Ana move?"] and asked == 1 and report.full == 2


# --------------------------------------------------------------------------------------
# Work that overlaps
# --------------------------------------------------------------------------------------


def test_verification_begins_before_all_is_proposed():
    log = []

    def noting(kind, function):
        return lambda chat: (log.append(kind), function(chat))[1]

    ask(fact_streams(3, 4), None, Shuffled(noting("proposed", generate), 0), Shuffled(noting("verified", verify), 1))
    assert log.index("verified") < 5 < len(log) - log[::-1].index("proposed")


@pytest.mark.parametrize("shape", [(1, 10), (30, 1), (4, 5)])
@pytest.mark.parametrize("limit", [1, 3])
def test_only_so_many_chunks_are_in_flight(shape, limit):
    class Watched(list):
        """Streams, and how many have been looked at."""

        loaded = 0

        def __getitem__(self, index):
            self.loaded = max(self.loaded, index + 1)
            return super().__getitem__(index)

    class Newest(Shuffled):
        """The oldest comes last."""

        def collect(self, wait=True):
            if not (wait and self._waiting):
                return []
            request_id, chat = self._waiting.popitem()
            return [(request_id, generate(chat))]

    streams = fact_streams(*shape)
    generator, options = Newest(generate, 3), QuestionOptions(keep=2, proposals=9, chunks_in_flight=limit)
    watched = Watched(streams)
    pipeline = Pipeline(watched, options, Models(generator, batched(verify), count_tokens))
    watched.loaded, taken = 0, 0
    for i, _ in enumerate(pipeline.run()):
        assert watched.loaded <= i + 1 + pipeline_lib._OPEN_STREAMS * limit
        taken += 1
    assert taken == shape[0] and generator.most_waiting <= limit
    assert ask(streams, dataclasses.replace(options, chunks_in_flight=99))[0] == ask(streams, options)[0]


class Clock:
    """Time as the workers below have it; stands in for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Timed:
    """Takes so long for each chat: as a server, of many at once; or one by one, and only while it is waited for."""

    def __init__(self, function, clock, seconds, is_server):
        self._function, self._clock, self.seconds, self._is_server = function, clock, seconds, is_server
        self._waiting, self.asked = {}, []

    def submit(self, chat):
        self.asked.append(chat)
        self._waiting[len(self.asked)] = (self._clock.now + self.seconds, chat)
        return len(self.asked)

    def collect(self, wait=True):
        if wait and self._waiting:
            first, _ = next(iter(self._waiting.values()))
            self._clock.now = max(self._clock.now, first) if self._is_server else self._clock.now + self.seconds
            return [self._take(next(iter(self._waiting)))]
        done = [request_id for request_id, (moment, _) in self._waiting.items() if moment <= self._clock.now]
        return [self._take(request_id) for request_id in done] if self._is_server else []

    def _take(self, request_id):
        return request_id, self._function(self._waiting.pop(request_id)[1])

    def cancel(self, request_id):
        return self._waiting.pop(request_id, None) is not None


def doubtful(chat):
    """A verifier that is seldom right."""
    return verify(chat) if sum(map(ord, chat.messages[-1].parts[-1])) % 4 == 0 else "unknown"


@pytest.mark.parametrize(
    "generator_seconds, verifier_seconds, servers",
    [
        (1.0, 0.05, ("generator", "verifier")),
        (1.0, 0.02, ("generator",)),
        (0.05, 1.0, ("generator", "verifier")),
        (0.05, 1.0, ("verifier",)),
    ],
)
def test_neither_worker_waits_for_the_other(monkeypatch, generator_seconds, verifier_seconds, servers):
    """Chunks are verified question after question, and few are in flight: if one waits for the other, it shows."""
    clock = Clock()
    monkeypatch.setattr(pipeline_lib, "time", clock)
    generator = Timed(generate, clock, generator_seconds, "generator" in servers)
    verifier = Timed(doubtful, clock, verifier_seconds, "verifier" in servers)
    streams = fact_streams(100, 1, facts=20)
    options = QuestionOptions(keep=1, proposals=40, chunks_in_flight=4)
    got, report = ask(streams, options, generator, verifier, servers=servers)
    assert (got, report) == ask(streams, options, verifier=batched(doubtful))
    # What the chunks take one after the other, of which four are in flight.
    seconds = sum(worker.seconds * len(worker.asked) for worker in (generator, verifier))
    assert seconds / 4 > 38 and clock.now < 1.1 * seconds / 4 + 2


def test_nobody_is_waited_for_while_the_other_has_something_ready():
    class Ready(workers.Batched):
        def __init__(self, function):
            super().__init__(lambda chats: list(map(function, chats)))

        def collect(self, wait=True):
            assert not wait or not other[self]._waiting, "the other has something"
            return super().collect(True)

    generator, verifier = Ready(generate), Ready(verify)
    other = {generator: verifier, verifier: generator}
    streams = fact_streams(2, 3)
    assert ask(streams, None, generator, verifier) == ask(streams)


def test_another_round_is_asked_as_soon_as_it_is_needed():
    """One proposal cannot make two questions, whatever becomes of it."""
    generator = Shuffled(lambda chat: GOOD, 0)

    def verified(chat):
        assert len(generator.asked) == 2
        return "New York"

    ask([Stream("one", "", (Chunk(TEXT),))], QuestionOptions(keep=2), generator, batched(verified))


@pytest.mark.parametrize("shared", [False, True])
def test_workers_that_must_be_waited_for_lose_little_time(monkeypatch, shared):
    clock = Clock()
    monkeypatch.setattr(pipeline_lib, "time", clock)

    def both(chat):
        return generate(chat) if chat.messages[0].parts == (prompts.GENERATOR_SYSTEM,) else verify(chat)

    generator, verifier = (Timed(both, clock, 0.4, False) for _ in range(2))
    used = [generator] if shared else [generator, verifier]
    ask(fact_streams(30, 2), None, generator, generator if shared else verifier)
    busy_seconds = sum(worker.seconds * len(worker.asked) for worker in used)
    assert 50 < busy_seconds <= clock.now < 1.03 * busy_seconds


# --------------------------------------------------------------------------------------
# Kill and rerun
# --------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 9, 40])
def test_what_was_answered_before_a_kill_is_not_asked_again(tmp_path, after):
    streams, options = fact_streams(4, 4), QuestionOptions(keep=4, proposals=8, chunks_in_flight=5)
    expected, report = ask(streams, options)
    replied = []

    def run(kill_after, folder):
        file = reply_cache.ReplyCache(tmp_path / "answers.sqlite", 2**24)

        def mortal(function):
            def reply(chat):
                if len(replied) == kill_after:
                    raise Killed
                replied.append(chat)
                return function(chat)

            return reply

        def worker(function, name, seed):
            return reply_cache.Cached(Shuffled(mortal(function), seed), file, name)

        try:
            models = Models(worker(generate, "g", 1), worker(verify, "v", 2), count_tokens)
            return Pipeline(streams, options, models).write(folder, "train")
        finally:
            file.close()

    folder = tmp_path / "out"
    with pytest.raises(Killed):
        run(after, folder)
    assert list(folder.iterdir()) == []
    again = run(None, folder)
    assert again == report
    assert len(replied) == len(set(replied)) == sum(report.chats.values())
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [to_json(stream) for stream in expected]
    # Once more: nothing is asked, and the files are the same, byte for byte.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(0, folder)  # Would be killed at the first chat.
    run(None, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_is_left_with_the_workers():
    generator, verifier = Shuffled(generate, 0), Shuffled(verify, 1)

    def broken(done, chunks):
        raise Killed

    with pytest.raises(Killed):
        ask(fact_streams(2, 3), None, generator, verifier, progress=broken)
    assert generator.collect() == verifier.collect() == []


# --------------------------------------------------------------------------------------
# Budget
# --------------------------------------------------------------------------------------

PRICES = Prices(1.0, 2.0, 3.0, 4.0)


def test_money_by_hand():
    assert Tokens(1_000_000, 500_000, 2_000_000, 250_000).money(PRICES) == 1 + 1 + 6 + 1
    assert Tokens(1, 2, 3, 4).total == 10


def test_estimate_by_hand():
    stream = Stream("one", "", (Chunk("a b c"), Chunk("d e f", (Question("Q?", ("d",)),) * 3)))
    options = QuestionOptions(keep=3, proposals=4, rounds=2, proposal_tokens=100, answer_tokens=9, num_examples=0)
    got = costs.estimate([stream], options, count_tokens, prices=PRICES)
    per_proposal = count_tokens(prompts.proposal_line(*prompts.GENERATOR_EXAMPLE[1][0]))
    # "New text: a b c" are 5, "Write 4 questions about …" 11, "Question:" 1.
    proposing = count_tokens(prompts.GENERATOR_SYSTEM) + 5 + 11
    verifying = count_tokens(prompts.VERIFIER_SYSTEM) + 5 + 1 + per_proposal
    # Of 4 proposals, 4 are verified for 3 that are needed.
    assert got.expected == Tokens(2 * proposing, 2 * 4 * per_proposal, 2 * 4 * verifying, 2 * 4 * 6)
    assert got.most == Tokens(4 * proposing, 4 * 100, 16 * verifying, 16 * 9)
    assert got.money == pytest.approx(got.expected.money(PRICES)) and (got.streams, got.chunks, got.asked) == (1, 2, 2)
    kept = costs.estimate([stream], dataclasses.replace(options, keep_existing=True), count_tokens, prices=PRICES)
    assert kept.asked == 1 and kept.expected.total * 2 == got.expected.total
    closed = costs.estimate([stream], dataclasses.replace(options, closed_book=True), count_tokens)
    assert closed.expected.verifier_new == 2 * got.expected.verifier_new and closed.money == 0
    for part in ("2 of 2 chunks in 1 streams", f"{got.expected.total:,} tokens", "Assumed: one round", "at most"):
        assert part in str(got)


def test_a_run_stays_within_the_most():
    streams = fact_streams(3, 3)
    for closed_book in (False, True):
        options = QuestionOptions(keep=5, proposals=8, rounds=3, closed_book=closed_book)
        _, report = ask(streams, options)
        most = costs.estimate(streams, options, count_tokens).most
        pairs = zip(dataclasses.astuple(report.tokens), dataclasses.astuple(most), strict=True)
        assert all(0 < used <= limit for used, limit in pairs)


@pytest.mark.parametrize("limit", [{"max_tokens": 100}, {"max_money": 0.0001}])
def test_too_small_a_budget_is_refused_before_anything_is_asked(limit):
    generator, streams = Shuffled(generate, 0), fact_streams(2, 2)
    ((name, _),) = limit.items()
    with pytest.raises(
        ValueError, match=rf"questions.{name}=.*estimated to take [\d,]+ tokens .*Raise questions.{name}"
    ):
        ask(streams, QuestionOptions(**limit), generator, prices=PRICES)
    assert generator.asked == []
    ask(streams, QuestionOptions(keep=3, proposals=8, max_tokens=10**6, max_money=100.0), prices=PRICES)


def test_money_needs_prices():
    with pytest.raises(
        ValueError, match="questions.max_money=5 cannot be kept to without prices; set questions.prices, or"
    ):
        ask(fact_streams(1, 1), QuestionOptions(max_money=5.0))


@pytest.mark.parametrize("name", ["max_tokens", "max_money"])
def test_a_budget_that_is_used_up_stops_and_can_be_raised(tmp_path, name):
    """A verifier that says much more than was estimated."""
    streams, replied = fact_streams(3, 4), []
    options = QuestionOptions(keep=3, proposals=8)

    def run(**limit):
        file = reply_cache.ReplyCache(tmp_path / "answers.sqlite", 2**24)

        def noting(function):
            return lambda chat: (replied.append(chat), function(chat))[1]

        generator = reply_cache.Cached(Shuffled(noting(generate), 1), file, "g")
        verifier = reply_cache.Cached(Shuffled(noting(lambda chat: verify(chat) + " well" * 200), 2), file, "v")
        try:
            models = Models(generator, verifier, count_tokens, PRICES)
            return Pipeline(streams, dataclasses.replace(options, **limit), models).write(tmp_path / "out", "test")
        finally:
            file.close()

    estimated = costs.estimate(streams, options, count_tokens, prices=PRICES)
    limit = estimated.expected.total if name == "max_tokens" else estimated.money
    with pytest.raises(BudgetError) as caught:
        run(**{name: limit})
    assert f"questions.{name}={limit:,} is used up after " in str(caught.value)
    assert " of 12 chunks, with " in str(caught.value) and "goes on" in str(caught.value)
    assert isinstance(caught.value, RuntimeError) and list((tmp_path / "out").iterdir()) == []
    before = len(replied)
    report = run(**{name: 100 * limit})
    assert 0 < before < len(replied) == len(set(replied)) == sum(report.chats.values())


def test_what_has_been_answered_when_the_budget_ends_is_kept(tmp_path):
    class Eager(workers.Batched):
        """Has the reply when it is asked, as a server may that answers before anybody looks."""

        def submit(self, item):
            return super().submit((replied.append(item), item)[1])

        def collect(self, wait=True):
            return super().collect(True)

    replied, streams, options = [], fact_streams(3, 4), QuestionOptions(keep=3, proposals=8)
    for max_tokens in (13_000, 0):
        file = reply_cache.ReplyCache(tmp_path / "answers.sqlite", 2**24)
        generator = reply_cache.Cached(Eager(lambda chats: list(map(generate, chats))), file, "g")
        verifier = reply_cache.Cached(Eager(lambda chats: [verify(chat) + " well" * 200 for chat in chats]), file, "v")
        try:
            ask(streams, dataclasses.replace(options, max_tokens=max_tokens), generator, verifier)
        except BudgetError:
            assert max_tokens and len(replied) > 12
        file.close()
    assert len(replied) == len(set(replied))


def test_tokens_are_counted_as_they_are_asked():
    generator, verifier = Shuffled(generate, 0), Shuffled(verify, 0)
    _, report = ask(fact_streams(2, 2), None, generator, verifier)

    def prompt(chats):
        return sum(count_tokens(part) for chat in chats for message in chat.messages for part in message.parts)

    def new(chats, function):
        return sum(count_tokens(function(chat)) for chat in chats)

    assert report.tokens == Tokens(
        prompt(generator.asked), new(generator.asked, generate), prompt(verifier.asked), new(verifier.asked, verify)
    )
    assert report.chats == {"generator": len(generator.asked), "verifier": len(verifier.asked)}


# --------------------------------------------------------------------------------------
# Report and files
# --------------------------------------------------------------------------------------


def test_examples_are_spread_over_streams():
    _, report = ask(fact_streams(6, 3), QuestionOptions(keep=3, proposals=8, samples=4))
    for examples in report.examples.values():
        assert len(examples) <= 4
    for fate in ("kept", "malformed"):
        assert len({example.stream_id for example in report.examples[fate]}) == 4
    # Of two streams, each gives half.
    _, report = ask(fact_streams(2, 3), QuestionOptions(keep=3, proposals=8, samples=4))
    assert sorted(e.stream_id for e in report.examples["kept"]) == ["s0", "s0", "s1", "s1"]
    assert ask(fact_streams(2, 1), QuestionOptions(samples=0))[1].examples["kept"] == []


def test_files(tmp_path):
    streams, folder = fact_streams(2, 2), tmp_path / "new" / "folder"
    streams[0] = dataclasses.replace(streams[0], stream_id="s0 | *x*\n\ud83d <b>")
    options = QuestionOptions(keep=3, proposals=8)
    models = Models(batched(generate), batched(verify), count_tokens, PRICES)
    report = Pipeline(streams, options, models).write(folder, "train")
    assert sorted(path.name for path in folder.iterdir()) == ["report_train.json", "report_train.md", "train.jsonl"]
    page = (folder / "report_train.md").read_text(encoding="utf-8")
    record = json.loads((folder / "report_train.json").read_text(encoding="utf-8"))
    assert record["proposed"] == report.proposed and record["options"]["keep"] == 3
    assert record["acceptance"] == pytest.approx(report.kept / report.proposed) and record["money"] == report.money
    assert page.startswith("# Chunk questions: train\n") and page.endswith("|\n")
    assert f"{report.kept} questions kept of {report.proposed} proposed" in page
    for name, meaning in question_report.REASONS.items():
        assert f"| {name.replace('_', chr(92) + '_')} | {report.rejected[name]} | " in page and meaning[:20] in page
    assert "| with 3 questions |" in page and "### kept" in page and "| questions.closed\\_book | False |" in page
    # What is quoted ends no row, and is no markup.
    assert "s0 \\| \\*x\\* ? \\<b\\>, chunk" in page
    tables = [row for row in page.splitlines() if row.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in tables if "chunk" in row and "s0" in row}) == 1


def test_a_run_replaces_what_was_there(tmp_path):
    models = Models(batched(generate), batched(verify), count_tokens)
    for keep in (2, 1):
        Pipeline(fact_streams(1, 1), QuestionOptions(keep=keep), models).write(tmp_path, "train")
        (row,) = (tmp_path / "train.jsonl").read_text().splitlines()
        assert len(json.loads(row)["chunks"][0]["questions"]) == keep
    with pytest.raises(ValueError, match="a split's name must consist of letters"):
        Pipeline(fact_streams(1, 1), QuestionOptions(), models).write(tmp_path, "../x")


# --------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------


def test_system_messages_can_be_replaced():
    asked, generator, verifier = [], QuestionModel(system="generator"), QuestionModel(system="verifier")
    options = QuestionOptions(
        closed_book=True, num_examples=0, generator=generator, verifier=verifier, closed_book_system="closed book"
    )
    ask(fact_streams(1, 1), options, batched(generate, asked), batched(verify, asked))
    assert {chat.messages[0].parts for chat in asked} == {("generator",), ("verifier",), ("closed book",)}
    assert {len(chat.messages) for chat in asked} == {2}


# --------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"metric": "bleu"}, "questions.metric must be one of "),
        ({"metric": "judge"}, "(the verifier's answers are scored by rule, not judged); got 'judge'."),
        ({"temperature": 0.0}, "questions.temperature must be above 0 for questions.rounds=2"),
        (
            {"proposals": 2},
            "questions.proposals=2 in each of questions.rounds=2 can never make questions.keep=5",
        ),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuestionOptions(**settings)
    QuestionOptions(temperature=0.0, rounds=1)


def test_streams_that_cannot_work():
    with pytest.raises(ValueError, match="There are no streams"):
        ask([])
    with pytest.raises(ValueError, match="Two streams have the id 's0'; ids must differ"):
        ask(fact_streams(1, 1) * 2)
