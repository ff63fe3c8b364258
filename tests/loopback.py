"""An OpenAI-like HTTP server on loopback, in front of any Generator: what a remote engine looks like from here."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from runtimes.contract import Exchange, Generator


@asynccontextmanager
async def serving(runtime: Generator) -> AsyncIterator[str]:
    """The base URL while it serves. One call per connection; a client that leaves ends its call, as in vLLM."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(answer(reader, writer))
        connections.add(connection)
        connection.add_done_callback(connections.discard)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            path, body = await _request(reader)
            call = asyncio.create_task(relay(path, body, writer))
            gone = asyncio.create_task(reader.read(1))
            try:
                await asyncio.wait((call, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                call.cancel()
                gone.cancel()
                await asyncio.gather(call, gone, return_exceptions=True)
        finally:
            writer.close()

    async def relay(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        async with runtime.exchange(Exchange(path=path, body=body, deadline_s=math.inf)) as reply:
            head = [b"HTTP/1.1 %d Any" % reply.status, b"transfer-encoding: chunked", b"connection: close"]
            head += [name + b": " + value for name, value in reply.headers]
            writer.write(b"\r\n".join(head) + b"\r\n\r\n")
            async for frame in reply.frames:
                writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()


async def _request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    request_line, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return request_line.split(" ")[1], await reader.readexactly(int(headers.get("content-length", 0)))
