"""A call's answer, put together from those of the batches that its rows were in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from runtimes.batch import Job, Row
from runtimes.contract import InferReply, InferRequest, RuntimeFault

if TYPE_CHECKING:
    from runtimes.contract import Array


class Batch(msgspec.Struct, frozen=True, gc=False):
    """Rows that went through the graph together."""

    rows: list[Row]
    calls: dict[Job, list[int]]
    """Whose they are, and where in the batch."""
    found: dict[str, Any] | RuntimeFault
    """What the graph answered, row by row."""
    taken_s: float
    """When, by the clock, a worker took them."""
    compute_s: float


class Call(Job):
    """A call, and what is known of its answer. All but the Job belongs to the event loop."""

    def __init__(self, request: InferRequest, *, rows: int) -> None:
        super().__init__(flow=request.flow, deadline_s=request.deadline_s)
        self.rows = rows
        self._wanted = request.outputs
        self._outputs: Mapping[str, Array] = {}
        self._answered = 0
        self._awaited = 0
        self._reached: asyncio.Future[None] | None = None
        self._fault: RuntimeFault | None = None
        self._batch_rows_max = 0
        self._queue_s = 0.0
        self._compute_s = 0.0

    async def until(self, answered: int) -> None:
        """Return once so many of its rows have their answers. Raises what went wrong with any."""
        if self._fault is None and self._answered < answered:
            self._awaited = answered
            self._reached = asyncio.get_running_loop().create_future()
            await self._reached
        if self._fault is not None:
            raise self._fault

    def take(self, batch: Batch, places: list[int]) -> None:
        """Its rows at these places of a batch have been answered."""
        if isinstance(batch.found, RuntimeFault):
            self.fail(batch.found)
            return
        self._batch_rows_max = max(self._batch_rows_max, len(batch.rows))
        # The first of them is the one that was in line first.
        self._queue_s = max(self._queue_s, batch.taken_s - batch.rows[places[0]].offered_s)
        self._compute_s += batch.compute_s
        self._answered += len(places)
        self._keep([batch.rows[place].index for place in places], places, batch)
        if self._answered >= self._awaited:
            self._wake()

    def fail(self, fault: RuntimeFault) -> None:
        self._fault = fault
        self._wake()

    def reply(self, tokens_in: int) -> InferReply:
        outputs = {name: self._outputs[name] for name in self._wanted or self._outputs}
        return InferReply(outputs, tokens_in, self._batch_rows_max, self._queue_s, self._compute_s)

    def _keep(self, indices: list[int], places: list[int], batch: Batch) -> None:
        """Put a batch's answers where they belong; without copying them if that is all of the call, in order."""
        assert not isinstance(batch.found, RuntimeFault)
        if len(batch.rows) == self.rows and indices == list(range(self.rows)):
            self._outputs = batch.found
        elif self.rows == 1:
            [place] = places
            self._outputs = {name: array[place : place + 1] for name, array in batch.found.items()}
        else:
            import numpy as np

            if not self._outputs:
                self._outputs = {
                    name: np.empty((self.rows, *array.shape[1:]), array.dtype) for name, array in batch.found.items()
                }
            for name, array in batch.found.items():
                self._outputs[name][indices] = array[places]

    def _wake(self) -> None:
        if self._reached is not None and not self._reached.done():
            self._reached.set_result(None)


def hand_out(found: Iterable[Batch]) -> None:
    """Give all calls what is theirs."""
    for batch in found:
        for call, places in batch.calls.items():
            assert isinstance(call, Call)
            call.take(batch, places)
