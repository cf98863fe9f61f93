"""Tests of finemem_jax/evaluation/report.py: one page that loads nothing and escapes everything."""

import dataclasses
import gzip
import html.parser
import json
import math
import re

import pytest

from finemem_jax.evaluation import report, report_plots, report_rollouts
from finemem_jax.memory import operations
from finemem_jax.rl import records, rewards
from finemem_jax.rl.credit_rules import CreditConfig
from finemem_jax.rl.grpo import Normalizer
from finemem_jax.runtime import files
from finemem_jax.types import (
    Action,
    Answer,
    Chunk,
    Completion,
    Likelihood,
    Memory,
    Operation,
    Probes,
    Question,
    Step,
    Stream,
    Trajectory,
)
from small_trajectories import ENVIRONMENT, TOKENS, answer, answers, deleted, inserted, item, step, trajectory, updated

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>&\"'"
CONFIG = {"experiment": "a run", "manager.num_examples": 2, "train.num_steps": 5, "credit.rule": "full", "seed": 0}
METRICS = {
    "reward/total": 0.5, "reward/credit": 0.125, "reward/chunk": 0.25, "reward/content": 0.0, "reward/kl": 0.0,
    "operations/valid_fraction": 0.75, "memory/tokens": 40.0,
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
    question = Question("Where does Ana live?", ("Oslo",), kind="plain", gold_steps=(0,))
    stream = Stream("s-1", "made up", tuple(map(Chunk, chunks)), (question,))
    written = operations.render(Operation(Action.INSERT, content)) + "\n" + content
    group = []
    for i, responses in enumerate([[written] * len(chunks), [""] * len(chunks)]):
        memory, steps = Memory(), []
        for t, (chunk, response) in enumerate(zip(stream.chunks, responses, strict=True)):
            chat = ENVIRONMENT.observe(chunk, memory)
            ids = (*TOKENS.encode(response), *TOKENS.end_ids)
            memory, outcomes, owners = ENVIRONMENT.act(memory, ids, t)
            completion = Completion(ids, (-1.0,) * len(ids), "stop", 0)
            steps.append(Step(chat.ids, chat.cuts, completion, outcomes, memory, owners))
        found = Answer(question, memory.items, answer, 1.0 if i == 0 else 0.0)
        group.append(Trajectory(stream, i, tuple(steps), (found,)))
    return recorded(group)


def recorded(group, rule="full", kl=None):
    """Records of a group, judged by a rule."""
    inputs = rewards.to_arrays([group], ENVIRONMENT.count_tokens, kl)
    judged = rewards.compute(inputs, CreditConfig(rule=rule), Normalizer())
    return list(records.trajectories([group], inputs, judged[0], advantages=judged[1], decode=TOKENS.decode))


def typed_rollouts():
    """Two rollouts with a typed memory: one rewrites, deletes and cites; the other writes nothing."""
    home = item(text="Ana lives in Rome.", memory_type="semantic")
    trip = item(0, 1, "2024: Ana was in Peru.", 2, "episodic")
    moved = item(1, 0, "Ana lives in Oslo.", 1, "semantic")
    steps = [
        step([inserted(home.text, 1, "semantic"), inserted(trip.text, 2, "episodic")], memory=[home, trip]),
        step([updated(home, moved.text), deleted(trip)], memory=[moved]),
    ]
    answered = Answer(Question("Where does Ana live?", ("Oslo",)), (moved, trip), "Oslo", 1.0, (True, False))
    return [trajectory(steps, [answered]), trajectory([step(), step()], answers(0.0), rollout=1)]


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
        "by_kind": {"latest_value": {"mean": mean, "standard_error": None, "n": 1}},
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
    files.write_records(workdir / "trajectories" / f"step_{steps:06d}.jsonl.gz", trajectories)


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
        for asked in one["answers"]:
            asked |= {"question": HOSTILE, "kind": HOSTILE, "gold": [HOSTILE]}
        for written in one["steps"]:
            written["operations"] += [{"status": HOSTILE, "item_id": HOSTILE, "action": HOSTILE, "content": HOSTILE}]
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


def test_the_reward_and_its_parts(workdir, plain_rollouts):
    # Where the evidence was written r_EARA = 1/2 · 1/2 + 1/2 · 1 = 3/4; one of two lines is valid; r_comp = 1 - 18/23.
    fill(workdir, plain_rollouts)
    page = page_of(workdir)
    assert "reward 1.261 from credit 0.750 · chunk 0.000 · format 0.500 · compression 0.217" in page.text
    assert "evidence contribution 1.000" in page.text
    assert "credit from the global score 0.125" in page.text
    assert "credit rule full" in page.text
    # Nobody judged content, and nothing was compared with the starting weights.
    assert not re.search("content 0|content judge|kl 0|starting weights", page.text)


def test_parts_that_only_some_runs_have(workdir):
    judged = [dataclasses.replace(one, steps=tuple(map(with_verdicts, one.steps))) for one in typed_rollouts()]
    trajectories = recorded(judged, "mem_alpha", kl=[[[0.5, 0.25], [0.0, 0.0]]])
    fill(workdir, trajectories)
    lines = [{"step": t} | METRICS | {"reward/content": 0.5, "reward/kl": 1.5} for t in range(3)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(workdir)
    for words in ("content 0.500", "kl 0.250", "content judge 0.500", "log-ratio 1.500"):
        assert words in page.text
    assert "worth keeping" in page.text
    assert "not worth keeping" in page.text


def with_verdicts(one):
    """A step whose first operation a judge liked, unlike the second."""
    return dataclasses.replace(one, verdicts=(True, False)[: len(one.outcomes)])


def test_operations_show_what_they_did_and_earned(workdir):
    trajectories = recorded(typed_rollouts())
    fill(workdir, trajectories)
    page = page_of(workdir)
    for words in (
        "insert semantic #1 Ana lives in Rome.",
        "update semantic #1 Ana lives in Rome. Ana lives in Oslo.",
        "delete episodic #2 2024: Ana was in Peru.",
        "cited #1 semantic Ana lives in Oslo. from chunk 2, operation 1",
    ):
        assert words in page.text
    assert page.text.count("cited #") == 1
    source = (workdir / "report.html").read_text(encoding="utf-8")
    assert "<del>2024: Ana was in Peru.</del>" in source
    # Half of r_global goes to all steps alike: 1/4 to each, 1/8 to each of its operations. Of the other half, each of
    # the two that wrote evidence gets 1/4. A full bar takes half the width: 3/8 is full, and 1/8 a third of that.
    bars = re.findall(r"<td>\d</td>.*?<i style='width:([\d.]+)%'></i></span><b>(.*?)</b>", source)
    assert bars == [("16.7", "+0.125"), ("50.0", "+0.375"), ("50.0", "+0.375"), ("16.7", "+0.125")]


def test_negative_credit_points_the_other_way(workdir):
    # The item came to 1, and deleting it brought that down to 1/4.
    states = Probes(empty=(0.0,), states=(((1.0,), (0.25,)),))
    one = trajectory([step([inserted(), deleted(item())])], answers(0.25), probes=states)
    fill(workdir, recorded([one, dataclasses.replace(one, rollout=1)], "step_gain"))
    assert "insert #1 m+1.000" in page_of(workdir).text
    source = (workdir / "report.html").read_text(encoding="utf-8")
    assert "<span class='signed up'><span class=bar><i style='width:50.0%'></i></span><b>+1.000</b>" in source
    assert "<span class='signed down'><span class=bar><i style='width:37.5%'></i></span><b>-0.750</b>" in source


@pytest.mark.parametrize(("rule", "at_once"), [("hindsight", True), ("full", False), ("of another version", False)])
def test_rules_without_credit_say_so(workdir, plain_rollouts, rule, at_once):
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"credit.rule": rule}))
    fill(workdir, plain_rollouts)
    assert ("makes advantages of them at once" in page_of(workdir).text) == at_once


def of_an_earlier_version(record):
    """The record as it was before there were rules, types and single operations."""
    record = json.loads(json.dumps(record))
    del record["probes"]
    for one in record["steps"]:
        del one["chunk"], one["token_operations"]
        one["rewards"] = {"evidence" if k == "credit" else k: v for k, v in one["rewards"].items()}
        del one["rewards"]["content"], one["rewards"]["kl"]
        for operation in one["operations"]:
            for name in ("credit", "reward", "advantage", "memory_type", "previous"):
                operation.pop(name, None)
    for asked in record["answers"]:
        del asked["gold_steps"], asked["cited"]
    evidence = [stored for asked in record["answers"] for stored in asked["evidence"]]
    for stored in [*evidence, *(stored for one in record["steps"] for stored in one["memory"])]:
        del stored["source_operation"], stored["memory_type"]
    return record


def test_a_run_of_an_earlier_version_shows_what_it_has(workdir, plain_rollouts):
    (workdir / "config.json").write_text(json.dumps({"experiment": "an old run", "train.num_steps": 5}))
    fill(workdir, [of_an_earlier_version(record) for record in plain_rollouts])
    lines = [{"step": t, "reward/total": 0.5, "reward/evidence": 0.125} for t in range(3)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # It wrote NaN where there was nothing to estimate.
    old = evaluation(0.0, 0.5, 0) | {"by_kind": {"plain": {"mean": 0.25, "standard_error": math.nan, "n": 1}}}
    (workdir / "evaluation.json").write_text(json.dumps({"before": old}))
    page = page_of(workdir)
    for words in ("evidence 0.125", "from evidence 0.750", "New text:\nAna moved to Oslo.", "0.250 ± –", "advantage"):
        assert words in page.text
    assert "credit" not in page.text


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
    assert "Not measured in this run: What became of what was written, Valid operations by kind" in page.text


@pytest.mark.parametrize("broken", ["[]", "{", '{"before": {}}', '{"before": 3}'])
def test_a_broken_evaluation_is_named(workdir, broken):
    (workdir / "evaluation.json").write_text(broken)
    assert re.search(r"evaluation\.json could not be read|No evaluation yet", page_of(workdir).text)


def test_benchmarks_are_shown_where_there_are_some(workdir):
    assert "Benchmarks" not in page_of(workdir).text
    tables = [{"header": ["score", "squad"], "rows": [["rag", "0.250 ± 0.100"]]}]
    (workdir / "benchmark.json").write_text(json.dumps({"tables": tables, "notes": ["Published rows: none."]}))
    page = page_of(workdir).text
    assert "Benchmarks" in page and "0.250 ± 0.100" in page and "Published rows: none." in page
    (workdir / "benchmark.json").write_text('{"tables": 7}')
    assert "benchmark.json could not be read" in page_of(workdir).text


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
    got = report_plots.moving_average([math.nan, 4.0, 1.0, math.nan, 2.0], decay=0.5)
    assert math.isnan(got[0])
    assert got[1:] == pytest.approx([4.0, 2.0, 2.0, 2.0])


def test_moving_average_of_a_constant_is_that_constant():
    assert report_plots.moving_average([3.0] * 50) == pytest.approx([3.0] * 50)


def test_likelihoods_and_missing_scores_are_shown():
    likelihoods = Likelihood(-1.0, False), None, Likelihood(-9.0, True, 0.75)
    scores = None, None, 0.5
    asked = [answer(score, likelihood=one) for score, one in zip(scores, likelihoods, strict=True)]
    rollout = trajectory([step(answers=asked)], answers(1.0))
    shown = [report_rollouts._score(record) for record in recorded([rollout, rollout])[0]["steps"][0]["answers"]]
    assert [re.sub("<.*?>", "", one) for one in shown] == ["– p 0.368", "–", "0.500 p 0.750"]
    assert "good" not in shown[0] and "good" in shown[2]
