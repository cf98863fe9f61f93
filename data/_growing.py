"""Cuts a text file that is still being written into chunks, as they become certain. Knows nothing of streams."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator

from . import _chunking

_READ_BYTES = 2**20
# A chunk is cut when so many longest chunks stand in the file from its start on: what comes later changes nothing.
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Waiting:
    """How to wait for a file to grow.

    Attributes:
        idle_seconds: How long to wait for more until the text is taken to be at its end; 0 = not at all.
        poll_seconds: How often to look meanwhile.
        sleep: Waits so many seconds.
    """

    idle_seconds: float = 0.0
    poll_seconds: float = 1.0
    sleep: Callable[[float], None] = time.sleep


def follow(
    path: pathlib.Path, offset: int = 0, *, chunk_words: int, chunking: str, waiting: Waiting | None = None
) -> Iterator[tuple[str, int]]:
    """Yields the chunks of a growing UTF-8 file, each with the byte after it, from which another call goes on.

    The chunks depend on the text alone, not on when it was written: a chunk is cut once enough stands behind it. When
    nothing has come for a while, the rest is cut as the end of the text. Memory does not grow with the file.

    Args:
        path: The file.
        offset: Where to begin, in bytes; what came with the last chunk that was dealt with.
        chunk_words: As `_chunking.cut` takes it.
        chunking: As `_chunking.cut` takes it.
        waiting: How to wait for more; by default not at all.

    Raises:
        ValueError: there is no such file, it is not UTF-8 (with the byte), or it has become shorter than `offset`.
    """
    if not path.is_file():
        raise ValueError(f"follow.file={str(path)!r} is no file. Name the text file that is to be followed.")
    ahead = math.ceil(_AHEAD * _chunking.LONGEST * chunk_words)
    pending = ""
    for text, ended in _growth(path, offset, waiting or Waiting()):
        pending += text
        while span := _certain_words(pending, ahead, ended):
            start, end = _chunking.cut(pending[:span], chunk_words, chunking)[0]
            offset += len(pending[:end].encode())
            yield pending[start:end], offset
            pending = pending[end:]


def _growth(path: pathlib.Path, read: int, waiting: Waiting) -> Iterator[tuple[str, bool]]:
    """Yields what stands in a file from byte `read` on, as it comes, and with the last piece ("") that it has ended."""
    # What was read may end within a character; the decoder keeps those bytes until the others come.
    decoder = codecs.getincrementaldecoder("utf-8")()
    waited = 0.0
    while True:
        if path.stat().st_size < read:
            raise ValueError(
                f"{path} has become shorter than the {read:,} bytes that were read of it. If it was begun anew, follow "
                "it in another --workdir, or remove the old memory."
            )
        with path.open("rb") as file:
            file.seek(read)
            raw = file.read(_READ_BYTES)
        if raw:
            try:
                text = decoder.decode(raw)
            except UnicodeDecodeError as error:
                at = read - len(decoder.getstate()[0]) + error.start
                raise ValueError(f"{path}, byte {at}: not UTF-8. Convert the file to UTF-8.") from error
            read += len(raw)
            waited = 0.0
            yield text, False
        elif waited < waiting.idle_seconds:
            waiting.sleep(waiting.poll_seconds)
            waited += waiting.poll_seconds
        else:
            if decoder.getstate()[0]:
                raise ValueError(f"{path}, byte {read}: ends within a character. Convert the file to UTF-8.")
            yield "", True
            return


def _certain_words(text: str, ahead: int, ended: bool) -> int:
    """Returns how much of a text (in characters) its first chunk is to be cut from; 0 if that is not certain yet.

    That are its first `ahead` words, or all that are left if the text has ended.
    """
    count = end = 0
    for word in itertools.islice(re.finditer(r"\S+", text), ahead):
        # The word at the end of the text may still be growing.
        if ended or word.end() < len(text):
            count, end = count + 1, word.end()
    return end if ended or count == ahead else 0
