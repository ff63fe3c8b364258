"""An OpenAI-like HTTP server on loopback, in front of any Generator: what a remote engine looks like from here."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from runtimes.contract import Exchange, Generator


@asynccontextmanager
async def serving(runtime: Generator) -> AsyncIterator[str]:
    """The address while it serves. One call per connection; a client that leaves ends its call, as in vLLM."""
    calls: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request_line, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        call = asyncio.create_task(relay(request_line.split(" ")[1], body, writer))
        gone = asyncio.create_task(reader.read(1))
        calls.update((call, gone))
        await asyncio.wait((call, gone), return_when=asyncio.FIRST_COMPLETED)
        for task in (call, gone):
            task.cancel()
        await asyncio.gather(call, gone, return_exceptions=True)
        calls.difference_update((call, gone))
        writer.close()

    async def relay(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        async with runtime.exchange(Exchange(path=path, body=body, deadline_s=math.inf)) as reply:
            lines = [b"HTTP/1.1 %d Any" % reply.status, b"transfer-encoding: chunked", b"connection: close"]
            lines += [name + b": " + value for name, value in reply.headers]
            writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
            async for frame in reply.frames:
                writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        server.close()
        for call in calls:
            call.cancel()
        await server.wait_closed()
