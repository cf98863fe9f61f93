"""Tests of python -m finemem_jax.serve: bad flags, missing models and packages get a sentence that says what to do."""

import pathlib
import subprocess
import sys
import textwrap

import pytest

from finemem_jax import serve

pytest.importorskip("mcp.server.mcpserver", reason="the package mcp, version 2 or newer, is not installed")

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transport=http", "--host=0.0.0.0"], "would let other machines read the memory; give users tokens"),
        (["--tokens=x"], "--tokens says who the users are over HTTP"),
        (["--tokens=x", "--transport=http", "--user=a"], "--tokens says who the users are over HTTP"),
        (["--tokens=/nowhere", "--transport=http"], "--tokens=/nowhere cannot be read"),
        (["--set=memory.topk=1"], "there is no setting 'memory.topk'; is it memory.top_k"),
        (["--set=memory.top_k=many"], "memory.top_k must be a whole number, got 'many'"),
        (["--transport=http", "--host=256.0.0.1", "--tokens=OK"], "--host=256.0.0.1 --port=8000 cannot be listened to"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    (tmp_path / "tokens").write_text("0123456789abcdef ada")
    flags = [flag.replace("=OK", f"={tmp_path / 'tokens'}") for flag in flags]
    with pytest.raises(SystemExit, match=message):
        serve.main(["--model=", f"--store={tmp_path / 'm'}", *flags])


def test_a_model_that_cannot_be_loaded(tmp_path):
    result = run("-m", "finemem_jax.serve", "--model=/nowhere", f"--store={tmp_path / 'm'}")
    assert result.returncode == 1 and "finemem_jax: '/nowhere' is neither a run's workdir" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_mcp():
    program = textwrap.dedent(
        """
        import sys
        sys.modules["mcp"] = None
        from finemem_jax import serve
        serve.main(["--model=", "--store=x"])
        """
    )
    result = run("-c", program)
    assert result.returncode == 1 and "pip install 'finemem_jax[mcp]'" in result.stderr
    assert "Traceback" not in result.stderr
