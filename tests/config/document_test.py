"""Tests of finemem_jax/config/document.py: the settings page of the docs is in step with the sections."""

import pathlib

from finemem_jax import config as config_lib
from finemem_jax.config import document
from finemem_jax.config.sections import Config

PAGE = pathlib.Path(document.__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_in_step():
    written = PAGE.read_text(encoding="utf-8")
    assert written == document.page(), "run `python -m finemem_jax.config.document > docs/settings.md`"


def test_every_setting_has_a_row():
    rows, section = set(), ""
    for line in document.page().splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if line.startswith("| `"):
            rows.add(f"{section}.{line.split('`')[1]}")
    names = {
        name.replace("servers.main", "servers.NAME") for name in config_lib.flatten(Config()) if "second" not in name
    }
    assert {name if "." in name else f"Of the whole run.{name}" for name in names} <= rows


def test_a_row_by_hand():
    page = document.page()
    assert "| `group_size` | `8` | G, rollouts per stream. | at least 2 | 8 |" in page
    assert (
        "| `num_steps` ↻ | `85` | Training steps: one rollout batch each. (steps) | at least 0 | Mem-alpha: 5" in page
    )
    assert "| `beta` | `0.5` | β, share of r_global that follows the evidence. | in [0, 1] | 0.5 |" in page
