"""Shapes of the decoders that can be built, by name. One table; nothing here allocates."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rule for positions beyond its first training: slow rotations are slowed down further.

    Attributes:
        factor: What the frequencies of the slowest rotations are divided by.
        low_freq_factor, high_freq_factor: Rotations that turn fewer than `low_freq_factor` times within
            `original_max_length` are slowed down in full, those that turn more than `high_freq_factor` times not at
            all, and what lies between in proportion.
        original_max_length: In tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama-like decoder (pre-norm, rotary positions, grouped-query attention, gated MLP).

    Attributes:
        name: Key in `PRESETS`, or the name of what it was read from.
        vocab_size: V, rows of the embedding.
        embed_dim: D, width of the residual stream.
        mlp_dim: F, width of the gated MLP.
        num_layers, num_heads, num_kv_heads, head_dim: As in the published configs.
        rope_theta: Base of the rotary frequencies.
        norm_epsilon: ε of RMSNorm.
        tie_embeddings: Whether the output head is the embedding.
        max_length: Longest sequence the model was trained for, in tokens.
        family: Whose file format it has: "llama", "qwen2" or "qwen3".
        qkv_bias: Whether queries, keys and values have a bias (Qwen2).
        qk_norm: Whether each head's queries and keys are normalised before they are rotated (Qwen3).
        rope_scaling: None for plain rotary frequencies.
    """

    name: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float
    tie_embeddings: bool
    max_length: int
    family: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None

    @property
    def num_parameters(self) -> int:
        """Number of scalars."""
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        if self.qk_norm:
            attention += 2 * self.head_dim
        layer = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.embed_dim


PRESETS = {
    config.name: config
    for config in (
        # For tests: two layers over bytes and a few operations, with grouped queries, and with a head_dim that is
        # not embed_dim / num_heads.
        DecoderConfig("tiny", 384, 48, 96, 2, 4, 2, 16, 10_000.0, 1e-5, True, 4096),
        DecoderConfig("smollm2_135m", 49_152, 576, 1_536, 30, 9, 3, 64, 100_000.0, 1e-5, True, 8_192),
        DecoderConfig("smollm2_360m", 49_152, 960, 2_560, 32, 15, 5, 64, 100_000.0, 1e-5, True, 8_192),
    )
}


def preset(name: str) -> DecoderConfig:
    """Returns the shape called `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"model.name must be one of {', '.join(PRESETS)}; got {name!r}.")
    return PRESETS[name]
