"""Writes small Hugging Face folders with a tokenizer; shared by tests."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# As Qwen and SmolLM2 frame messages.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3 does: a token at the start, contents trimmed, a date, tokens that end headers.
LLAMA = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}{{ 'Today: ' + date_string }}"
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '<|end_head|>\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>\n\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|end_head|>")


def backend(ignore_merges=False):
    """Bytes, a few merges, five special tokens, and one that is only added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.add_tokens([tokenizers.AddedToken("<tool_call>", special=False, normalized=False)])
    return made


def write_tokenizer(folder, template=CHATML, **changes):
    """Writes tokenizer.json and the files beside it.

    Args:
        changes: Fields of tokenizer_config.json.
    """
    made = backend()
    made.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "special": True}}
    fields |= {"pad_token": "<|endoftext|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | changes))
    ends = [made.token_to_id("<|im_end|>"), made.token_to_id("<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.7}))
    return folder
