"""Loads tokenizers from Hugging Face folders and GGUF files."""

from __future__ import annotations

import pathlib
from typing import Any

import gguf
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from finemem_jax.models.tokenizer import BpeTokenizer, ChatTemplate
from finemem_jax.runtime import files


def from_folder(folder: pathlib.Path, thinking: bool = False) -> BpeTokenizer:
    """Builds the tokenizer of a Hugging Face folder: tokenizer.json, the chat template and the end tokens.

    Tokens that the folder marks as special are characters in content; those that it only adds, like Qwen's
    "<tool_call>", are tokens everywhere, as they are to transformers.

    Raises:
        ValueError: a file is missing or broken, the tokenizer is no byte-level BPE, or there is no chat template.
    """
    path = folder / "tokenizer.json"
    fields = files.read_json(path, "fetch it again")
    if not fields:
        raise ValueError(f"{folder} has no tokenizer.json; put the model's own there (transformers writes it).")
    kind = (fields.get("model") or {}).get("type"), (fields.get("decoder") or {}).get("type")
    if kind != ("BPE", "ByteLevel"):
        raise ValueError(
            f"{path}: a tokenizer of model and decoder {kind} is not supported; only byte-level BPE is, which all "
            "models of Llama 3, SmolLM2, Qwen2 and Qwen3 have."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library knows no narrower one.
        raise ValueError(f"{path} cannot be read ({error}); fetch it again.") from error
    config = files.read_json(folder / "tokenizer_config.json", "fetch it again")
    named = {
        name: config[name]["content"] if isinstance(config[name], dict) else config[name]
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if config.get(name)
    }
    ends: list[str] = []
    for source in ("generation_config.json", "config.json"):
        found = files.read_json(folder / source, "fetch it again").get("eos_token_id")
        if found is not None:
            for token_id in found if isinstance(found, list) else [found]:
                token = backend.id_to_token(token_id)
                if token is None:
                    raise ValueError(
                        f"{folder / source}: eos_token_id {token_id} is no token of {path}; both files must be of one "
                        "model: fetch them again."
                    )
                ends.append(token)
            break
    ends += [named["eos_token"]] if "eos_token" in named else []
    if not ends:
        raise ValueError(f"{folder} names no end token; set eos_token in tokenizer_config.json.")
    template = ChatTemplate(_chat_template(folder, config), thinking)
    return BpeTokenizer(backend, template, list(dict.fromkeys(ends)), named_tokens=named, source=folder)


def _chat_template(folder: pathlib.Path, config: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise ValueError(
            f"{folder} has no chat template; use an instruction-tuned model, or put a chat_template.jinja there."
        )
    return template


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


# How Llama 3 and Qwen2 split text before merging; they differ in how many digits stay together.
PATTERNS = {"llama-bpe": _SPLIT.replace("DIGITS", r"\p{N}{1,3}"), "qwen2": _SPLIT.replace("DIGITS", r"\p{N}")}


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind == "smollm":
        # Digits one by one, then GPT-2's rule.
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[kind]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def from_gguf(reader: gguf.GGUFReader, thinking: bool = False) -> BpeTokenizer:
    """Builds the tokenizer that an open GGUF file carries.

    Only the kinds of the supported models are accepted: "smollm", "llama-bpe" (Llama 3) and "qwen2" (and Qwen3).

    Raises:
        ValueError: the file carries another kind of tokenizer.
    """
    fields = {name.removeprefix("tokenizer.ggml."): field for name, field in reader.fields.items()}
    model, kind = (fields[name].contents() if name in fields else None for name in ("model", "pre"))
    if model != "gpt2" or kind not in ("smollm", "llama-bpe", "qwen2"):
        raise ValueError(
            f"model.weights: its tokenizer kind {(model, kind)} is not supported; use a GGUF with a gpt2/smollm, "
            "gpt2/llama-bpe or gpt2/qwen2 one (SmolLM2's, Llama 3's and Qwen's have it), or the model's folder."
        )
    if "tokenizer.chat_template" not in fields:
        raise ValueError("model.weights: the GGUF has no chat template; use an instruction-tuned model's.")
    tokens = fields["tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["merges"].contents()]
    kinds = fields["token_type"].contents()
    # Names of rows that only fill up the embedding are no tokens.
    unused = gguf.TokenType.UNUSED
    vocab = {token: i for i, (token, its) in enumerate(zip(tokens, kinds, strict=True)) if its != unused}
    # Llama 3 takes a word that is a token as it is, without asking how it would be merged.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(kind)
    backend.decoder = decoders.ByteLevel()
    for token, token_kind in zip(tokens, kinds, strict=True):
        if token_kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = token_kind == gguf.TokenType.CONTROL
            backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    named = {
        ours: tokens[fields[theirs].contents()]
        for ours, theirs in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("pad_token", "padding_token_id"),
        )
        if theirs in fields
    }
    ends = [tokens[fields[name].contents()] for name in ("eos_token_id", "eot_token_id") if name in fields]
    template = ChatTemplate(fields["tokenizer.chat_template"].contents(), thinking)
    return BpeTokenizer(backend, template, list(dict.fromkeys(ends)), named_tokens=named)
