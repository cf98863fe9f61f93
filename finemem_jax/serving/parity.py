"""Verifies an export (--mode=export --verify): transformers, or llama.cpp, must compute the same from it as we do.

Real prompts, with a reply after each, go through both: the same text must give the same token ids, and these the same
log-probabilities. Needs PyTorch or llama-cpp-python, which nothing else here does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from finemem_jax import build as build_lib
from finemem_jax import input_pipeline
from finemem_jax.config.sections import Config
from finemem_jax.memory import build, operations, prompts
from finemem_jax.memory.environment import Environment
from finemem_jax.models import decoder, log_probs, lora, presets, sharding
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.runtime import checkpoint
from finemem_jax.serving import export, load
from finemem_jax.types import Memory, Operation
from finemem_jax.weights import peft, pretrained

# Differences that float32's rounding explains: so many nats, and of unlikely tokens this fraction of -log p more.
TOLERANCE, RELATIVE = 1e-4, 1e-5
# llama.cpp also rounds the activations that it multiplies with 16-bit weights. That was 0.01 nats on average with
# SmolLM2 in bfloat16; weights in a wrong place make whole nats.
ROUNDED_MEAN = 0.05
# How many tokens are compared.
_TOKENS = 2_000
# ggml's number for the type float32.
_GGML_F32 = 0


class Row(NamedTuple):
    """Holds a prompt and a reply.

    Attributes:
        message: The prompt's last user message.
        prompt: Token ids of the whole prompt, as `Environment.observe` gives them.
        reply: The text after it.
        ids: Token ids of the prompt, the reply and the end of its turn; the last ones may be cut off.
    """

    message: str
    prompt: tuple[int, ...]
    reply: str
    ids: tuple[int, ...]


def check(config: Config) -> None:
    """Refuses to begin where the other program is not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    for name in {"lora": ("torch", "peft"), "gguf": ("llama_cpp",)}.get(config.export.form, ("torch",)):
        _installed(name)


def verify(folder: pathlib.Path, config: Config, workdir: pathlib.Path) -> list[str]:
    """Compares an export, loaded by transformers in float32 or by llama.cpp, with the checkpoint that it was made of.

    Where the checkpoint's weights are not those of the export, since that is in bfloat16 or training has gone on, we
    too read the weights from the export's files.

    Args:
        config: The run's, of whose held-out streams some prompts are compared.

    Returns:
        A line to print.

    Raises:
        ValueError: token ids differ, or log-probabilities by more than `TOLERANCE` allows (of 16-bit weights in
            llama.cpp: on average by more than `ROUNDED_MEAN`); or the other program is not installed.
    """
    check(config)
    loaded = build_lib.load(config)
    environment = build.environment(config, loaded.tokenizer)
    found = rows(config, loaded.tokenizer, environment)
    file = folder / load.GGUF
    program = "llama.cpp" if file.is_file() else "transformers"
    about_ids = (_check_llama_ids if file.is_file() else _check_ids)(folder, loaded.tokenizer, found)
    model, params, origin = _weights(folder, config, workdir)
    ours = our_log_probs(model, params, [row.ids for row in found])
    # Two models at a time may be more than the host's memory.
    del params
    theirs = (_llama_log_probs if file.is_file() else _their_log_probs)(folder, [row.ids for row in found])
    a, b = np.concatenate(ours), np.concatenate(theirs)
    differences = np.abs(a - b)
    said = (
        f"log-probabilities of {len(a):,} tokens in {len(found)} prompts differ by at most {differences.max():.1e} nats"
    )
    limit = f"more than {TOLERANCE} (and {RELATIVE} of -log p)"
    is_close = np.allclose(a, b, rtol=RELATIVE, atol=TOLERANCE)
    if file.is_file() and (config.export.dtype or config.model.param_dtype) != "float32":
        said += f" ({differences.mean():.1e} on average; llama.cpp computes with rounded numbers, too)"
        limit, is_close = f"more than {ROUNDED_MEAN} on average", differences.mean() <= ROUNDED_MEAN
    if not is_close:
        raise ValueError(
            f"{folder}: {said} between {program} and {origin}, {limit}; do not use the export. If it was written by "
            "another version, remove it and export again."
        )
    return [f"verified       {about_ids}; {said} between {program} and {origin}"]


def rows(config: Config, tokens: Tokenizer, environment: Environment) -> list[Row]:
    """Makes prompts of held-out chunks and an empty memory, with a worked example's operations for a reply.

    Raises:
        ValueError: there are no held-out streams.
    """
    reply = "\n".join(operations.render(operation, environment.dialect) for operation in _operations(config))
    written = (*tokens.encode(reply), tokens.end_ids[0])
    found: list[Row] = []
    left = _TOKENS
    for stream in input_pipeline.streams(config, "test", environment):
        for chunk in stream.chunks:
            # To others a special token's name in a text is that token; prompts then differ, as they should.
            if left <= 0 or tokens.encode(chunk.text) != tokens.encode_template(chunk.text):
                continue
            # Qwen's tokenizers compose accents first; llama.cpp does not.
            if config.export.form == "gguf" and not unicodedata.is_normalized("NFC", chunk.text):
                continue
            prompt = environment.observe(chunk, Memory()).ids
            # The first token has no probability.
            ids = (*prompt, *written)[: left + 1]
            left -= len(ids) - 1
            message = "".join(environment.messages(chunk, Memory())[-1].parts)
            found.append(Row(message, prompt, reply, ids))
    if not found:
        raise ValueError("there are no held-out streams to verify an export on; raise data.num_test.")
    return found


def our_log_probs(model: DecoderConfig, params: Params, ids: Sequence[Sequence[int]]) -> list[Float[np.ndarray, " n"]]:
    """Computes log p of each row's tokens but the first, in nats, in float32."""
    width = max(map(len, ids))
    with jax.default_matmul_precision("highest"):
        found = []
        for row in ids:
            padded = np.zeros((1, width), np.int32)
            padded[0, : len(row)] = row
            scored = _score(model, params, padded, lengths=np.array([len(row)]))
            found.append(np.asarray(scored)[: len(row) - 1])
    return found


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: DecoderConfig, params: Params, tokens: Int[jax.Array, "1 L"], *, lengths: Int[jax.Array, " 1"]
) -> Float[jax.Array, " L-1"]:
    (hidden,) = decoder.hidden_states(model, params, [tokens], lengths=[lengths])
    head = decoder.output_head(model, params).astype(jnp.float32)
    return log_probs.token_log_probs(hidden[0, :-1], head, tokens[0, 1:], temperature=1.0)[0]


def _operations(config: Config) -> Sequence[Operation]:
    examples = prompts.TYPED_EXAMPLES if config.memory.layout == "typed" else prompts.MANAGER_EXAMPLES
    return examples[-1][2]


def _weights(folder: pathlib.Path, config: Config, workdir: pathlib.Path) -> tuple[DecoderConfig, Params, str]:
    """Returns our model in float32, with adapters where the export has them apart, and what to call it."""
    about = json.loads((folder / load.EXPORTED).read_text(encoding="utf-8"))
    is_adapter = (folder / export.ADAPTER).is_file()
    exact = {config.export.dtype or config.model.param_dtype, config.model.param_dtype} == {"float32"}
    from_run = exact and about["step"] == checkpoint.newest(workdir)
    settings = config
    if not is_adapter:
        settings = export.with_weights(config, workdir if from_run else folder)
    elif (folder / export.BASE).is_dir() and not from_run:
        base = dataclasses.replace(config.model, weights=str(folder / export.BASE), name=presets.AUTO)
        settings = dataclasses.replace(config, model=base)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, param_dtype="float32"))
    found = pretrained.find(settings)
    model = pretrained.adapted(settings, found.model)
    params = found.params(sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
    if is_adapter:
        # Not merged: that would round otherwise than PEFT does, and by more than all other differences.
        adapters = export.trained_adapters(settings, workdir, model) if from_run else peft.load(folder, model)
        params = lora.combine(params, jax.tree.map(lambda x: x.astype(jnp.float32), adapters))
    return model, params, "the checkpoint" if from_run else "our reading of the same files"


def _check_ids(folder: pathlib.Path, tokens: Tokenizer, found: Sequence[Row]) -> str:
    """Refuses an export whose tokenizer or chat template gives other ids than training had."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for row in found:
        chat = [{"role": "user", "content": row.message}]
        prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        reply = theirs(row.reply, add_special_tokens=False)["input_ids"]
        told = f"{folder}: transformers encodes a"
        _check_same(f"{told} prompt", prompt, row.prompt, decode=tokens.decode)
        _check_same(f"{told} reply", reply, tokens.encode(row.reply), decode=tokens.decode)
    return "prompts have the same token ids"


def _check_same(
    subject: str, got: Sequence[int], wanted: Sequence[int], *, decode: Callable[[Sequence[int]], str]
) -> None:
    if tuple(got) == tuple(wanted):
        return
    at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), len(wanted))
    raise ValueError(
        f"{subject} otherwise than training did, from token {at} on: {decode(got[at : at + 8])!r} for "
        f"{decode(wanted[at : at + 8])!r}; do not use the export. If it was written by another version, remove it and "
        "export again."
    )


def _check_llama_ids(folder: pathlib.Path, tokens: Tokenizer, found: Sequence[Row]) -> str:
    """Does the same of a GGUF file; other tokens where the parts of a message meet are allowed, and told."""
    llama = _llama(folder, vocab_only=True)
    named = {name: llama.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    texts = {f"{n}_token": tokens.decode([int(i)]) if i is not None else "" for n, i in named.items()}
    formats = importlib.import_module("llama_cpp.llama_chat_format")
    chat_format = formats.Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], **texts)
    more = ""
    for row in found:
        text = chat_format(messages=[{"role": "user", "content": row.message}]).prompt
        prompt = llama.tokenize(text.encode(), add_bos=False, special=True)
        reply = llama.tokenize(row.reply.encode(), add_bos=False, special=False)
        joined = tokens.encode_template(tokens.decode(row.prompt))
        wanted = row.prompt if tuple(prompt) == row.prompt else joined
        if wanted is joined:
            more = (
                f" but where text and memory meet, which llama.cpp cuts otherwise ({len(joined)} for {len(row.prompt)})"
            )
        told = f"{folder}: llama.cpp encodes a"
        _check_same(f"{told} prompt", prompt, wanted, decode=tokens.decode)
        _check_same(f"{told} reply", reply, tokens.encode(row.reply), decode=tokens.decode)
    llama.close()
    return f"prompts have the same token ids{more}"


def _llama_log_probs(folder: pathlib.Path, ids: Sequence[Sequence[int]]) -> list[Float[np.ndarray, " n"]]:
    """Computes the same with llama.cpp on the CPU, as exactly as it can."""
    width = max(map(len, ids))
    llama = _llama(folder, n_ctx=width, logits_all=True)
    found = []
    for row in ids:
        llama.reset()
        llama.eval(list(row))
        logits = llama.scores[: len(row) - 1]
        top = logits.max(-1)
        total = np.log(np.exp(logits - top[:, None]).sum(-1))
        found.append(logits[np.arange(len(row) - 1), row[1:]] - top - total)
    llama.close()
    return found


def _llama(folder: pathlib.Path, **options: Any) -> Any:
    # Keys and values are float16 otherwise, and in flash attention always: that alone changed SmolLM2's by 7e-3 nats.
    exact = {"type_k": _GGML_F32, "type_v": _GGML_F32, "flash_attn": False, "n_gpu_layers": 0}
    return _installed("llama_cpp").Llama(str(folder / load.GGUF), verbose=False, **exact, **options)


def _their_log_probs(folder: pathlib.Path, ids: Sequence[Sequence[int]]) -> list[Float[np.ndarray, " n"]]:
    """Computes the same with transformers, on the CPU."""
    import transformers

    torch = _installed("torch")
    path, adapter = folder, folder / export.ADAPTER
    if adapter.is_file():
        named = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        path = folder / named if named == export.BASE else named
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter.is_file():
        model = _installed("peft").PeftModel.from_pretrained(model, folder)
    model.eval()
    found = []
    with torch.no_grad():
        for row in ids:
            row = torch.tensor([row])
            chosen = torch.log_softmax(model(row).logits[0, :-1], -1).gather(-1, row[0, 1:, None])
            found.append(chosen[:, 0].numpy())
    return found


def _installed(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        extra = " --index-url https://download.pytorch.org/whl/cpu" if name == "torch" else ""
        package = name.replace("llama_cpp", "llama-cpp-python")
        raise ValueError(f"--verify needs {package}, which is not installed; run `pip install {package}{extra}`.")
    return importlib.import_module(name)
