"""gRPC calls to one server, all over one connection, which is made when it is needed, and made anew when it is lost."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import NamedTuple

from runtimes.http2.fields import encoded
from runtimes.rpc.call import RpcError
from runtimes.rpc.messages import Body
from runtimes.rpc.status import CONTENT_TYPE, Status, timeout
from runtimes.rpc.wire import ALPN, Wire

#: How long it may take to connect, TLS and the server's settings included.
CONNECT_S_MAX = 5.0
#: Pauses before a call is sent again that its server has not looked at: one that was on its way to a connection which
#: the server gives up, or that came to a place which the server does not count as free yet.
UNSEEN_S = (0.001, 0.01, 0.1)


class Address(NamedTuple):
    """A host and a port, or the path of a Unix socket."""

    host: str = "localhost"
    port: int = 0
    path: str = ""
    tls: ssl.SSLContext | None = None

    @property
    def authority(self) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode() if self.port else host.encode()


def trusting_the_system() -> ssl.SSLContext:
    """TLS for clients, with the machine's own authorities."""
    context = ssl.create_default_context()
    context.set_alpn_protocols([ALPN])
    return context


class Channel:
    """Belongs to the event loop that uses it first. A message may have `bytes_max`."""

    def __init__(self, address: Address, *, bytes_max: int, metadata: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._address = address
        self._bytes_max = bytes_max
        self._metadata = tuple(metadata)
        self._wires: set[Wire] = set()
        """That are open. All but the last are left by and by, with their last call."""
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[Wire] | None = None
        self._closed = False

    def method(self, path: str) -> bytes:
        """What calls of it begin with: made once, for `ask`."""
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"https" if self._address.tls else b"http"),
            (b":path", path.encode()),
            (b":authority", self._address.authority),
            (b"te", b"trailers"),
            (b"content-type", CONTENT_TYPE),
        ]
        return encoded([*fields, *self._metadata])

    async def ask(self, method: bytes, message: bytes, *, timeout_s: float | None) -> Body:
        """The message of the answer. Raises RpcError. The server is told if the caller leaves, or it is too late."""
        if timeout_s is None:
            return await self._ask(method, message)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(method + encoded([(b"grpc-timeout", timeout(timeout_s))]), message)
        except TimeoutError:
            raise RpcError(Status.DEADLINE_EXCEEDED, f"no answer came within {timeout_s:g} s") from None

    async def aclose(self) -> None:
        """Calls under way fail."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        for wire in tuple(self._wires):
            wire.close()
            await wire.gone.wait()

    async def _ask(self, block: bytes, message: bytes) -> Body:
        for pause_s in UNSEEN_S:
            try:
                return await self._ask_once(block, message)
            except RpcError as error:
                if not error.unseen:
                    raise
            await asyncio.sleep(pause_s)
        return await self._ask_once(block, message)

    async def _ask_once(self, block: bytes, message: bytes) -> Body:
        while True:
            wire = self._wire
            if wire is None or not wire.open:
                wire = await self._connected()
                if not wire.open:
                    raise RpcError(Status.UNAVAILABLE, "it gave up its connection at once")
            if not wire.crowded:
                break
            await wire.place()
        call = wire.begin(block, message, bytes_max=self._bytes_max)
        try:
            return await call.answer
        finally:
            wire.end(call)

    async def _connected(self) -> Wire:
        """One connection for all who need it now, whoever of them stays."""
        if self._closed:
            raise RpcError(Status.UNAVAILABLE, "the channel is closed")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(_look_at)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Wire:
        loop, address = asyncio.get_running_loop(), self._address
        wire = Wire(self._wires)
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                if address.path:
                    await loop.create_unix_connection(lambda: wire, address.path)
                else:
                    name = address.host if address.tls else None
                    await loop.create_connection(
                        lambda: wire, address.host, address.port, ssl=address.tls, server_hostname=name
                    )
                await wire.greeted
        except (OSError, TimeoutError) as error:
            raise RpcError(Status.UNAVAILABLE, f"it cannot be reached: {error or 'it took too long'}") from None
        finally:
            if not wire.greeted.done() or wire.greeted.cancelled() or wire.greeted.exception():
                wire.close()
                # uvloop never says that it is lost, if this was cancelled in the turn in which it was made.
                self._wires.discard(wire)
        self._wire = wire
        return wire


def _look_at(task: asyncio.Task[Wire]) -> None:
    """Those who waited for it may have left, and Python complains of faults that nobody has seen."""
    if not task.cancelled():
        task.exception()
