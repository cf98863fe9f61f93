"""Tests of finemem_jax/report.py: one page that loads nothing, escapes everything, and survives half a run."""

import gzip
import html.parser
import json
import math
import re

import pytest

from finemem_jax import operations, prompts, records, report, rewards, tokenizer, writer
from finemem_jax.credit import Weights
from finemem_jax.environment import Environment
from finemem_jax.episode import (
    Action,
    Answer,
    Chunk,
    Completion,
    Memory,
    Operation,
    Question,
    Step,
    Stream,
    Trajectory,
)
from finemem_jax.tokenizer import ByteTokenizer

TOKENS = ByteTokenizer()
RULES = Environment(TOKENS, num_examples=2, view_tokens=400, chunk_tokens=900, long_chunk="split", repair_json=False)
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>&\"'"
CONFIG = {"experiment": "a run", "manager.num_examples": 2, "train.num_steps": 5, "seed": 0}
METRICS = {
    "reward/total": 0.5, "reward/chunk": 0.25, "operations/valid_fraction": 0.75, "memory/tokens": 40.0,
    "loss/entropy": 2.0, "time/manager_seconds": 3.0, "time/step_seconds": 9.0,
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; refuses tags that are closed in another order than they were opened."""

    VOID = ("meta", "br", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = set(), [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(workdir):
    path = report.write(workdir)
    assert path == workdir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def rollouts(chunks=("Ana moved to Oslo.", "Rain."), content="Ana lives in Oslo.", answer="Oslo"):
    """Records of two rollouts of one stream: the first inserts `content` and answers, the second writes nothing."""
    question = Question("Where does Ana live?", ("Oslo",), kind="plain")
    stream = Stream("s-1", "made up", tuple(map(Chunk, chunks)), (question,))
    written = operations.render(Operation(Action.INSERT, content)) + "\n" + content
    group = []
    for i, responses in enumerate([[written] * len(chunks), [""] * len(chunks)]):
        memory, steps = Memory(), []
        for t, (chunk, response) in enumerate(zip(stream.chunks, responses, strict=True)):
            chat = RULES.observe(chunk, memory)
            ids = (*TOKENS.encode(response), *TOKENS.end_ids)
            memory, outcomes = RULES.act(memory, ids, t)
            completion = Completion(ids, (-1.0,) * len(ids), "stop", 0)
            steps.append(Step(chat.ids, chat.cuts, completion, outcomes, memory))
        found = Answer(question, memory.items, answer, 1.0 if i == 0 else 0.0)
        group.append(Trajectory(stream, i, tuple(steps), (found,)))
    inputs = rewards.collect([group], RULES.count_tokens)
    judged = rewards.judge(inputs, Weights(0.5, 0.5, 0.05, 1.0), 1e-6)
    return [records.trajectory(one, (0, i), inputs, *judged, TOKENS.decode) for i, one in enumerate(group)]


@pytest.fixture(scope="module")
def plain_rollouts():
    return rollouts()


def estimates(mean, error):
    return {
        metric: {"mean": mean, "standard_error": error, "n": 2}
        for metric in ("score", "chunk_score", "valid_operations", "memory_tokens")
    }


def evaluation(a, b, step):
    """An evaluation of two streams with these values for every metric."""
    mean, error = (a + b) / 2, abs(a - b) / 2
    return {
        "step": step,
        "estimates": estimates(mean, error),
        "per_stream": {metric: {"a": a, "b": b} for metric in estimates(0, 0)},
        "by_kind": {"latest_value": {"mean": mean, "standard_error": math.nan, "n": 1}},
    }


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def fill(workdir, trajectories, steps=3):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({"step": t} | METRICS) + "\n" for t in range(steps)))
    (workdir / "evaluation.json").write_text(
        json.dumps({"before": evaluation(0.0, 0.5, 0), "after": evaluation(0.5, 0.75, steps)})
    )
    writer.write_records(workdir / "trajectories" / f"step_{steps:06d}.jsonl.gz", trajectories)


def test_a_whole_run(workdir, plain_rollouts):
    fill(workdir, plain_rollouts)
    page = page_of(workdir)
    assert "a run" in page.text
    assert "3 of 5 training steps" in page.text
    for cell in ("0.250 ± 0.250", "0.625 ± 0.125", "+0.375 ± 0.125", "latest_value", "0.250 ± –"):
        assert cell in page.text
    for words in ("Best: rollout 1 of 2", "Worst: rollout 2 of 2", "Ana moved to Oslo.", "advantage +0.707"):
        assert words in page.text
    for words in ("#1 Ana lives in Oslo.", "from chunk 1", "applied", "malformed", "duplicate", "not JSON", "empty"):
        assert words in page.text
    assert "manager.num_examples" in page.text
    assert re.search(r"\bnan\b", (workdir / "report.html").read_text(encoding="utf-8")) is None
    assert sorted(path.name for path in workdir.iterdir()) == [
        "config.json", "evaluation.json", "metrics.jsonl", "report.html", "trajectories",
    ]  # fmt: skip


def test_nothing_is_loaded_from_outside(workdir, plain_rollouts):
    fill(workdir, plain_rollouts)
    page = page_of(workdir)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action")
        assert not name.startswith("on")
        assert not name.endswith("href") or value.startswith("#")
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"url\((?!#)|@import", text) == []
    # Names of XML formats, which nobody fetches.
    assert set(re.findall(r"https?://[^\"' )<]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_and_all_references_hold(workdir, plain_rollouts):
    fill(workdir, plain_rollouts)
    page = page_of(workdir)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    referred = {value[1:] for name, value in page.attributes if name.endswith("href")}
    assert referred <= set(ids)


def test_the_same_run_gives_the_same_page(workdir, plain_rollouts):
    fill(workdir, plain_rollouts)
    first = report.write(workdir).read_bytes()
    assert report.write(workdir).read_bytes() == first


def test_whatever_was_written_is_text(tmp_path):
    workdir = tmp_path
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"experiment": HOSTILE, "note": HOSTILE}))
    trajectories = rollouts(chunks=(HOSTILE,), content=HOSTILE, answer=HOSTILE)
    for one in trajectories:
        one["source"] = one["stream_id"] = HOSTILE
        for answer in one["answers"]:
            answer |= {"question": HOSTILE, "kind": HOSTILE, "gold": [HOSTILE]}
        for step in one["steps"]:
            step["operations"] += [{"status": HOSTILE, "item_id": HOSTILE, "action": HOSTILE, "content": HOSTILE}]
    fill(workdir, trajectories)
    named = {HOSTILE: evaluation(0.0, 0.5, 0) | {"by_kind": {HOSTILE: {"mean": 0, "standard_error": 0, "n": 1}}}}
    (workdir / "evaluation.json").write_text(json.dumps(named))
    page = page_of(workdir)
    assert not page.tags & {"script", "img"}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count(HOSTILE) > 15


def test_lone_surrogates_do_not_stop_it(workdir):
    (workdir / "config.json").write_text('{"experiment": "\\ud800"}')
    assert "?" in page_of(workdir).text


@pytest.mark.parametrize("num_examples", [0, 1, 2])
@pytest.mark.parametrize(
    "chunk",
    [
        "Ana moved.\n\nTo Oslo.",
        "",
        'New text:\nnot mine\n\nMemory:\n{"id": 1, "content": "forged"}',
        "Memory:\n(empty)",
    ],
)
def test_the_chunk_is_found_in_the_prompt(chunk, num_examples):
    # Holds report and prompts together: if the prompt's form changes, this fails.
    items = (prompts.MemoryItem(1, "\n\nMemory:\nNew text:\n", 0),)
    messages = prompts.manager(chunk, items, 3, num_examples, operations.render)
    prompt = TOKENS.decode(tokenizer.encode_chat(TOKENS, messages).ids)
    assert report._chunk(prompt, {"manager.num_examples": num_examples}) == chunk


def test_a_prompt_of_another_form_is_shown_whole():
    assert report._chunk("something else", CONFIG) == "something else"


def test_a_run_that_has_just_begun(workdir):
    page = page_of(workdir)
    for words in ("No evaluation yet.", "No metrics yet.", "No trajectories yet.", "0 of 5 training steps"):
        assert words in page.text


def test_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"--workdir=.*nowhere is no workdir: .*config\.json does not exist; give"):
        report.write(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("text", ["{", "[]", "", "\x80"])
def test_a_broken_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"--workdir=.* is broken: .*config\.json"):
        report.write(tmp_path)


def test_a_half_written_line_is_ignored(workdir, plain_rollouts):
    fill(workdir, plain_rollouts)
    whole = page_of(workdir).text
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/tot')
    assert page_of(workdir).text == whole


def test_broken_lines_before_the_last_are_counted(workdir):
    lines = ["{", json.dumps({"step": 0} | METRICS), "[]", json.dumps({"step": 1} | METRICS)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(workdir)
    assert "2 lines of metrics.jsonl could not be read" in page.text
    assert "2 of 5 training steps" in page.text


def test_metrics_that_are_missing_or_not_finite(workdir):
    lines = [{"step": 0, "reward/total": math.nan}, {"step": 1, "reward/total": 0.5}, {"step": 2}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(workdir)
    assert "total 0.500" in page.text
    assert "Not measured in this run." in page.text


@pytest.mark.parametrize("broken", ["[]", "{", '{"before": {}}', '{"before": 3}'])
def test_a_broken_evaluation_is_named(workdir, broken):
    (workdir / "evaluation.json").write_text(broken)
    assert re.search(r"evaluation\.json could not be read|No evaluation yet", page_of(workdir).text)


def test_an_evaluation_before_training_only(workdir):
    (workdir / "evaluation.json").write_text(json.dumps({"before": evaluation(0.0, 0.5, 0)}))
    page = page_of(workdir)
    assert "0.250 ± 0.250" in page.text
    assert "paired" not in page.text


def test_other_evaluations_are_listed_in_order(workdir):
    found = {name: evaluation(0.0, 0.5, step) for name, step in (("before", 0), ("after", 9), ("step 4", 4))}
    (workdir / "evaluation.json").write_text(json.dumps(found))
    text = page_of(workdir).text
    assert "paired" in text
    assert re.search("before.*step 4.*after", text[text.index("All evaluations") :], re.DOTALL)


def damaged(kind, whole):
    return {
        "truncated": whole[: len(whole) // 2],
        "no gzip": b"plain text",
        "empty": b"",
        "no JSON": gzip.compress(b"{\n"),
        "no record": gzip.compress(b"[]\n"),
        "other fields": gzip.compress(b'{"stream_id": "s"}\n'),
        "no UTF-8": gzip.compress(b"\xff\n"),
        "garbage inside": whole[:30] + b"\x00" * 40 + whole[70:],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["truncated", "no gzip", "empty", "no JSON", "no record", "other fields", "no UTF-8", "garbage inside"]
)
def test_a_broken_trajectory_file_is_named_and_the_one_before_it_shown(workdir, plain_rollouts, kind):
    fill(workdir, plain_rollouts)
    whole = workdir / "trajectories" / "step_000003.jsonl.gz"
    (workdir / "trajectories" / "step_000004.jsonl.gz").write_bytes(damaged(kind, whole.read_bytes()))
    page = page_of(workdir)
    assert re.search(r"step_000004\.jsonl\.gz is broken and left out", page.text)
    assert "From step_000003.jsonl.gz" in page.text
    assert "Best: rollout 1 of 2" in page.text


def test_a_single_rollout_is_shown_once(workdir, plain_rollouts):
    fill(workdir, plain_rollouts[:1])
    page = page_of(workdir)
    assert "Best: rollout 1 of 1" in page.text
    assert "Worst" not in page.text


def test_moving_average_by_hand():
    # Weights of the past 1/2: 4; then (1/2 · 4 + 1 · 1) / (3/2) = 2; nan leaves it; then (2/8 · 4 + …) is below.
    # (0.5² · 4 + 0.5 · 1 + 1 · 2) / (0.25 + 0.5 + 1) = 3.5 / 1.75 = 2.
    got = report.moving_average([math.nan, 4.0, 1.0, math.nan, 2.0], decay=0.5)
    assert math.isnan(got[0])
    assert got[1:] == pytest.approx([4.0, 2.0, 2.0, 2.0])


def test_moving_average_of_a_constant_is_that_constant():
    assert report.moving_average([3.0] * 50) == pytest.approx([3.0] * 50)
