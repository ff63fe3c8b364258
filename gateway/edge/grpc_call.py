"""One call over gRPC, seen from the server: its messages in and out, and its end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from gateway.edge.coding import FRAMINGS, decompressed
from gateway.errors import BadRequest, GatewayError, HeaderTooLarge, TooLarge, TooManyConnections, Unsupported
from runtimes.http2.connection import Connection
from runtimes.http2.fields import Fields, encoded
from runtimes.http2.frames import Code
from runtimes.http2.stream import Stream
from runtimes.rpc.messages import PREFIX, Body, Messages, Piece, TooLong, framed
from runtimes.rpc.status import CONTENT_TYPE, Status, is_grpc, message, timeout_s

if TYPE_CHECKING:
    from gateway.edge.grpc_server import GrpcServer

Trailing = Iterable[tuple[bytes, bytes]]

REST = encoded([(b"content-type", CONTENT_TYPE), (b"grpc-accept-encoding", b"identity,deflate,gzip")])
HEAD = encoded([(b":status", b"200")]) + REST
#: For who does not know that an answer of gRPC with status 200 may be a failure.
NOT_GRPC = encoded([(b":status", b"415")]) + REST
OK = encoded([(b"grpc-status", b"0")])
#: A call may go on for so much longer than its client said: who knows the deadline too has better words for its end.
GRACE_S = 0.1
#: A refusal waits for so long for the message that nobody will read: grpcio's asyncio streams take an answer that is
#: there before they have sent anything for a failure of their own.
REFUSE_S_MAX = 0.05
#: Messages of one connection that nobody has read, whole or not, may take as much as so many of the largest.
LARGEST_UNREAD_MAX = 8
#: What each takes here beside its bytes.
PIECE_BYTES = 128


class Share:
    """What the calls of one connection have, together, of what all connections share."""

    __slots__ = ("unread_bytes", "watchers")

    def __init__(self) -> None:
        self.unread_bytes = 0
        self.watchers = 0
        """Calls that watch the health."""


class Rpc(Stream):
    """What its handler reads and writes by. The client's leaving, or its deadline, cancels the handler."""

    __slots__ = (
        "_arrived",
        "_bytes_max",
        "_came",
        "_coding",
        "_deadline_s",
        "_fault",
        "_head",
        "_headed",
        "_loop",
        "_messages",
        "_news",
        "_number_max",
        "_refusal",
        "_server",
        "_task",
        "_timer",
        "_unread_bytes",
        "fields",
        "method",
        "share",
        "trailing",
    )

    def __init__(self, connection: Connection, id: int, server: GrpcServer, share: Share) -> None:
        super().__init__(connection, id)
        self.method = ""
        self.fields: Mapping[bytes, bytes] = {}
        """What the client said beside that."""
        self.trailing: Trailing = ()
        """What is said at the end beside that all went well."""
        self.share = share
        self._server = server
        self._loop = server.loop
        self._bytes_max = server.bounds.body_bytes_max
        self._messages = Messages(bytes_max=self._bytes_max)
        self._number_max: int | None = None
        """Of its messages."""
        self._came = 0
        self._unread_bytes = 0
        """Its part of `share`."""
        self._coding: bytes | None = None
        self._arrived: deque[Piece] = deque()
        self._fault: GatewayError | None = None
        """What is wrong with the message that comes next."""
        self._refusal: GatewayError | None = None
        """It is not answered, but refused for this, by its header alone."""
        self._news: asyncio.Future[None] | None = None
        """Done when something has arrived, or gone out: a handler waits for one thing at a time."""
        self._task: asyncio.Task[None] | None = None
        self._deadline_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._head = HEAD
        self._headed = False
        """The header of the answer is out."""

    # ---- for its door

    def expect(self, *, bytes_max: int, number_max: int | None) -> None:
        """How long a message may be, and how many may come. To be said before any of it is here."""
        self._bytes_max = self._messages.bytes_max = bytes_max
        self._number_max = number_max

    # ---- for its handler

    @property
    def left_s(self) -> float | None:
        """Until the client's deadline, None if it has none."""
        return None if self._deadline_s is None else self._deadline_s - self._loop.time()

    @property
    def here(self) -> bool:
        """A message, or that there is none, need not be waited for."""
        return bool(self._arrived) or self._fault is not None or self.ended_there

    async def read(self) -> Body | None:
        """The next message, None after the last. Raises GatewayError."""
        while not self.here:
            await self._waits()
        if not self._arrived:
            if self._fault is not None:
                raise self._fault
            return None
        compressed, body = self._arrived.popleft()
        self._hold(-PREFIX.size - len(body) - PIECE_BYTES)
        if not self._arrived:
            self.refill()
            self.connection.out.flush()
        if not compressed:
            return body
        if (self._coding or b"").decode("latin-1") not in FRAMINGS:
            raise Unsupported("The message is compressed in a way that is not taken; send gzip, deflate or identity.")
        return await decompressed(bytes(body), self._coding, bytes_max=self._bytes_max)

    def write(self, message: bytes) -> None:
        """A message; `drained` returns once it has gone out, as far as this side can know."""
        self._begin()
        self.send_data(framed(message))
        self.connection.out.flush()

    def finish(self, message: bytes | None = None) -> None:
        """The last message, if there is one, and that all went well."""
        self._forget()
        self._begin()
        if message is not None:
            self.send_data(framed(message))
        self.send_fields(OK + encoded(self.trailing), end=True)
        self.connection.out.flush()

    async def drained(self) -> None:
        while self.unsent:
            await self._waits()

    def refuse(self, status: Status, said: str, trailing: Trailing = ()) -> None:
        """End it with this, behind what the client has taken by now."""
        self._forget()
        self.drop_unsent()
        block = encoded([(b"grpc-status", b"%d" % status), (b"grpc-message", message(said)), *trailing])
        self.send_fields(block if self._headed else self._head + block, end=True)
        self.connection.out.flush()

    def give_up(self) -> None:
        """End it without a word, because its client does not take any."""
        self._forget()
        self.reset(Code.CANCEL)
        self.connection.out.flush()

    def stop(self) -> None:
        """End it because its server stops."""
        if self._task is not None:
            self._task.cancel()
        self.refuse(Status.UNAVAILABLE, "This gateway is stopping.")

    def _begin(self) -> None:
        if not self._headed:
            self._headed = True
            self.send_fields(self._head)

    async def _waits(self) -> None:
        self._news = self._loop.create_future()
        await self._news

    # ---- for its connection

    def take_fields(self, fields: Fields, *, ended: bool) -> None:
        if self._refusal is not None:
            self._refuse()
            return
        if self.method:  # these are trailers, which say nothing but that it is the end
            self._arrive((), ended=ended)
            return
        self.fields, self.method = fields.regular, fields.pseudo[b":path"].decode("latin-1")
        door = self._server.door
        try:
            self._require_sound(fields)
            handler = door.enter(self)
        except GatewayError as error:
            self._unset_timer()
            self._refusal = error
            if ended:
                self._refuse()
            else:
                self._timer = self._loop.call_later(REFUSE_S_MAX, self._refuse)
        else:
            self._task = self._server.start(self, handler)
            self._task.add_done_callback(self._ended)

    def take_data(self, data: bytes, *, ended: bool) -> bool:
        if self._refusal is not None:
            self._refuse()
            return False
        if self.ended_here or self._fault is not None:
            return False
        unread_bytes_max = LARGEST_UNREAD_MAX * self._server.bounds.body_bytes_max
        if self.share.unread_bytes + len(data) > unread_bytes_max:
            self._reject(
                _crowded(f"This connection's messages hold {unread_bytes_max} bytes that are not read yet; send fewer.")
            )
            return False
        self._hold(len(data))
        found: list[Piece] = []
        try:
            found = self._messages.feed(data)
        except TooLong:
            self._fault = TooLarge(f"The message is larger than {self._bytes_max} bytes.")
        self._hold(len(found) * PIECE_BYTES)
        self._came += len(found)
        if self._number_max is not None and self._came > self._number_max:
            self._reject(Unsupported("The call brings more messages than its method takes."))
            return False
        self._arrive(found, ended=ended)
        return not self._arrived and self._fault is None

    def cut(self, code: int, why: str) -> None:
        self._forget()
        self._unset_timer()
        if self._task is not None:
            self._task.cancel()

    def sent(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _hold(self, more_bytes: int) -> None:
        self._unread_bytes += more_bytes
        self.share.unread_bytes += more_bytes

    def _forget(self) -> None:
        """Nothing of it is read any more."""
        if self._unread_bytes:
            self._hold(-self._unread_bytes)
            self._arrived.clear()
            self._messages = Messages(bytes_max=0)

    def _reject(self, error: GatewayError) -> None:
        """End it for what comes, whatever its handler is at."""
        if self._task is not None:
            self._task.cancel()
        self._server.door.refuse(self, error)

    def _arrive(self, found: Iterable[Piece], *, ended: bool) -> None:
        self._arrived.extend(found)
        if ended and self._messages.torn and self._fault is None:
            self._fault = BadRequest("The message breaks off before its end.")
        self.sent()

    def _require_sound(self, fields: Fields) -> None:
        bounds = self._server.bounds
        if fields.number > bounds.headers_max or fields.size - 32 * fields.number > bounds.header_bytes_max:
            raise HeaderTooLarge(
                f"The header has more than {bounds.headers_max} fields or {bounds.header_bytes_max} bytes."
            )
        if not is_grpc(self.fields.get(b"content-type", b"")):
            self._head = NOT_GRPC
            raise Unsupported("This port speaks gRPC, `content-type: application/grpc`, and nothing else.")
        if fields.pseudo[b":method"] != b"POST":
            raise Unsupported("This port speaks gRPC, and nothing else.")
        if len(self._server.calls) >= bounds.connections_max:
            raise _crowded(f"This gateway already has {bounds.connections_max} calls over gRPC.")
        self._coding = self.fields.get(b"grpc-encoding")
        if b"grpc-timeout" in self.fields:
            try:
                left_s = timeout_s(self.fields[b"grpc-timeout"])
            except ValueError as fault:
                raise BadRequest(f"{fault}.") from None
            self._deadline_s = self._loop.time() + left_s
            self._timer = self._loop.call_later(left_s + GRACE_S, self._late)

    def _late(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self.refuse(Status.DEADLINE_EXCEEDED, "The deadline has passed.")

    def _refuse(self) -> None:
        self._unset_timer()
        assert self._refusal is not None
        self._server.door.refuse(self, self._refusal)

    def _ended(self, _task: object) -> None:
        self._task = None  # its error knows this call: a cycle, which would lie about until somebody looks for garbage
        self._unset_timer()

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _crowded(said: str) -> GatewayError:
    error = TooManyConnections(said)
    error.grpc = "RESOURCE_EXHAUSTED"
    return error
