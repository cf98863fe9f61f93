"""Serves chat completions on loopback, each after so many milliseconds, for as many as come at once.

    python benchmarks/_latency_server.py MILLISECONDS

Prints its base URL. It only reads as much of a request as it must.
"""

import asyncio
import functools
import json
import sys

REPLY = json.dumps(
    {
        "choices": [{"message": {"role": "assistant", "content": "an answer"}}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 3},
    }
).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(REPLY) + REPLY


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Answers the requests of one connection."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            await asyncio.sleep(seconds)
            writer.write(RESPONSE)
    except (ConnectionError, asyncio.IncompleteReadError):
        writer.close()


async def main() -> None:
    """Serves until standard input ends."""
    seconds = float(sys.argv[1]) / 1000
    answer = functools.partial(serve, seconds=seconds)
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(json.dumps({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"}), flush=True)
    # Until whoever started it goes away.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(main())
