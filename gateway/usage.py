"""Exactly one record of every call, whatever becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from gateway.call import Call, Outcome, Record
from gateway.errors import EngineFailed, EngineUnavailable, GatewayError
from gateway.journal import Journal
from runtimes.clock import Clock


class Usage:
    """Makes exactly one record of every call, whatever becomes of it."""

    def __init__(self, *, journal: Journal, clock: Clock) -> None:
        self.journal = journal
        self.clock = clock

    def record(self, call: Call) -> Recorded:
        """Inside is the call's whole life. Entering raises JournalFull if records can no longer be kept."""
        return Recorded(self, call)

    def when_recorded(self, then: Callable[[], None]) -> None:
        """Call back once the records made so far can no longer be lost to a kill."""
        self.journal.when_written(then)

    def flush(self) -> None:
        """The records made so far can no longer be lost to a kill."""
        self.journal.flush()


class Recorded:
    """See Usage.record."""

    __slots__ = ("_call", "_usage")

    def __init__(self, usage: Usage, call: Call) -> None:
        self._usage = usage
        self._call = call

    def __enter__(self) -> None:
        self._usage.journal.require_room()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        call = self._call
        match error:
            case None:
                call.outcome = Outcome.served if call.complete else Outcome.cancelled
            case GatewayError():
                call.outcome = _failed(call, error)
            case asyncio.CancelledError():
                call.outcome, call.code = Outcome.cancelled, "client_left"
            case _:
                call.outcome, call.code = Outcome.failed, "internal_error"
                call.status = call.status or 500
        call.total_s = self._usage.clock.now_s() - call.received_s
        self._usage.journal.append(_record(call))


def _failed(call: Call, error: GatewayError) -> Outcome:
    call.status, call.code = call.status or error.status, error.code
    if not call.replica:
        return Outcome.failed if isinstance(error, EngineFailed | EngineUnavailable) else Outcome.refused
    return Outcome.failed if error.status >= 500 else Outcome.rejected


def _record(call: Call) -> Record:
    principal = call.principal
    return Record(  # in the order of its fields, which costs half of naming them
        call.id,
        call.at_s,
        principal.tenant_id,
        principal.tenant,
        principal.key_id,
        call.model,
        call.route,
        call.stream,
        call.replica,
        call.outcome,
        call.status,
        call.code,
        call.tokens_in,
        call.tokens_out,
        call.tokens_cached,
        call.items,
        call.cost_nano,
        call.estimated,
        # To the microsecond; `round(x, 6)` would write each out and read it again.
        round(call.wait_s * 1e6) / 1e6,
        round(call.first_byte_s * 1e6) / 1e6,
        round(call.total_s * 1e6) / 1e6,
    )
