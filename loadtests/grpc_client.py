"""One connection that asks for inferences over gRPC, as a client of the Open Inference Protocol does.

grpcio's own asyncio client with the messages of Triton's, because that is what users have; its cost is the client's
core's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import grpc
import grpc.aio

from loadtests.client import CANCELLED, Answer
from loadtests.target import Target

METHOD = "/inference.GRPCInferenceService/ModelInfer"
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 * 1024 * 1024))
"""A connection of its own for each, as clients on different machines have."""


class GrpcConnection:
    """As loadtests.client.Connection, for one inference at a time."""

    def __init__(self, target: Target, headers: Mapping[str, str]) -> None:
        self.open = False
        address = f"unix:{target.socket}" if target.socket else target.authority
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._infer = self._channel.unary_unary(METHOD)
        self._metadata = tuple(headers.items())
        self._task: asyncio.Task[None] | None = None
        self._answer: Answer | None = None

    async def connect(self, *, within_s: float) -> None:
        """Raises OSError, TimeoutError among them."""
        async with asyncio.timeout(within_s):
            await self._channel.channel_ready()
        self.open = True

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.done()

    def ask(self, request: bytes, answer: Answer) -> asyncio.Task[None]:
        """Send; done once `answer` is whole or has a fault. One call at a time."""
        self._answer = answer
        self._task = asyncio.create_task(self._ask(request, answer))
        return self._task

    async def _ask(self, request: bytes, answer: Answer) -> None:
        try:
            reply = await self._infer(request, metadata=self._metadata)
            answer.status, answer.complete = 200, bool(reply)
        except grpc.aio.AioRpcError as error:
            answer.fault = error.code().name.lower().replace("_", "-")
        except asyncio.CancelledError:
            answer.fault = answer.fault or "closed"
        answer.end_s = time.perf_counter()

    def leave(self) -> None:
        """Stop, if it has not been answered."""
        if self.busy:
            self._end(CANCELLED)

    def stop(self, fault: str) -> None:
        """Close at once; a call under way ends with this fault."""
        self.open = False
        self._end(fault)
        self._closing = asyncio.get_running_loop().create_task(self._channel.close())

    def _end(self, fault: str) -> None:
        if self._task is not None and not self._task.done():
            assert self._answer is not None
            self._answer.fault = fault
            self._task.cancel()


def infer_request(model: str, text: str) -> bytes:
    """One text for a classifier, in the binary form; a row of one column, which is how Triton wants it."""
    from tritonclient.grpc import service_pb2

    raw = text.encode()
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="text", datatype="BYTES", shape=[1, 1])
    message.raw_input_contents.append(len(raw).to_bytes(4, "little") + raw)
    return bytes(message.SerializeToString())
