"""--mode=export --verify: does transformers, given nothing but the export, compute what we do?

Real prompts, with a reply after each, go through both: the same text must give the same token ids, and these the same
log-probabilities. Needs PyTorch, which nothing else here does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from finemem_jax import assembly, backbone, checkpoint, export, operations, prompts, sources, trained
from finemem_jax.config import ConfigDict
from finemem_jax.environment import Environment
from finemem_jax.episode import Memory
from finemem_jax.models import decoder, log_probs, lora, presets, sharding
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.tokenizer import Tokenizer

# What float32's rounding explains of a difference, in nats, and more of unlikely tokens: this share of -log p.
TOLERANCE, RELATIVE = 1e-4, 1e-5


class Row(NamedTuple):
    """A prompt and a reply.

    Attributes:
        message: The prompt's last user message.
        prompt: Its token ids with all that stands around it, as `Environment.observe` gives them.
        reply: What is written next.
        ids: Token ids of the prompt, the reply and the end of its turn; the last ones may be cut off.
    """

    message: str
    prompt: tuple[int, ...]
    reply: str
    ids: tuple[int, ...]


def check(config: ConfigDict) -> None:
    """Refuses to begin where what is compared with is not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    for name in ("torch", "peft") if config.export.form == "lora" else ("torch",):
        _installed(name)


def verify(folder: pathlib.Path, config: ConfigDict, workdir: pathlib.Path) -> list[str]:
    """Compares an export, loaded by transformers in float32, with the checkpoint that it was made of.

    Where that cannot be as exact, since the export is in bfloat16 or training has gone on, we too read the weights from
    the export's files, so that both compute with the same ones.

    Args:
        config: The run's; `export.verify_tokens` says how many tokens of its held-out streams are compared.

    Returns:
        What to say of it.

    Raises:
        ValueError: token ids differ, or log-probabilities by more than `TOLERANCE` allows; or PyTorch is missing.
    """
    check(config)
    loaded = assembly.load(config)
    environment = assembly.environment(config, loaded.tokens)
    found = rows(config, loaded.tokens, environment)
    _check_ids(folder, loaded.tokens, found)
    model, params, origin = _weights(folder, config, workdir)
    ours = our_log_probs(model, params, [row.ids for row in found])
    # Two models at a time may be more than the host has.
    del params
    theirs = _their_log_probs(folder, [row.ids for row in found])
    a, b = np.concatenate(ours), np.concatenate(theirs)
    difference = np.abs(a - b).max()
    said = f"log-probabilities of {len(a):,} tokens in {len(found)} prompts differ by at most {difference:.1e} nats"
    if not np.allclose(a, b, rtol=RELATIVE, atol=TOLERANCE):
        raise ValueError(
            f"{folder}: {said} between transformers and {origin}, more than {TOLERANCE} (and {RELATIVE} of -log p); do "
            "not use the export. If it was written by another version, remove it and export again."
        )
    return [f"verified       prompts have the same token ids; {said} between transformers and {origin}"]


def rows(config: ConfigDict, tokens: Tokenizer, environment: Environment) -> list[Row]:
    """Prompts of held-out chunks, with an empty memory and a worked example's operations for a reply.

    Raises:
        ValueError: there are no held-out streams.
    """
    reply = "\n".join(operations.render(operation, environment.dialect) for operation in _operations(config))
    written = (*tokens.encode(reply), tokens.end_ids[0])
    found: list[Row] = []
    left = config.export.verify_tokens
    for stream in sources.streams(config, "test", environment):
        for chunk in stream.chunks:
            # To transformers a special token's name in a text is that token; prompts then differ, and rightly.
            if left <= 0 or tokens.encode(chunk.text) != tokens.encode_template(chunk.text):
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
    """log p of each row's tokens but the first, in nats, computed in float32."""
    width = max(map(len, ids))
    with jax.default_matmul_precision("highest"):
        found = []
        for row in ids:
            padded = np.zeros((1, width), np.int32)
            padded[0, : len(row)] = row
            found.append(np.asarray(_score(model, params, padded, np.array([len(row)])))[: len(row) - 1])
    return found


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, tokens: Int[jax.Array, "1 L"], lengths: Int[jax.Array, " 1"]):
    (hidden,) = decoder.hidden_states(model, params, [tokens], [lengths])
    head = decoder.output_head(model, params).astype(jnp.float32)
    return log_probs.token_log_probs(hidden[0, :-1], head, tokens[0, 1:], 1.0)[0]


def _operations(config):
    examples = prompts.TYPED_EXAMPLES if config.memory.layout == "typed" else prompts.MANAGER_EXAMPLES
    return examples[-1][2]


def _weights(folder, config, workdir) -> tuple[DecoderConfig, Params, str]:
    """Our side in float32, with adapters where the export has them apart, and what to call it."""
    about = json.loads((folder / trained.EXPORTED).read_text(encoding="utf-8"))
    is_adapter = (folder / export.ADAPTER).is_file()
    exact = {config.export.dtype or config.model.param_dtype, config.model.param_dtype} == {"float32"}
    from_run = exact and about["step"] == checkpoint.newest(workdir)
    settings = config.copy_and_resolve_references()
    if not is_adapter:
        settings = export.with_weights(config, workdir if from_run else folder)
    elif (folder / export.BASE).is_dir() and not from_run:
        settings.model.weights, settings.model.name = str(folder / export.BASE), presets.AUTO
    settings.model.param_dtype = "float32"
    found = backbone.find(settings)
    model = backbone.adapted(settings, found.model)
    params = found.params(sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
    if is_adapter:
        # Not merged: that would round otherwise than PEFT does, by more than all the rest.
        adapters = export.trained_adapters(settings, workdir, model) if from_run else lora.load_peft(folder, model)
        params = lora.combine(params, jax.tree.map(lambda x: x.astype(jnp.float32), adapters))
    return model, params, "the checkpoint" if from_run else "our reading of the same files"


def _check_ids(folder, tokens, found):
    """Refuses an export whose tokenizer or chat template gives other ids than training had."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for row in found:
        chat = [{"role": "user", "content": row.message}]
        prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        reply = theirs(row.reply, add_special_tokens=False)["input_ids"]
        for name, got, wanted in (("prompt", prompt, row.prompt), ("reply", reply, tokens.encode(row.reply))):
            if tuple(got) != tuple(wanted):
                at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), len(wanted))
                raise ValueError(
                    f"{folder}: transformers encodes a {name} otherwise than training did, from token {at} on: "
                    f"{theirs.decode(got[at : at + 8])!r} for {tokens.decode(wanted[at : at + 8])!r}; do not use the "
                    "export. If it was written by another version, remove it and export again."
                )


def _their_log_probs(folder, ids):
    """The same by transformers, on the CPU."""
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


def _installed(name) -> Any:
    if importlib.util.find_spec(name) is None:
        extra = " --index-url https://download.pytorch.org/whl/cpu" if name == "torch" else ""
        raise ValueError(f"--verify needs {name}, which is not installed; run `pip install {name}{extra}`.")
    return importlib.import_module(name)
