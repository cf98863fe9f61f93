"""Cuts a text file that is still being written into chunks, as they become certain. Knows nothing of streams."""

from __future__ import annotations

import codecs
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator

from . import _chunking

_READ_BYTES = 2**20
# A chunk is cut when so many longest chunks stand in the file from its start on: what comes later changes nothing.
_AHEAD = 4


def follow(
    path: pathlib.Path,
    chunk_words: int,
    chunking: str,
    offset: int = 0,
    idle_seconds: float = 0.0,
    poll_seconds: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[str, int]]:
    """Yields the chunks of a growing UTF-8 file, each with the byte after it, from which another call goes on.

    The chunks depend on the text alone, not on when it was written: a chunk is cut once enough stands behind it. When
    nothing has come for a while, the rest is cut as the end of the text. Memory does not grow with the file.

    Args:
        offset: Where to begin, in bytes; what came with the last chunk that was dealt with.
        idle_seconds: How long to wait for more until the text is taken to be at its end; 0 = not at all.
        poll_seconds: How often to look meanwhile.
        sleep: Waits so many seconds.

    Raises:
        ValueError: there is no such file, it is not UTF-8 (with the byte), or it has become shorter than `offset`.
    """
    if not path.is_file():
        raise ValueError(f"follow.file={str(path)!r} is no file. Name the text file that is to be followed.")
    decoder = codecs.getincrementaldecoder("utf-8")()
    pending, start, read, waited = "", offset, offset, 0.0
    ahead = math.ceil(_AHEAD * _chunking.LONGEST * chunk_words)
    ended = False
    while True:
        while (first := _first_chunk(pending, chunk_words, chunking, ahead, ended)) is not None:
            skipped, end = first
            text = pending[skipped:end]
            start += len(pending[:end].encode())
            pending = pending[end:]
            yield text, start
        if ended:
            return
        if path.stat().st_size < read:
            raise ValueError(
                f"{path} has become shorter than the {read:,} bytes that were read of it. If it was begun anew, follow "
                "it in another --workdir, or remove the old memory."
            )
        with path.open("rb") as file:
            file.seek(read)
            raw = file.read(_READ_BYTES)
        if not raw:
            if waited >= idle_seconds:
                if decoder.getstate()[0]:
                    raise ValueError(f"{path}, byte {read}: ends within a character. Convert the file to UTF-8.")
                ended = True
            else:
                sleep(poll_seconds)
                waited += poll_seconds
            continue
        waited = 0.0
        try:
            pending += decoder.decode(raw)
        except UnicodeDecodeError as error:
            at = read - len(decoder.getstate()[0]) + error.start
            raise ValueError(f"{path}, byte {at}: not UTF-8. Convert the file to UTF-8.") from error
        read += len(raw)


def _first_chunk(text: str, chunk_words: int, chunking: str, ahead: int, ended: bool) -> tuple[int, int] | None:
    """Returns start and end of the first chunk, None if it is not certain yet, or nothing is left."""
    words = re.finditer(r"\S+", text)
    last = 0
    for count, word in enumerate(words, start=1):
        # The word at the end of the text may still be growing.
        if word.end() == len(text) and not ended:
            break
        last = word.end()
        if count == ahead:
            break
    else:
        count = ahead if ended and last else 0
    if not ended and (last == 0 or count < ahead):
        return None
    spans = _chunking.cut(text[:last], chunk_words, chunking)
    return spans[0] if spans else None
