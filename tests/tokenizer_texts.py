"""Texts and chats that tokenizers are tried on; shared by tests."""

import random

import gguf
import pytest
import regex

from finemem_jax.types import Message
from finemem_jax.weights import files

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<jupyter_code>", "<gh_stars>"]
# Characters whose Unicode classes are old and settled, so that two libraries of different age agree on them.
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "0123456789.,-/:²½Ⅷ٣４",
    "áéïõüßñçøÅŁžđ",
    "αβγδεΩλμ",
    "абвгдеёЖЩъ",
    "שלוםעולם",
    "مرحبا",
    "नमस्तेदुनिया",
    "สวัสดีชาวโลก",
    "你好世界漢字仮名",
    "ひらがなカタカナー",
    "안녕하세요",
    "e\u0301a\u0308n\u0303o\u0302",  # letters and combining accents apart: nothing may compose them
    "😀🎉👩\u200d👩\u200d👧🇳🇴👍🏽❤️",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "“”‘’–—…€£°§¶",
    " \t\n\r",
    " \u00a0\u2003\u3000\u2028\x0b\x0c\x85",
    "\x00\x01\x1b\x7f\u200b\ufeff\ufffd\ue000",
]
WORDS = regex.findall(
    r"\S+",
    "the of and memory chunk update don't I'll it's they've we're he'd I'm DON'T 'tis Oslo Bergen Zürich naïve "
    "international tokenisation 1984 3.14 2,000,000 v0.1.2 e.g. http://example.org/a?b=c foo_bar fooBar CONSTANT",
)
SNIPPETS = [
    'def f(x):\n    return x ** 2  # "squared"\n',
    "for (int i = 0; i < n; ++i) { sum += a[i]; }\n",
    '{"action": "memory_insert", "content": "Ann\\u2019s cat is 3.", "id": null}',
    '[{"id": 12, "text": "a\\nb"}, {"id": 13}]',
    "<html><body class='x'>&amp;</body></html>",
    "| a | b |\n|---|---|\n",
    "$ pip install x==1.0\r\n>>> ",
]
LOOK_ALIKES = [*SPECIAL, "<|im_end", "|im_start|>", "<|im_end|", "<|IM_END|>", "<| im_end |>", "<|end|>", "<|start|>"]


def random_text(rng):
    """A few pieces of any kind, glued with or without space."""

    def piece():
        kind = rng.randrange(10)
        if kind < 3:
            return rng.choice(WORDS)
        if kind < 8:
            return "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 6)))
        if kind == 8:
            return rng.choice(LOOK_ALIKES)
        start = rng.randrange(20)
        return rng.choice(SNIPPETS)[start : start + rng.randint(5, 30)]

    return rng.choice(["", " ", " ", "  ", "\n"]).join(piece() for _ in range(rng.randint(0, 7)))


CHATS = {
    "one part": [Message("user", ("Where does Ann live?",))],
    "three parts": [Message("user", ("Read this.\n", "Chunk:\nAnn lives in Oslo.", "\nMemory:\n(empty)"))],
    "system": [Message("system", ("You manage a memory.",)), Message("user", ("Chunk one.", " Memory two."))],
    "worked example": [
        Message("system", ("Be brief.",)),
        Message("user", ("1 + 1?",)),
        Message("assistant", ("2",)),
        Message("user", ("2 + 2?", " Now.")),
    ],
}


def random_texts(count: int) -> list[str]:
    """Returns texts of all kinds of characters, the same at every call."""
    rng = random.Random(0)
    return ["", " ", "\n\n", *(random_text(rng) for _ in range(count))]


def smollm_file() -> gguf.GGUFReader:
    """Returns the file that holds SmolLM2's tokenizer; the test is skipped where it is not installed."""
    try:
        return gguf.GGUFReader(files.locate("embedded"))
    except ValueError as error:
        pytest.skip(f"needs SmolLM2's tokenizer: {error}")
