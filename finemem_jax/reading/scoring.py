"""Scores an answer against gold answers: the metrics of the data sources, each a number in [0, 1].

Knows nothing of readers. A metric is a plain function of the prediction and the golds; METRICS names them, JUDGED
names those that a language model decides instead.

A gold that is blank matches nothing, under every metric.
"""

from __future__ import annotations

import collections
import decimal
import functools
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from finemem_jax.types import Question

MetricFn = Callable[[str, Sequence[str]], float]

_DELETED = str.maketrans("", "", string.punctuation + "“”‘’–—")
_ASCII_DELETED = str.maketrans("", "", string.punctuation)
_ARTICLES = frozenset(("a", "an", "the"))
_WORD = re.compile(r"\w+")
_BOX = "\\boxed{"
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_ANSWER = re.compile("answer:", re.IGNORECASE)
_NO_PARTIAL_CREDIT = frozenset(("yes", "no", "noanswer"))

# fmt: off
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
# Digits, with commas at thousands and a fraction if any; or a word that is no part of a longer or hyphenated one
# ("thirty-one" is not 1).
_NUMBER = re.compile(
    r"(?P<digits>(?:(?<!\w)-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?)"
    rf"|(?<![\w-])(?P<word>{'|'.join(_NUMBER_WORDS)})(?![\w-])"
)


def score(prediction: str, question: Question) -> float:
    """Gives s_j in [0, 1]: how good `prediction` is, by the question's own metric.

    Raises:
        ValueError: the metric is unknown or one of `JUDGED`, or the question has no answers.
    """
    if question.metric in JUDGED:
        raise ValueError(
            f"Question.metric={question.metric!r} is decided by a language model, which scoring.score does not ask; "
            f"have a judge score the answer, or set one of {', '.join(sorted(METRICS))}."
        )
    if question.metric not in METRICS:
        raise ValueError(
            f"Question.metric must be one of {', '.join(sorted(METRICS))}, or, decided by a language model, of "
            f"{', '.join(JUDGED)}; got {question.metric!r}."
        )
    if not question.answers:
        raise ValueError(
            f"Question.answers must hold at least one gold answer, got none for {question.text!r}; "
            "drop the question in its data builder, or give it an answer."
        )
    return METRICS[question.metric](prediction, question.answers)


def substring(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction holds a gold as whole words, both normalized; else 0. "art" is not in "party".

    A gold of which normalizing leaves nothing is compared less strictly. Articles alone ("A", of a multiple choice)
    are looked for as words; punctuation alone ("?") is looked for as it stands.
    """
    return float(any(_holds(prediction, gold) for gold in golds))


def supports(text: str, answer: str) -> bool:
    """Tells whether every word of an answer stands in a text, both normalized; nothing supports a blank answer."""
    wanted = normalize(answer).split()
    return bool(wanted) and set(wanted) <= set(normalize(text).split())


def contains(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction holds the first gold, letter for letter but for case; else 0. "art" is in "party".

    The published rule (Mem-alpha's SubEM of SQuAD and HotpotQA), which reads the first gold only. `substring`
    is stricter on words, kinder on punctuation and articles, and takes any gold.
    """
    gold = golds[0].lower()
    return float(bool(gold.strip()) and gold in prediction.lower())


def exact(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction equals a gold, both normalized (a gold that this empties: as in `substring`); else 0."""
    return float(any(_equals(prediction, gold) for gold in golds))


def keyword_recall(prediction: str, golds: Sequence[str]) -> float:
    """Fraction of the keywords that the prediction holds, case aside.

        |{w in keywords : w in prediction}| / |keywords|,      keywords = first gold, split on ", "

    Plain containment, without stemming, as published for BookSum and InfBench-Sum. Further golds
    are not read. A keyword listed twice counts twice.
    """
    return keyword_list(prediction, golds[0].split(", "))


def keyword_recall_comma(prediction: str, golds: Sequence[str]) -> float:
    """Like `keyword_recall`, but splits the first gold on ",", as Mem-alpha's training reward does for BookSum.

    A keyword that holds a comma ("1,204") falls apart.
    """
    return keyword_list(prediction, golds[0].split(","))


def keyword_list(prediction: str, golds: Sequence[str]) -> float:
    """Like `keyword_recall`, but each gold is one keyword, as Mem-alpha evaluates InfBench-Sum."""
    return _fraction_held(prediction.lower(), golds)


def all_elements(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction holds every gold, case aside; else 0. Blank golds are left out; if all are blank, 0.

    MemoryAgentBench's recall of EventQA: the golds are the elements of one answer, not choices.
    """
    return float(keyword_list(prediction, golds) == 1)


def parts(prediction: str, golds: Sequence[str]) -> float:
    """Fraction of the first gold's parts, set apart by ";", that the prediction holds, case aside.

    Mem-alpha's rule for PerLTQA with its bug mended: see `parts_cased`. Empty parts are none; published, they always
    count as held. Without ";" it is `contains`.
    """
    if ";" not in golds[0]:
        return contains(prediction, golds)
    return _fraction_held(prediction.lower(), golds[0].split(";"))


def parts_cased(prediction: str, golds: Sequence[str]) -> float:
    """Like `parts`, with the published bug: of a gold with ";", the parts are lowercased and the prediction is not.

    "Oslo" then holds no "Oslo; Bergen", and "oslo" holds half of it.
    """
    if ";" not in golds[0]:
        return contains(prediction, golds)
    return _fraction_held(prediction, golds[0].split(";"))


def parsed_substring(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction, or the answer parsed from it, holds a gold; else 0. "art" is in "party".

    All normalized as in `squad_exact`. MemoryAgentBench's rule for RULER, and its default. The parsed answer is what
    follows "Answer:" on its line, or else the first line. A gold that normalizing empties ("A", "?") matches nothing;
    published, it is in every prediction.
    """
    return _squad_substring(_readings(prediction), golds)


def answer_substring(prediction: str, golds: Sequence[str]) -> float:
    """Like `parsed_substring`, but the parsed answer alone is read, as MemoryAgentBench's router has it for ICL.

    Lenient with labels: "11" holds "1". Mem-alpha scores its baselines so, and itself by `boxed`.
    """
    return _squad_substring([_parsed(prediction)], golds)


def parsed_exact(prediction: str, golds: Sequence[str]) -> float:
    """`squad_exact` of the prediction or of the answer parsed from it (see `parsed_substring`); the better of both.

    MemoryAgentBench's rule for DetectiveQA. It fails on "label: 43", which parsing leaves as it is.
    """
    return max(squad_exact(text, golds) for text in _readings(prediction))


def number(prediction: str, golds: Sequence[str]) -> float:
    """1 if the first number in the prediction equals the first number in a gold; else 0.

    A number is written in digits ("1,204", "-3", "12th", "3.5") or as a word from zero to twenty. Hyphenated words
    ("twenty-one") are not read. 0 if either side has no number.
    """
    predicted = _first_number(prediction)
    return float(predicted is not None and any(predicted == _first_number(gold) for gold in golds))


def boxed(prediction: str, golds: Sequence[str]) -> float:
    """1 if the boxed label is the first gold; else 0.

    The published rule for classification: the content of the first \\boxed{…}, or all of the
    prediction if nothing is boxed, without outer quotes and spaces, must be digits only and equal the gold as a
    string ("03" is not "3"). Further golds are not read.
    """
    label = _boxed_content(prediction).strip(string.whitespace + "\"'")
    return float(label.isdecimal() and label == golds[0].strip())


def boxed_text(prediction: str, golds: Sequence[str]) -> float:
    """1 if what is boxed equals a gold, letter for letter but for outer spaces; else 0. Without a box, all is read.

    Mem-alpha's rule for DetectiveQA. Published, it compares with the list of golds, which no text equals.
    """
    content = _boxed_content(prediction).strip()
    return float(bool(content) and any(content == gold.strip() for gold in golds))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Overlap of words, as for SQuAD; the best over the golds.

        F1 = 2 P R / (P + R) = 2 |p ∩ g| / (|p| + |g|)

    p and g are the normalized words of prediction and gold, as multisets (a gold that normalizing empties: as in
    `substring`).
    """
    return max(_token_f1(prediction, gold) for gold in golds)


def squad_exact(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction equals a gold, both normalized by SQuAD v1.1's script; else 0.

    Lowercase, ASCII punctuation deleted, a, an, the deleted as words, one space between words. “” and – stay, where
    `exact` deletes them. Golds that this empties ("The") equal each other and the empty prediction.
    """
    return float(_squad_normalize(prediction) in {_squad_normalize(gold) for gold in golds if gold.strip()})


def squad_f1(prediction: str, golds: Sequence[str]) -> float:
    """`token_f1` under the normalisation of `squad_exact`; the best over the golds."""
    predicted = _squad_normalize(prediction).split()
    return max(_overlap_f1(predicted, _squad_normalize(gold).split()) for gold in golds)


def hotpot_f1(prediction: str, golds: Sequence[str]) -> float:
    """`squad_f1`, but 0 where prediction or gold is yes, no or noanswer and they differ; the best over the golds.

    HotpotQA's script, which gives "no" nothing against "no one".
    """
    predicted = _squad_normalize(prediction)
    rivals = [_squad_normalize(gold) for gold in golds]
    fair = [gold for gold in rivals if gold == predicted or _NO_PARTIAL_CREDIT.isdisjoint((gold, predicted))]
    return max((_overlap_f1(predicted.split(), gold.split()) for gold in fair), default=0.0)


def rouge_l(prediction: str, golds: Sequence[str]) -> float:
    """Longest common subsequence of words, as ROUGE-L's F1; the best over the golds.

        F1 = 2 P R / (P + R) = 2 LCS(p, g) / (|p| + |g|)

    p and g are lowercase runs of letters, digits and underscores. No stemming, articles kept.
    """
    predicted = _WORD.findall(prediction.lower())
    return max(_rouge_l(predicted, _WORD.findall(gold.lower())) for gold in golds)


def rouge_l_stemmed(prediction: str, golds: Sequence[str]) -> float:
    """`rouge_l` as the rouge-score package has it with use_stemmer=True; the best over the golds.

    Words are lowercase runs of a–z and 0–9, brought to their Porter stem from four letters on. A gold in another script
    has no words, and scores 0.

    Raises:
        ValueError: rouge-score is not installed.
    """
    # The package's own table takes quadratic time and memory; only its words are wanted.
    words = _stemming_tokenizer().tokenize
    predicted = words(prediction)
    return max(_rouge_l(predicted, words(gold)) for gold in golds)


def parsed_rouge_l(prediction: str, golds: Sequence[str]) -> float:
    """`rouge_l_stemmed` of the prediction or of the answer parsed from it (see `parsed_substring`); the better of both.

    MemoryAgentBench's ROUGE-L of InfBench. Where a summary's first line is closer to the gold, nothing else counts.

    Raises:
        ValueError: rouge-score is not installed.
    """
    return max(rouge_l_stemmed(text, golds) for text in _readings(prediction))


METRICS: Mapping[str, MetricFn] = {
    "substring": substring,
    "contains": contains,
    "exact": exact,
    "keyword_recall": keyword_recall,
    "keyword_recall_comma": keyword_recall_comma,
    "keyword_list": keyword_list,
    "all_elements": all_elements,
    "parts": parts,
    "parts_cased": parts_cased,
    "parsed_substring": parsed_substring,
    "answer_substring": answer_substring,
    "parsed_exact": parsed_exact,
    "number": number,
    "boxed": boxed,
    "boxed_text": boxed_text,
    "token_f1": token_f1,
    "squad_exact": squad_exact,
    "squad_f1": squad_f1,
    "hotpot_f1": hotpot_f1,
    "rouge_l": rouge_l,
    "rouge_l_stemmed": rouge_l_stemmed,
    "parsed_rouge_l": parsed_rouge_l,
}

# Metrics that a language model decides: CORRECT or WRONG, whatever the question; LongMemEval's yes or no, worded by the
# type of question; the same in its wording for preferences, which Mem-alpha uses for questions of every type.
JUDGED = ("judge", "judge_longmemeval", "judge_preference")


def normalize(text: str, keep_articles: bool = False) -> str:
    """Brings a text into the form in which answers are compared.

    Lowercase, Unicode NFC, ASCII punctuation and “”‘’–— deleted (not replaced: "well-known" gives "wellknown"), the
    words a, an, the dropped, one space between words.
    """
    text = unicodedata.normalize("NFC", text.lower()).translate(_DELETED)
    return " ".join(word for word in text.split() if keep_articles or word not in _ARTICLES)


def _comparable(prediction: str, gold: str) -> tuple[str, str]:
    """Normalises both as far as leaves something of the gold; an empty second value means that it is blank."""
    if normalize(gold):
        return normalize(prediction), normalize(gold)
    if normalize(gold, keep_articles=True):
        return normalize(prediction, keep_articles=True), normalize(gold, keep_articles=True)
    return " ".join(prediction.lower().split()), " ".join(gold.lower().split())


def _holds(prediction: str, gold: str) -> bool:
    predicted, wanted = _comparable(prediction, gold)
    if not wanted:
        return False
    if not normalize(gold, keep_articles=True):  # Punctuation, which sticks to words.
        return wanted in predicted
    return f" {wanted} " in f" {predicted} "


def _equals(prediction: str, gold: str) -> bool:
    predicted, wanted = _comparable(prediction, gold)
    return bool(wanted) and predicted == wanted


def _fraction_held(text: str, keywords: Iterable[str]) -> float:
    """Gives the fraction of the keywords, lowercased and without outer spaces, that stand in a text as it is."""
    wanted = [keyword.strip().lower() for keyword in keywords if keyword.strip()]
    return sum(keyword in text for keyword in wanted) / max(len(wanted), 1)


def _readings(prediction: str) -> tuple[str, str]:
    return prediction, _parsed(prediction)


def _parsed(prediction: str) -> str:
    """Gives the rest of the line after the first "Answer:", in any case, and after a second one there; or line one."""
    found = _ANSWER.search(prediction)
    line = prediction[found.end() if found else 0 :].partition("\n")[0].strip()
    again = _ANSWER.match(line)
    return line[again.end() :].strip() if again else line


def _squad_substring(texts: Iterable[str], golds: Sequence[str]) -> float:
    held = [_squad_normalize(text) for text in texts]
    wanted = filter(None, map(_squad_normalize, golds))
    return float(any(gold in text for gold in wanted for text in held))


def _squad_normalize(text: str) -> str:
    # By \b, an article ends at any character that is no letter or digit: "the–cat" loses its "the".
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_ASCII_DELETED)).split())


def _boxed_content(prediction: str) -> str:
    # A regular expression would take quadratic time on boxes that never close.
    _, box, rest = prediction.partition(_BOX)
    content, closing, _ = rest.partition("}")
    return content if box and closing else prediction


def _first_number(text: str) -> decimal.Decimal | None:
    found = _NUMBER.search(text.lower())
    if found is None:
        return None
    if found["word"]:
        return decimal.Decimal(_NUMBER_WORDS.index(found["word"]))
    # Decimal, not int: exact on fractions, and it takes any number of digits.
    return decimal.Decimal(found["digits"].replace(",", ""))


def _token_f1(prediction: str, gold: str) -> float:
    predicted, wanted = (text.split() for text in _comparable(prediction, gold))
    return _overlap_f1(predicted, wanted)


def _overlap_f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    overlap = collections.Counter(predicted) & collections.Counter(wanted)
    return 2 * overlap.total() / max(len(predicted) + len(wanted), 1)


def _rouge_l(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    return 2 * _longest_common_subsequence(predicted, wanted) / max(len(predicted) + len(wanted), 1)


@functools.cache
def _stemming_tokenizer() -> Any:
    try:
        from rouge_score import tokenizers
    except ImportError:
        raise ValueError(
            "The metrics rouge_l_stemmed and parsed_rouge_l need the rouge-score package; "
            "run: uv pip install -e '.[rouge]', or use rouge_l, which does not stem."
        ) from None
    return tokenizers.DefaultTokenizer(use_stemmer=True)


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Gives the length of the LCS, one table row per integer (Hyyrö 2004): summaries of 1,000 words take 1 ms."""
    places = collections.defaultdict(int)
    for place, word in enumerate(right):
        places[word] |= 1 << place
    all_ones = (1 << len(right)) - 1
    row = all_ones  # A zero bit marks a place of `right` where the LCS so far grows by one.
    for word in left:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & all_ones
    return len(right) - row.bit_count()
