"""Writes files so that a kill or a full disk leaves the old file or the new one, and reads JSON and metrics.

All writers fill a file beside the target and rename it, which POSIX does atomically.
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


def read_json(path: pathlib.Path, remedy: str, required: bool = False) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no such file and none is `required`.

    Args:
        remedy: What to do if it is broken; ends the message.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    if not (required or path.is_file()):
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; {remedy}.")
    return found


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object for people and other programs to read."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of a workdir's metrics.jsonl, oldest first, without one that a kill cut short."""
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "step" in metrics:
            found.append(metrics)
    return found


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_records(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as compressed JSON lines, whole or not at all. The same records give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        for record in records:
            # Data may hold lone surrogates, which have no UTF-8 form.
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    os.replace(temporary, path)
