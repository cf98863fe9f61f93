"""Reads Hugging Face folders of safetensors into the parameters of a Decoder, slice by slice, and writes them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from finemem_jax.models import decoder, lora, sharding
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.weights import hf_config

# The largest file that is written; a tensor that is larger has a file of its own.
SHARD_BYTES = 5 * 10**9
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_READABLE = ("F32", "BF16", "F16", "F64")
# Our names of a layer's parameters → Hugging Face's. Kernels lie transposed there: [out, in].
KERNELS = {
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "out": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_VECTORS = {
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}
_OUTER = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}


class _Place(NamedTuple):
    """Where one of Hugging Face's tensors lies in our parameters."""

    parameter: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def _places(config: DecoderConfig) -> dict[str, _Place]:
    """{Hugging Face's name: place} of all tensors of a model, in the order in which files hold them."""
    state = decoder.abstract_params(config)
    layers = {name: leaf.shape[1:] for name, leaf in state["layers"].items()}
    places = {_OUTER["embedding"]: _Place("embedding", None, False, state["embedding"].shape)}
    for i in range(config.num_layers):
        for name, theirs in (KERNELS | _VECTORS).items():
            if name in layers:
                shape = layers[name]
                places[f"model.layers.{i}.{theirs}"] = _Place(name, i, name in KERNELS, shape[::-1])
    for name in ("final_norm", "head"):
        if name in state:
            places[_OUTER[name]] = _Place(name, None, False, state[name].shape)
    return places


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HfFolder:
    """A folder with config.json and safetensors.

    Attributes:
        path: The folder.
        config: The shape that config.json states.
    """

    path: pathlib.Path
    config: DecoderConfig

    def load(self, config: DecoderConfig, shardings: Params, dtype: str) -> Params:
        """Reads the weights, each device's slices and no more, one parameter after the other.

        Args:
            config: `self.config`, or the preset that it is.
            shardings: Where each parameter is to lie.
            dtype: Of the parameters: "float32" or "bfloat16".

        Raises:
            ValueError: a file is missing or broken, or a tensor is missing, superfluous or of another shape.
        """
        places = _places(config)
        with _open(self.path) as tensors:
            _check(self.path, places, tensors)
            names = {(place.parameter, place.layer): name for name, place in places.items()}

            def read(parameter: str, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
                name = names[parameter, layer]
                if places[name].transposed:
                    return tensors[name][tuple(reversed(index))].T
                return tensors[name][index]

            return build(config, shardings, dtype, read=read)


ReadFn = Callable[[str, int | None, tuple[slice, ...]], np.ndarray]


def build(config: DecoderConfig, shardings: Params, dtype: str, *, read: ReadFn) -> Params:
    """Makes parameters from what `read` gives, one after the other, so that the host holds no more than one at a time.

    Args:
        read: read(parameter, layer, index) gives the slices `index` of a parameter's layer; layer None: of one that is
            not a layer's.
    """
    shapes = decoder.abstract_params(config)

    def make(path: tuple[Any, ...], sharding: jax.sharding.Sharding, like: jax.ShapeDtypeStruct) -> jax.Array:
        *parents, name = (key.key for key in path)

        @functools.cache
        def fetch(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
            index = tuple(slice(*pair) for pair in bounds)
            if not parents:
                return np.ascontiguousarray(read(name, None, index), jnp.dtype(dtype))
            layers = range(*bounds[0])
            out = np.empty((len(layers), *(stop - start for start, stop in bounds[1:])), jnp.dtype(dtype))
            for row, layer in zip(out, layers, strict=True):
                row[...] = read(name, layer, index[1:])
            return out

        # Devices that hold the same slice share one reading of it.
        def callback(index: Any) -> np.ndarray:
            return fetch(tuple(part.indices(size)[:2] for part, size in zip(index, like.shape, strict=True)))

        return jax.make_array_from_callback(like.shape, sharding, callback)

    return jax.tree_util.tree_map_with_path(make, shardings, shapes)


@contextlib.contextmanager
def _open(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """{name: slices of that tensor, not read yet} over all of a folder's files."""
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in _files(folder):
            try:
                handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} cannot be read as safetensors ({error}); it may be cut short: fetch it again."
                ) from error
            tensors |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        yield tensors


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the safetensors of a folder: one, or those that an index names."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise ValueError(
                f"{folder} has neither {_SINGLE} nor {_INDEX}; weights in other formats (.bin, .pth) are not read: "
                "convert them with transformers' save_pretrained."
            )
        return [folder / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {error}); fetch it again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names; fetch what is missing.")
    return [folder / name for name in names]


def _check(folder: pathlib.Path, places: dict[str, _Place], tensors: dict[str, Any]) -> None:
    """Compares what is there with what must be, from the files' headers alone."""
    missing = [name for name in places if name not in tensors]
    if missing:
        raise ValueError(
            f"{folder}: {_some(missing)} missing from its safetensors; the folder is not a whole model: fetch it again."
        )
    # Some files hold a tied head twice, and old ones the rotary frequencies, which follow from the config.
    extra = [n for n in tensors if n not in places and n != _OUTER["head"] and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ValueError(
            f"{folder}: its safetensors hold {_some(extra)} unknown to {hf_config.FILE}'s architecture; it is another "
            "kind of model, which is not supported."
        )
    for name, place in places.items():
        shape, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if shape != place.shape:
            raise ValueError(
                f"{folder}: tensor {name!r} has shape {shape}, but {hf_config.FILE} makes it {place.shape}; weights "
                "and config are of different models: fetch both again."
            )
        if dtype not in _READABLE:
            raise ValueError(
                f"{folder}: tensor {name!r} is {dtype}; only {', '.join(_READABLE)} are read: use weights that are not "
                "quantized."
            )


def _some(names: list[str]) -> str:
    """Names a few of several tensors, for messages."""
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


# --------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------


class ExportedTokenizer(Protocol):
    """What an export needs of a tokenizer."""

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    def save(self, folder: pathlib.Path) -> None: ...


def save(
    folder: pathlib.Path,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: ExportedTokenizer | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a folder that transformers, and `HfFolder`, load.

    One tensor at a time passes through the host. Nothing is at `folder` until all is written. Adapters are merged
    into the matrices that they adapt. On several hosts all must call this; the first one writes.

    Args:
        folder: Must not exist yet.
        tokenizer: Saves itself into the same folder; None leaves it out.
        dtype: Of the file's tensors: "float32" or "bfloat16".

    Raises:
        ValueError: the folder is there already, or no architecture has this shape.
    """
    config, params = lora.without(config), lora.merge(config, params)
    fields = hf_config.to_fields(config, dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"an export's dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}.")
    refuse_existing(folder)
    end_ids = list(tokenizer.end_ids) if tokenizer else []
    if end_ids:
        fields["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else end_ids
    if jax.process_index() != 0:
        for _ in _host_tensors(config, params):
            pass
        return
    with new_folder(folder) as unfinished:
        _write_shards(unfinished, config, params, dtype=dtype)
        _write_json(unfinished / hf_config.FILE, fields)
        if tokenizer:
            tokenizer.save(unfinished)
        if not (unfinished / "generation_config.json").exists():
            known = {name: fields[name] for name in ("eos_token_id",) if name in fields}
            _write_json(unfinished / "generation_config.json", known)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a folder to write into: it has its name once all is written, and is gone if something fails.

    Raises:
        ValueError: the folder is there already.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is one rename.
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_existing(folder: pathlib.Path) -> None:
    """Refuses to replace what is there.

    Raises:
        ValueError: the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; export to another folder (export.folder), or remove it first.")


def host_array(params: Params, parameter: str, layer: int | None) -> np.ndarray:
    """Gathers a parameter, or of one of the layers' a layer's, into the host's memory."""
    return sharding.whole(params[parameter] if layer is None else params["layers"][parameter][layer])


def _host_tensors(config: DecoderConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields pairs of Hugging Face's name and array, one at a time."""
    for name, place in _places(config).items():
        array = host_array(params, place.parameter, place.layer)
        yield name, array.T if place.transposed else array


def _write_shards(folder: pathlib.Path, config: DecoderConfig, params: Params, *, dtype: str) -> None:
    """Writes all tensors into one file, or into several of at most `SHARD_BYTES` and their index."""
    places = _places(config)
    width = jnp.dtype(dtype).itemsize
    sizes = {name: math.prod(place.shape) * width for name, place in places.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [_SINGLE]
    tensors = _host_tensors(config, params)
    for file_name, shard in zip(names, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in shard:
            ends = [offset, offset + sizes[name]]
            header[name] = {"dtype": _DTYPES[dtype], "shape": places[name].shape, "data_offsets": ends}
            offset = ends[1]
        # The format: the header's length in eight bytes, the header padded to a multiple of eight, the tensors. The
        # library's writer wants all tensors of a file at once, and makes a copy of each.
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in shard:
                given, array = next(tensors)
                assert given == name and array.shape == places[name].shape, (given, name, array.shape)
                file.write(np.ascontiguousarray(array, jnp.dtype(dtype)).view(np.uint8).data)
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _write_json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
