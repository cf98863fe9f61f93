"""Scores an answer against gold answers: the metrics of the data sources, each a number in [0, 1].

Knows nothing of readers. A metric is a plain function of the prediction and the golds; METRICS names them.

A gold that is blank matches nothing, under every metric.
"""

from __future__ import annotations

import collections
import decimal
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from finemem_jax.episode import Question

MetricFn = Callable[[str, Sequence[str]], float]

_DELETED = str.maketrans("", "", string.punctuation + "“”‘’–—")
_ARTICLES = frozenset(("a", "an", "the"))
_WORD = re.compile(r"\w+")
_BOX = "\\boxed{"

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
        ValueError: the metric is unknown, or the question has no answers.
    """
    if question.metric not in METRICS:
        raise ValueError(f"Question.metric must be one of {', '.join(sorted(METRICS))}; got {question.metric!r}.")
    if not question.answers:
        raise ValueError(
            f"Question.answers must hold at least one gold answer, got none for {question.text!r}; "
            "drop the question in its data builder, or give it an answer."
        )
    return METRICS[question.metric](prediction, question.answers)


def substring(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction holds a gold as whole words, both normalised; else 0. "art" is not in "party".

    A gold of which normalising leaves nothing is compared less strictly. Articles alone ("A", of a multiple choice)
    are looked for as words; punctuation alone ("?") is looked for as it stands.
    """
    return float(any(_holds(prediction, gold) for gold in golds))


def supports(text: str, answer: str) -> bool:
    """Whether every word of an answer stands in a text, both normalised; a blank answer is supported by nothing."""
    wanted = normalise(answer).split()
    return bool(wanted) and set(wanted) <= set(normalise(text).split())


def contains(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction holds the first gold, letter for letter but for case; else 0. "art" is in "party".

    The published rule (Mem-alpha's SubEM of SQuAD and HotpotQA), which reads the first gold only. `substring`
    is stricter on words, kinder on punctuation and articles, and takes any gold.
    """
    gold = golds[0].lower()
    return float(bool(gold.strip()) and gold in prediction.lower())


def exact(prediction: str, golds: Sequence[str]) -> float:
    """1 if the prediction equals a gold, both normalised (a gold that this empties: as in `substring`); else 0."""
    return float(any(_equals(prediction, gold) for gold in golds))


def keyword_recall(prediction: str, golds: Sequence[str]) -> float:
    """Fraction of the keywords that the prediction holds, case aside.

        |{w in keywords : w in prediction}| / |keywords|,      keywords = first gold, split on ", "

    Plain containment, without stemming, as published for BookSum and InfBench-Sum. Further golds
    are not read. A keyword listed twice counts twice.
    """
    keywords = [keyword.strip() for keyword in golds[0].lower().split(", ") if keyword.strip()]
    lowered = prediction.lower()
    return sum(keyword in lowered for keyword in keywords) / max(len(keywords), 1)


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
    # A regular expression would take quadratic time on boxes that never close.
    _, box, rest = prediction.partition(_BOX)
    content, closing, _ = rest.partition("}")
    label = (content if box and closing else prediction).strip(string.whitespace + "\"'")
    return float(label.isdecimal() and label == golds[0].strip())


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Overlap of words, as for SQuAD; the best over the golds.

        F1 = 2 P R / (P + R) = 2 |p ∩ g| / (|p| + |g|)

    p and g are the normalised words of prediction and gold, as multisets (a gold that normalising empties: as in
    `substring`).
    """
    return max(_token_f1(prediction, gold) for gold in golds)


def rouge_l(prediction: str, golds: Sequence[str]) -> float:
    """Longest common subsequence of words, as ROUGE-L's F1; the best over the golds.

        F1 = 2 P R / (P + R) = 2 LCS(p, g) / (|p| + |g|)

    p and g are lowercase runs of letters, digits and underscores. No stemming, articles kept.
    """
    predicted = _WORD.findall(prediction.lower())
    return max(_rouge_l(predicted, _WORD.findall(gold.lower())) for gold in golds)


METRICS: Mapping[str, MetricFn] = {
    "substring": substring,
    "contains": contains,
    "exact": exact,
    "keyword_recall": keyword_recall,
    "number": number,
    "boxed": boxed,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def normalise(text: str, keep_articles: bool = False) -> str:
    """Brings a text into the form in which answers are compared.

    Lowercase, Unicode NFC, ASCII punctuation and “”‘’–— deleted (not replaced: "well-known" gives "wellknown"), the
    words a, an, the dropped, one space between words.
    """
    text = unicodedata.normalize("NFC", text.lower()).translate(_DELETED)
    return " ".join(word for word in text.split() if keep_articles or word not in _ARTICLES)


def _comparable(prediction: str, gold: str) -> tuple[str, str]:
    """Normalises both as far as leaves something of the gold; an empty second value means that it is blank."""
    if normalise(gold):
        return normalise(prediction), normalise(gold)
    if normalise(gold, keep_articles=True):
        return normalise(prediction, keep_articles=True), normalise(gold, keep_articles=True)
    return " ".join(prediction.lower().split()), " ".join(gold.lower().split())


def _holds(prediction: str, gold: str) -> bool:
    predicted, wanted = _comparable(prediction, gold)
    if not wanted:
        return False
    if not normalise(gold, keep_articles=True):  # Punctuation, which sticks to words.
        return wanted in predicted
    return f" {wanted} " in f" {predicted} "


def _equals(prediction: str, gold: str) -> bool:
    predicted, wanted = _comparable(prediction, gold)
    return bool(wanted) and predicted == wanted


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
    overlap = collections.Counter(predicted) & collections.Counter(wanted)
    return 2 * overlap.total() / max(len(predicted) + len(wanted), 1)


def _rouge_l(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    return 2 * _longest_common_subsequence(predicted, wanted) / max(len(predicted) + len(wanted), 1)


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
