"""A client that sends and reads bytes, for what no HTTP library would let through."""

import asyncio
import json
from typing import Any, NamedTuple

SILENCE_S = 0.1


class Seen(NamedTuple):
    """What came back."""

    data: bytes
    end: str
    """`closed`, `reset`, or `open`: nothing more came."""

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1])

    @property
    def body(self) -> bytes:
        """Chunks put together."""
        head, _, rest = self.data.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head:
            return rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return body

    @property
    def events(self) -> list[bytes]:
        """The data of each."""
        lines = [line for event in self.body.split(b"\n\n") for line in event.split(b"\n")]
        return [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]


def request(path: str = "/v1/chat/completions", *, id: str = "req_1", **fields: Any) -> bytes:
    """A POST as a gateway sends it."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "prompt": "hello", "input": "hello"}
    body = json.dumps(asked | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port), limit=2**27)


async def exchange(address: str, sent: bytes, *, until: bytes | None = None, bytes_max: int = 2**27) -> Seen:
    """What comes back on a connection of its own, until it is closed, says `until`, falls silent, or has
    sent so many bytes."""
    reader, writer = await connect(address)
    writer.write(sent)
    data = b""
    try:
        while len(data) < bytes_max and (until is None or until not in data):
            more = await asyncio.wait_for(reader.read(2**20), SILENCE_S)
            if not more:
                return Seen(data, "closed")
            data += more
    except TimeoutError:
        pass
    except ConnectionResetError:
        return Seen(data, "reset")
    finally:
        writer.close()
    return Seen(data, "open")
