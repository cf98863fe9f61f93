"""Builds the environment, the embedder and the grammar that a config chooses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from finemem_jax.config.sections import Config
from finemem_jax.memory import embedders, operations, retrieval
from finemem_jax.memory import grammar as grammar_lib
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.retrieval import EmbedFn
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.types import Chunk, Constraint, Memory


def environment(config: Config, tokens: Tokenizer) -> Environment:
    """Builds the environment of a config."""
    return Environment(
        tokenizer=tokens,
        num_examples=config.manager.num_examples,
        view_tokens=config.memory.view_tokens,
        chunk_tokens=config.manager.chunk_tokens,
        long_chunk=config.manager.long_chunk,
        repair_json=config.manager.repair_json,
        dialect=dialect(config),
        view_items=config.memory.view_items,
        core_tokens=config.memory.core_tokens,
        task=config.manager.system,
        view=config.memory.view,
        budget_tokens=config.memory.budget_tokens,
        eviction=config.memory.eviction,
    )


def dialect(config: Config) -> operations.Dialect:
    """Returns how the manager of a config writes operations."""
    return operations.Dialect(config.memory.layout, config.manager.tool_call_format)


class PromptLengths(NamedTuple):
    """Tokens of the manager's longest prompt: what all begin with, a chunk, and the memory with the words around."""

    shared_prefix: int
    text: int
    view: int


def prompt_lengths(config: Config, environment: Environment) -> PromptLengths:
    """Measures the longest prompt that there can be."""
    # The words around chunk and memory, and the reply's header; a typed memory has a heading for each of its types.
    around = 64 if config.memory.layout == "flat" else 192
    shared_prefix = environment.observe(Chunk(""), Memory()).cuts[0]
    return PromptLengths(shared_prefix, config.manager.chunk_tokens, config.memory.view_tokens + around)


def constraint(config: Config, tokens: Tokenizer, vocab_size: int) -> Constraint | None:
    """Builds what the manager must keep to in evaluation; None for nothing.

    Args:
        vocab_size: The model's; its tokenizer may have fewer tokens.
    """
    if not config.manager.constrained:
        return None
    grammar = grammar_lib.of_operations(dialect(config))
    return grammar_lib.Grammar(tokens, grammar, vocab_size)


def embedder(config: Config, model: DecoderConfig, params: Params, *, tokens: Tokenizer) -> EmbedFn | None:
    """Builds what texts are embedded with; None if retrieval needs no embeddings."""
    embed = None
    if config.memory.retrieval in retrieval.DENSE_METHODS:
        if config.memory.embedder == "wordllama":
            embed = embedders.wordllama()
        else:
            # A copy, because training gives its arrays away.
            embed = embedders.language_model(model, jax.tree.map(jnp.copy, params), tokens)
        embed = embedders.cached(embed)
    # Only to see now, and not after the first rollouts, whether what the method needs is installed.
    retrieval.Index(config.memory.retrieval, embed)
    return embed
