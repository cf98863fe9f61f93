"""Lists the shapes of the decoders that can be built, by name."""

from __future__ import annotations

import dataclasses
from typing import Any


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
class Lora:
    """Low-rank adapters: a matrix W acts as W + (alpha / rank) A B, of which only A and B are trained.

    Attributes:
        rank: Columns of A and rows of B.
        alpha: Scale of the product, times the rank.
        targets: Names of the adapted matrices; among `MATRICES`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


# What a layer multiplies with, by the names of its parameters.
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")


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
        qk_norm: Whether each head's queries and keys are normalized before they are rotated (Qwen3).
        rope_scaling: None for plain rotary frequencies.
        lora: Adapters beside the matrices; None for none.
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
    lora: Lora | None = None

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


def _qwen2(*row: Any) -> DecoderConfig:
    return DecoderConfig(*row, family="qwen2", qkv_bias=True)


def _qwen3(*row: Any) -> DecoderConfig:
    return DecoderConfig(*row, family="qwen3", qk_norm=True)


def _llama3(*row: Any, factor: float) -> DecoderConfig:
    return DecoderConfig(*row, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8_192))


# name, V, D, F, layers, query heads, key heads, head_dim, θ, ε, tied, longest sequence. Published sizes are those of
# the instruction-tuned models; some base models differ in ε (Qwen2.5 from 14B on) and in the longest sequence, which
# `model.name="auto"` reads from their files.
PRESETS = {
    config.name: config
    for config in (
        # For tests: two layers over bytes and a few operations, with grouped queries, and with a head_dim that is
        # not embed_dim / num_heads.
        DecoderConfig("tiny", 384, 48, 96, 2, 4, 2, 16, 10_000.0, 1e-5, True, 4096),
        DecoderConfig("smollm2_135m", 49_152, 576, 1_536, 30, 9, 3, 64, 1e5, 1e-5, True, 8_192),
        DecoderConfig("smollm2_360m", 49_152, 960, 2_560, 32, 15, 5, 64, 1e5, 1e-5, True, 8_192),
        DecoderConfig("smollm2_1_7b", 49_152, 2_048, 8_192, 24, 32, 32, 64, 1.3e5, 1e-5, True, 8_192),
        DecoderConfig("llama3_8b", 128_256, 4_096, 14_336, 32, 32, 8, 128, 5e5, 1e-5, False, 8_192),
        DecoderConfig("llama3_70b", 128_256, 8_192, 28_672, 80, 64, 8, 128, 5e5, 1e-5, False, 8_192),
        _llama3("llama31_8b", 128_256, 4_096, 14_336, 32, 32, 8, 128, 5e5, 1e-5, False, 131_072, factor=8.0),
        _llama3("llama31_70b", 128_256, 8_192, 28_672, 80, 64, 8, 128, 5e5, 1e-5, False, 131_072, factor=8.0),
        _llama3("llama31_405b", 128_256, 16_384, 53_248, 126, 128, 8, 128, 5e5, 1e-5, False, 131_072, factor=8.0),
        _llama3("llama32_1b", 128_256, 2_048, 8_192, 16, 32, 8, 64, 5e5, 1e-5, True, 131_072, factor=32.0),
        _llama3("llama32_3b", 128_256, 3_072, 8_192, 28, 24, 8, 128, 5e5, 1e-5, True, 131_072, factor=32.0),
        _llama3("llama33_70b", 128_256, 8_192, 28_672, 80, 64, 8, 128, 5e5, 1e-5, False, 131_072, factor=8.0),
        _qwen2("qwen2_0_5b", 151_936, 896, 4_864, 24, 14, 2, 64, 1e6, 1e-6, True, 32_768),
        _qwen2("qwen2_1_5b", 151_936, 1_536, 8_960, 28, 12, 2, 128, 1e6, 1e-6, True, 32_768),
        _qwen2("qwen2_7b", 152_064, 3_584, 18_944, 28, 28, 4, 128, 1e6, 1e-6, False, 32_768),
        _qwen2("qwen2_72b", 152_064, 8_192, 29_568, 80, 64, 8, 128, 1e6, 1e-6, False, 32_768),
        _qwen2("qwen25_0_5b", 151_936, 896, 4_864, 24, 14, 2, 64, 1e6, 1e-6, True, 32_768),
        _qwen2("qwen25_1_5b", 151_936, 1_536, 8_960, 28, 12, 2, 128, 1e6, 1e-6, True, 32_768),
        _qwen2("qwen25_3b", 151_936, 2_048, 11_008, 36, 16, 2, 128, 1e6, 1e-6, True, 32_768),
        _qwen2("qwen25_7b", 152_064, 3_584, 18_944, 28, 28, 4, 128, 1e6, 1e-6, False, 32_768),
        _qwen2("qwen25_14b", 152_064, 5_120, 13_824, 48, 40, 8, 128, 1e6, 1e-6, False, 32_768),
        _qwen2("qwen25_32b", 152_064, 5_120, 27_648, 64, 40, 8, 128, 1e6, 1e-6, False, 32_768),
        _qwen2("qwen25_72b", 152_064, 8_192, 29_568, 80, 64, 8, 128, 1e6, 1e-6, False, 32_768),
        _qwen3("qwen3_0_6b", 151_936, 1_024, 3_072, 28, 16, 8, 128, 1e6, 1e-6, True, 40_960),
        _qwen3("qwen3_1_7b", 151_936, 2_048, 6_144, 28, 16, 8, 128, 1e6, 1e-6, True, 40_960),
        _qwen3("qwen3_4b", 151_936, 2_560, 9_728, 36, 32, 8, 128, 1e6, 1e-6, True, 40_960),
        _qwen3("qwen3_4b_2507", 151_936, 2_560, 9_728, 36, 32, 8, 128, 5e6, 1e-6, True, 262_144),
        _qwen3("qwen3_8b", 151_936, 4_096, 12_288, 36, 32, 8, 128, 1e6, 1e-6, False, 40_960),
        _qwen3("qwen3_14b", 151_936, 5_120, 17_408, 40, 40, 8, 128, 1e6, 1e-6, False, 40_960),
        _qwen3("qwen3_32b", 151_936, 5_120, 25_600, 64, 64, 8, 128, 1e6, 1e-6, False, 40_960),
    )
}
# `model.name` for "the shape that the weights' own files state".
AUTO = "auto"


def preset(name: str) -> DecoderConfig:
    """Returns the shape called `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(
            f"model.name must be one of {', '.join(PRESETS)}, or {AUTO!r} to read the shape from the weights' files; "
            f"got {name!r}."
        )
    return PRESETS[name]


def differences(config: DecoderConfig, other: DecoderConfig) -> list[str]:
    """Names of the fields that make two shapes other models: all but their names and longest sequences."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in ("name", "max_length")]
    return [name for name in names if getattr(config, name) != getattr(other, name)]


def resolve(name: str, found: DecoderConfig, source: str) -> DecoderConfig:
    """The shape to use for weights whose files state the shape `found`.

    Args:
        name: `model.name`: "auto", or the preset that the weights must be of.
        source: Where `found` stands, for messages.

    Raises:
        ValueError: the preset is another shape; names every field with both values.
    """
    alike = [known for known in PRESETS.values() if not differences(known, found)]
    if name == AUTO:
        return dataclasses.replace(found, name=alike[0].name) if len(alike) == 1 else found
    expected = preset(name)
    wrong = differences(expected, found)
    if wrong:
        both = "; ".join(
            f"{field} is {getattr(found, field)} there and {getattr(expected, field)} here" for field in wrong
        )
        remedy = (
            f"set model.name={alike[0].name!r}" if alike else f"set model.name={AUTO!r} to take the shape from there"
        )
        raise ValueError(f"{source} is no {name} (model.name): {both}. Choose other weights, or {remedy}.")
    # The name that was asked for: qwen2_7b and qwen25_7b are one shape.
    return dataclasses.replace(found, name=name)
