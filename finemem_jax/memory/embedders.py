"""Texts to vectors, for dense retrieval: by a table of word-piece vectors, or by a language model.

Sizes: N texts, n of them in a batch, L tokens per row, E embedding dimensions.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float, Int

from finemem_jax.memory.retrieval import EmbedFn
from finemem_jax.models import decoder
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.models.tokenizer import Tokenizer

EMBEDDERS = ("wordllama", "model")

_WORDLLAMA_FILES = ("weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json")


def cached(embed: EmbedFn, max_texts: int = 32_768) -> EmbedFn:
    """Remembers the vectors of texts: each is embedded once, and what is new in a call all together.

    Args:
        max_texts: How many are remembered; those not asked for longest are forgotten first.
    """
    vectors: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def remembered(texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return embed(texts)
        new = [text for text in dict.fromkeys(texts) if text not in vectors]
        if new:
            # Copied, because a view would keep its whole batch alive.
            vectors.update((text, vector.copy()) for text, vector in zip(new, embed(new), strict=True))
        for text in texts:
            vectors.move_to_end(text)
        rows = np.stack([vectors[text] for text in texts])
        while len(vectors) > max_texts:
            vectors.popitem(last=False)
        return rows

    return remembered


def wordllama() -> EmbedFn:
    """The mean of the word pieces' vectors, E = 256, from files that the wordllama wheel carries; no network.

    Only the files are used, and their meaning is simple: wordllama's own loader looks for its tokenizer in another
    folder than it is installed to, and would download it; and importing the package sets up logging for everybody.

    Raises:
        ValueError: wordllama is not installed, or a release of it without these files.
    """
    spec = importlib.util.find_spec("wordllama")
    folder = pathlib.Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not all((folder / name).is_file() for name in _WORDLLAMA_FILES):
        raise ValueError(
            "memory.embedder='wordllama' needs the files that wordllama 0.4.0.post1 carries; run "
            "`pip install wordllama==0.4.0.post1`, or set memory.embedder='model'."
        )
    import safetensors.numpy  # Comes with wordllama.

    table_file, tokenizer_file = (folder / name for name in _WORDLLAMA_FILES)
    (table,) = safetensors.numpy.load_file(table_file).values()
    table = table.astype(np.float32)
    pieces = tokenizers.Tokenizer.from_file(str(tokenizer_file))

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        vectors = np.zeros((len(texts), table.shape[1]), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            # What a manager writes may hold lone surrogates, which the tokenizer refuses.
            ids = pieces.encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False).ids
            if ids:
                vector[:] = table[ids].mean(0)
        return vectors

    return embed


def language_model(
    config: DecoderConfig, params: Params, tokens: Tokenizer, *, rows: int = 8, length_multiple: int = 64
) -> EmbedFn:
    """The mean of a language model's last hidden states over a text's tokens; E is the model's width.

    A text longer than the model takes is cut off; one without tokens gets the zero vector.

    Args:
        params: Used at every call: the caller sees to it that nobody gives them away.
        rows: n, texts computed together. Fewer are padded, so that a text's vector does not depend on its company.
        length_multiple: Lengths are rounded up to multiples of this, so that few shapes are compiled.
    """

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        ids = [tokens.encode(text)[: config.max_length] for text in texts]
        vectors = np.zeros((len(texts), config.embed_dim), np.float32)
        by_length = collections.defaultdict(list)
        for i, row in enumerate(ids):
            if row:
                by_length[-(-len(row) // length_multiple) * length_multiple].append(i)
        for length, members in sorted(by_length.items()):
            for start in range(0, len(members), rows):
                batch = members[start : start + rows]
                padded = np.zeros((rows, length), np.int32)
                lengths = np.ones(rows, np.int32)
                for place, i in enumerate(batch):
                    padded[place, : len(ids[i])] = ids[i]
                    lengths[place] = len(ids[i])
                vectors[batch] = np.asarray(_mean_hidden(config, params, padded, lengths))[: len(batch)]
        return vectors

    return embed


@functools.partial(jax.jit, static_argnums=0)
def _mean_hidden(
    config: DecoderConfig, params: Params, tokens: Int[Array, "n L"], lengths: Int[Array, " n"]
) -> Float[Array, "n E"]:
    (hidden,) = decoder.hidden_states(config, params, [tokens], lengths=[lengths], compute=decoder.Compute("none"))
    valid = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    total = jnp.where(valid[:, :, None], hidden.astype(jnp.float32), 0.0).sum(1)
    return total / lengths[:, None].astype(jnp.float32)
