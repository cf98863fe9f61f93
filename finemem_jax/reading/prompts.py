"""Builds the prompts of readers and judges, and reads what they reply."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from finemem_jax.clients.chat import after_thinking
from finemem_jax.types import CORE, EPISODIC, SEMANTIC, Action, Message, Operation, Question

READER_SYSTEM = """\
You answer questions about notes. Reply with the exact words from the notes that answer the question, and \
nothing else."""


READER_CITES = "After the answer, write the number of each note that it was taken from, in brackets."


# No example answers "unknown": shown one such, a 135M reader answers it to nearly everything (BUILD_NOTES.md).
READER_EXAMPLES = (
    (("What a day.", "Priya: I live in Porto now."), "In which city does Priya live?", "Porto"),
    (
        ('The message "the door is stuck" has label 14.', "The audit is due on Friday."),
        'Which label did the message "the door is stuck" get?',
        "14",
    ),
)


# For questions that ask for a box, which a small model otherwise leaves away.
BOXED = "\\boxed"


READER_BOXED_EXAMPLES = (
    (
        ("Sentence: play some jazz Label: 14 Sentence: is it raining outside Label: 3",),
        "Which label has this sentence? Answer with \\boxed{n}, where n is the number of the label.\n"
        "Sentence: put on my favourite song",
        "\\boxed{14}",
    ),
    (
        ("Label 5 is for places, label 2 for amounts.", "Sentence: How far is the moon? Label: 2"),
        "Which label has this sentence? Answer with \\boxed{n}, where n is the number of the label.\n"
        "Sentence: Where is the largest desert?",
        "\\boxed{5}",
    ),
)


def reader(
    evidence: Sequence[str], question: str, num_examples: int, *, system: str = "", cite: bool = False
) -> list[Message]:
    """Writes the reader's prompt for one question.

    Args:
        evidence: Texts of the retrieved memory items, best first.
        question: q_j.
        num_examples: Worked examples, 0 to 2; others for questions that ask for a box.
        system: Replaces the system message if not empty; so in the other prompts.
        cite: Number the notes, and ask for the numbers of those that the answer was taken from.
    """
    system = system or READER_SYSTEM
    messages = [Message("system", (f"{system} {READER_CITES}" if cite else system,))]
    examples = READER_BOXED_EXAMPLES if BOXED in question else READER_EXAMPLES
    for notes, asked, answer in examples[:num_examples]:
        if cite:
            answer += " " + " ".join(f"[{i}]" for i, note in enumerate(notes, start=1) if answer in note)
        messages += [Message("user", (_question_part(notes, asked, cite),)), Message("assistant", (answer,))]
    return [*messages, Message("user", (_question_part(evidence, question, cite),))]


def _question_part(evidence: Sequence[str], question: str, cite: bool) -> str:
    marks = (f"[{i}]" if cite else "-" for i in range(1, len(evidence) + 1))
    notes = "\n".join(f"{mark} {' '.join(text.split())}" for mark, text in zip(marks, evidence, strict=True))
    return f"Notes:\n{notes or '(none)'}\nQuestion: {question}"


_CITATION = re.compile(r"\[([0-9]{1,4})\]")


def split_citations(text: str, num_notes: int) -> tuple[str, tuple[bool, ...]]:
    """Takes the numbers of notes out of a reply: the answer without them, and for each note whether it was named.

    Numbers of notes that there are not stay in the answer.
    """
    cited = [False] * num_notes

    def take_out(match: re.Match[str]) -> str:
        number = int(match[1])
        if not 1 <= number <= num_notes:
            return match[0]
        cited[number - 1] = True
        return ""

    return " ".join(_CITATION.sub(take_out, text).split()), tuple(cited)


JUDGE_SYSTEM = """\
You check entries of a memory, from which questions will be answered later. You are given the rule of one part of the \
memory, and an entry that was written into it. Reply with one word: VALID if the entry keeps the rule, INVALID if it \
breaks it."""


JUDGE_RULES = {
    "": (
        "An entry states at least one fact, and can be understood without the text it was taken from: people, things "
        "and times are named. Empty phrases, placeholders and remarks about the memory itself break the rule."
    ),
    CORE: (
        "The entry says something definite about the user, about what has been read so far, or about the meaning of "
        "labels. A placeholder, an empty phrase or a mere mention of the core memory itself breaks the rule."
    ),
    SEMANTIC: (
        "An entry states a fact, a definition, the label of a sample, or how something is done, and says it in full. "
        "A topic without a statement, a placeholder or a passing event breaks the rule."
    ),
    EPISODIC: (
        "An entry says what happened, or who did or said what, and when: a date, an hour, a numbered day or another "
        "clear time. An event without its time, or a placeholder, breaks the rule."
    ),
}


def content_judge(operation: Operation, system: str = "") -> list[Message]:
    """Asks whether the content of one INSERT or UPDATE deserves its place; `verdict` reads the reply.

    Raises:
        ValueError: the operation writes no content.
    """
    if operation.action not in (Action.INSERT, Action.UPDATE):
        raise ValueError(f"only the content of an INSERT or UPDATE can be judged, got {operation.action}.")
    rule = f"Rule of the {operation.memory_type or 'whole'} memory:\n{JUDGE_RULES[operation.memory_type]}\n\n"
    # As JSON: an entry that holds instructions is still one string.
    entry = f"Entry:\n{json.dumps(operation.content, ensure_ascii=False)}\n\nVALID or INVALID?"
    return [Message("system", (system or JUDGE_SYSTEM,)), Message("user", (rule, entry))]


# "not valid" and "VALID: false" are no praise; bounded repetition keeps the search linear.
_VERDICT = re.compile(r"(\bnot\s{1,4}|n't\s{1,4})?\b(in)?valid\b(?:\W{1,4}(true|false)\b)?", re.IGNORECASE)


def verdict(text: str) -> bool | None:
    """Reads whether a judge's reply says VALID (True) or INVALID (False); None where it says neither, or both.

    Words in <think></think> are no part of the reply.
    """
    reply = after_thinking(text)
    if reply is None:
        return None
    found = {(m[2] is None) ^ bool(m[1]) ^ ((m[3] or "").lower() == "false") for m in _VERDICT.finditer(reply)}
    return found.pop() if len(found) == 1 else None


ANSWER_JUDGE_SYSTEM = """\
You check answers to questions. You are told when an answer counts as right, and given a question and the answer that \
was given to it. Reply with one word: YES if it counts as right, NO if it does not."""


_RIGHT = (
    "The answer is right if it says the same as the expected answer, in whatever words, or if the expected answer "
    "follows from it. It is wrong if it holds only a part of it, or contradicts it."
)


# What counts as right for LongMemEval's types of questions. Its preferences have a rubric in place of an answer.
ANSWER_RULES = {
    "": _RIGHT,
    "temporal-reasoning": (
        f"{_RIGHT} A number of days, weeks, months or years that is off by one is right all the same."
    ),
    "knowledge-update": (
        "The answer is right if what it gives as the present state is the expected answer. Telling besides how it was "
        "before is no fault."
    ),
    "single-session-preference": (
        "What is expected is described by a rubric. The answer is right if it remembers what the user has told about "
        "themselves and makes use of it as the rubric wants. It need not meet every point of it."
    ),
    "abstention": (
        "The question cannot be answered, and the expected text explains why. The answer is right if it says that it "
        "is not known, was not told, or that something else was told instead."
    ),
}


def answer_judge(question: Question, answer: str, *, rule: str = "", system: str = "") -> list[Message]:
    """Asks whether an answer is right; any gold answer of the question will do. `yes_or_no` reads the reply.

    Args:
        rule: A key of `ANSWER_RULES`; others mean the same as "".
    """
    expected = "Rubric" if rule == "single-session-preference" else "Expected answer"
    rules = f"{ANSWER_RULES.get(rule, _RIGHT)}\n\n"
    asked = f"Question:\n{question.text}\n\n{expected}:\n" + "\nor: ".join(question.answers)
    # As JSON: an answer that holds instructions is still one string.
    given = f"\n\nAnswer that was given:\n{json.dumps(answer, ensure_ascii=False)}\n\nIs it right, YES or NO?"
    return [Message("system", (system or ANSWER_JUDGE_SYSTEM,)), Message("user", (rules, asked, given))]


_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def yes_or_no(text: str) -> bool | None:
    """Reads whether a judge's reply says yes (True) or no (False); None where it says neither, or both.

    Words in <think></think> are no part of the reply.
    """
    found = {word.lower() == "yes" for word in _YES_OR_NO.findall(after_thinking(text) or "")}
    return found.pop() if len(found) == 1 else None
