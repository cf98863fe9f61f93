"""Writes a Decoder's parameters and its tokenizer as one GGUF file, which llama.cpp and what is built on it load.

Knows nothing of training. `gguf_weights` reads the same files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from finemem_jax.models import decoder, lora
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.runtime import files
from finemem_jax.weights import gguf_weights, hf_weights, tokenizer_files
from finemem_jax.weights.hf_weights import ExportedTokenizer

_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        kind: llama.cpp's name for how text is split before merging: "smollm", "llama-bpe" or "qwen2".
        tokens: As tokenizer.json writes them, by id; rows of the embedding that no token has are named, too.
        types: Of each token: a `gguf.TokenType`.
        merges: Pairs, each joined by a space; the first one goes first.
        ids: {name of llama.cpp's field: id}, e.g. {"bos": 1, "eos": 2, "eot": 3}.
        begins: Whether a text that is no chat begins with the token "bos".
        template: The chat template.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    begins: bool
    template: str


class _Place(NamedTuple):
    """A tensor of the file: where it lies in our parameters, and what it is there."""

    parameter: str
    layer: int | None
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType


def save(
    path: pathlib.Path,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: ExportedTokenizer,
    dtype: str = "float32",
) -> None:
    """Writes a model and its tokenizer as a GGUF file that llama.cpp, and `GgufFile`, load.

    One tensor at a time passes through the host. Nothing is at `path` until all is written. Adapters are merged into
    the matrices that they adapt. On several hosts all must call this; the first one writes.

    Args:
        path: Must not exist yet.
        tokenizer: Byte-level BPE, split as SmolLM2, Llama 3 or Qwen2 do. Its chat template is the file's.
        dtype: Of the matrices: "float32", "float16" or "bfloat16". Norms and biases are always float32, since
            llama.cpp adds and multiplies them in it.

    Raises:
        ValueError: the file is there already, llama.cpp knows no architecture of this shape or no tokenizer of this
            kind, or a weight is too large for float16.
    """
    config, params = lora.without(config), lora.merge(config, params)
    _check(path, config, dtype)
    tensors = _host_tensors(config, params, path, dtype=dtype)
    if jax.process_index() != 0:
        for _ in tensors:
            pass
        return
    words = vocabulary(tokenizer, config.vocab_size)
    with _new_file(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, config.family)
        try:
            _add_model(writer, config, dtype)
            _add_vocabulary(writer, words)
            for name, place in _places(config, dtype).items():
                size = math.prod(place.shape) * _numpy(place.type).itemsize
                writer.add_tensor_info(name, place.shape, _numpy(place.type), size, place.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor)
        finally:
            writer.close()


def _check(path: pathlib.Path, config: DecoderConfig, dtype: str) -> None:
    if dtype not in _TYPES:
        raise ValueError(f"the dtype of a GGUF file must be one of {', '.join(_TYPES)}; got {dtype!r}.")
    is_known = config.family in gguf_weights.FAMILIES
    usual = config.qkv_bias == (config.family == "qwen2") and config.qk_norm == (config.family == "qwen3")
    if not is_known or not usual or (config.rope_scaling and config.family != "llama"):
        raise ValueError(
            f"llama.cpp has no architecture of this shape (family={config.family!r}, qkv_bias={config.qkv_bias}, "
            f"qk_norm={config.qk_norm}, rope_scaling={config.rope_scaling}); a GGUF file can hold Llama models, Qwen2 "
            "with biases and Qwen3 with norms: set export.form='merged'."
        )
    hf_weights.refuse_existing(path)


@contextlib.contextmanager
def _new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a file to write into: it has its name once all is written, and is gone if something fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        unfinished = pathlib.Path(folder) / path.name
        yield unfinished
        os.rename(unfinished, path)


# --------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------


def _places(config: DecoderConfig, dtype: str) -> dict[str, _Place]:
    """{llama.cpp's name: place} of all tensors, in the order in which the file holds them."""
    exact = gguf.GGMLQuantizationType.F32
    found = {}
    for (parameter, layer), (name, shape) in gguf_weights.places(config).items():
        found[name] = _Place(parameter, layer, shape, _TYPES[dtype][0] if len(shape) == 2 else exact)
    if config.rope_scaling:
        found[gguf_weights.ROPE_FACTORS] = _Place("", None, (config.head_dim // 2,), exact)
    return found


def _numpy(kind: gguf.GGMLQuantizationType) -> np.dtype:
    """NumPy's dtype of a file's."""
    return jnp.dtype(next(name for name, (matrices, _) in _TYPES.items() if matrices == kind))


def _host_tensors(config: DecoderConfig, params: Params, path: pathlib.Path, *, dtype: str) -> Iterator[np.ndarray]:
    """Yields the arrays of `_places` as the file has them, one at a time."""
    for name, place in _places(config, dtype).items():
        array = _rope_factors(config) if not place.parameter else _host_tensor(config, params, place)
        assert array.shape == place.shape, (name, array.shape)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, _numpy(place.type))
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise ValueError(
                f"{path}: tensor {name!r} has entries beyond what float16 holds (65,504), or that are no numbers; set "
                "export.dtype to 'bfloat16' or 'float32'."
            )
        yield stored


def _host_tensor(config: DecoderConfig, params: Params, place: _Place) -> np.ndarray:
    array = hf_weights.host_array(params, place.parameter, place.layer)
    if place.parameter in gguf_weights.KERNELS:
        array = array.T
    heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(place.parameter)
    return _interleaved(array, heads) if heads and config.family == "llama" else array


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Puts rows of queries and keys in llama.cpp's order, of Llama's models only: it rotates neighbors together."""
    out_dim, in_dim = weight.shape
    halves = weight.reshape(num_heads, 2, out_dim // num_heads // 2, in_dim)
    return halves.swapaxes(1, 2).reshape(out_dim, in_dim)


def _rope_factors(config: DecoderConfig) -> np.ndarray:
    """What llama.cpp divides each rotary frequency by."""
    plain = decoder.rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
    return (plain / decoder.rotary_frequencies(config)).astype(np.float32)


# --------------------------------------------------------------------------------------
# Fields
# --------------------------------------------------------------------------------------


def _add_model(writer: gguf.GGUFWriter, config: DecoderConfig, dtype: str) -> None:
    writer.add_type("model")
    writer.add_name(config.name)
    writer.add_file_type(_TYPES[dtype][1])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.kind)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, token_id in words.ids.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(words.begins)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(words.template)


def vocabulary(tokenizer: ExportedTokenizer, num_rows: int) -> Vocabulary:
    """Reads what a tokenizer writes for transformers as what llama.cpp wants to know.

    Args:
        num_rows: V, of the model's embedding. llama.cpp wants as many tokens.

    Raises:
        ValueError: llama.cpp would split texts otherwise, or there is no chat template.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokenizer.save(folder)
        names = ("tokenizer.json", "tokenizer_config.json")
        fields, named = (files.read_json(folder / name, "fetch it again") for name in names)
        own = folder / "chat_template.jinja"
        template = own.read_text(encoding="utf-8") if own.is_file() else named.get("chat_template")
    if not isinstance(template, str):
        raise ValueError(
            "the tokenizer has no chat template to export; use an instruction-tuned model (model.weights)."
        )
    kind = _kind(fields)
    # The merges' lists of strings and of pairs become one form here.
    backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    tokens, types = _tokens(backend, fields["added_tokens"], num_rows)
    ids = _ids(backend, tokens, named, end_ids=tokenizer.end_ids)
    # A tokenizer that we read from a GGUF file has lost Llama 3's rule for texts.
    begins = "bos" in ids and (kind == "llama-bpe" or backend.encode("").ids[:1] == [ids["bos"]])
    return Vocabulary(kind, tokens, types, merges, ids, begins, template)


def _kind(fields: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text; whatever differs would give other tokens."""
    model = fields["model"]
    split = fields.get("pre_tokenizer") or {}
    steps = [_step(step) for step in split.get("pretokenizers", [split])]
    found = {
        "smollm": [("Digits", True), ("ByteLevel", False, True)],
        **{k: [("Split", pattern), ("ByteLevel", False, False)] for k, pattern in tokenizer_files.PATTERNS.items()},
    }
    kind = next((name for name, wanted in found.items() if steps == wanted), None)
    is_plain = model.get("type") == "BPE" and not model.get("byte_fallback") and not model.get("dropout")
    if kind is None or not is_plain or bool(model.get("ignore_merges")) != (kind == "llama-bpe"):
        raise ValueError(
            f"the tokenizer splits texts by {steps}, for which no name in llama.cpp is known here; a GGUF file can be "
            "written for tokenizers of SmolLM2, Llama 3, Qwen2 and Qwen3: set export.form='merged'."
        )
    stripping = [t["content"] for t in fields["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if stripping:
        raise ValueError(
            f"the tokens {', '.join(map(repr, stripping[:3]))} take the white space around them along or are whole "
            "words only, which a GGUF file cannot say; set export.form='merged'."
        )
    return kind


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    """What matters of a pre-tokenizer in tokenizer.json."""
    kind = step.get("type")
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "ByteLevel":
        return kind, step["add_prefix_space"], step["use_regex"]
    if kind == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return kind, step["pattern"].get("Regex", step["pattern"])
    return (kind,)


def _tokens(backend: tokenizers.Tokenizer, added: list[dict[str, Any]], num_rows: int) -> tuple[list[str], list[int]]:
    """Texts and types by id, one for each row of the embedding."""
    texts = {token_id: text for text, token_id in backend.get_vocab().items()}
    if max(texts) >= num_rows:
        raise ValueError(
            f"the tokenizer has ids up to {max(texts)}, but the model only {num_rows} embeddings; choose the tokenizer "
            "that belongs to the model (model.tokenizer)."
        )
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in added:
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    # As llama.cpp's own converter names rows that only fill up the embedding.
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(num_rows)]
    return tokens, [int(kinds.get(i, gguf.TokenType.UNUSED)) for i in range(num_rows)]


def _ids(
    backend: tokenizers.Tokenizer, tokens: list[str], named: dict[str, Any], *, end_ids: tuple[int, ...]
) -> dict[str, int]:
    """Ids by llama.cpp's names; a turn ends at "eos", "eot" and "eom", and at other tokens that it knows by text."""
    ids: dict[str, int] = {}
    for ours, theirs in (("bos_token", "bos"), ("pad_token", "pad")):
        text = named.get(ours)
        token_id = backend.token_to_id(text["content"] if isinstance(text, dict) else text) if text else None
        if token_id is not None:
            ids[theirs] = token_id
    ids["eos"] = end_ids[0]
    # Llama 3.1 ends messages to tools with <|eom_id|>.
    others = sorted(end_ids[1:], key=lambda i: "eom" in tokens[i])
    ids.update(zip(("eot", "eom"), others, strict=False))
    return ids
