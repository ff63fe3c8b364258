"""A Triton that runs no model: what a server elsewhere looks like from here, with its whims. And where the session's
real one is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from runtimes.artifact import Shelf
from runtimes.contract import Site, Tensor
from runtimes.dialect import messages, tensors
from runtimes.dialect.elements import Part
from runtimes.triton import Triton
from tests.e2e.servers import GatewayProcess

SERVICE = "inference.GRPCInferenceService"


class FakeTriton:
    """Of one model: `scores` of a text are all in the column of its length, `text` is given back as `said`."""

    inputs: tuple[Tensor, ...] = (Tensor("text", "BYTES", (-1, 1)), Tensor("weight", "INT64", (-1, 2)))
    outputs: tuple[Tensor, ...] = (Tensor("scores", "FP32", (-1, 3)), Tensor("said", "BYTES", (-1, 1)))

    def __init__(self, *, rows_max: int = 4) -> None:
        self.rows_max = rows_max
        self.versions = ["1"]
        self.ready = True
        self.silent = False
        """Says nothing to whoever asks whether it is ready."""
        self.trouble: tuple[grpc.StatusCode, str] | None = None
        """What every inference ends in; None while all is well."""
        self.nonsense: bytes | None = None
        """In place of the bytes of an answer."""
        self.spoil: Callable[[Any], Any] = lambda scores: scores
        """What becomes of the scores of each inference, None for none."""
        self.go_on = asyncio.Event()
        """Inferences wait for this."""
        self.go_on.set()
        self.begun = asyncio.Event()
        self.left = asyncio.Event()
        """Set once a call was cancelled here."""
        self.decoupled = False
        self.rows: list[int] = []
        """Of each inference."""
        self.asked: Any = None
        """The newest inference, whole."""
        self.left_s: float | None = None
        """What the newest caller said is left of its time."""
        self.authorization: str | None = None

    @asynccontextmanager
    async def serving(self, address: str, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[int]:
        """Yields its port, if it has one."""
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        methods = {
            "ModelInfer": (self._infer, messages.ModelInferRequest),
            "ModelReady": (self._ready, messages.ModelReadyRequest),
            "ModelMetadata": (self._metadata, messages.ModelMetadataRequest),
            "ModelConfig": (self._config, messages.ModelConfigRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                handler, request_deserializer=taken.FromString, response_serializer=lambda it: it.SerializeToString()
            )
            for name, (handler, taken) in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        await server.start()
        try:
            yield port
        finally:
            await server.stop(0)

    async def _ready(self, _request: Any, _context: Any) -> Any:
        if self.silent:
            await asyncio.get_running_loop().create_future()
        return messages.ModelReadyResponse(ready=self.ready)

    async def _metadata(self, request: Any, context: Any) -> Any:
        if request.name != "theirs":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        inputs, outputs = (
            [{"name": it.name, "datatype": it.datatype, "shape": it.shape} for it in side]
            for side in (self.inputs, self.outputs)
        )
        return messages.ModelMetadataResponse(
            name=request.name, versions=self.versions, platform="python", inputs=inputs, outputs=outputs
        )

    async def _config(self, request: Any, _context: Any) -> Any:
        config: dict[str, Any] = {"name": request.name, "backend": "python", "max_batch_size": self.rows_max}
        config["model_transaction_policy"] = {"decoupled": self.decoupled}
        return messages.ModelConfigResponse(config=config)

    async def _infer(self, request: Any, context: Any) -> Any:
        self.left_s = context.time_remaining()
        self.authorization = dict(context.invocation_metadata()).get("authorization")
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        if self.trouble is not None:
            await context.abort(*self.trouble)
        given = {
            it.name: tensors.array(Part(it.name, it.datatype, tuple(it.shape), raw))
            for it, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        self.asked = request
        text = given["text"]
        self.rows.append(len(text))
        found = {"scores": np.eye(3, dtype=np.float32)[[min(len(it), 2) for it in text.flat]], "said": text}
        classes = {it.name for it in request.outputs if "classification" in it.parameters}
        found["scores"] = self.spoil(found["scores"])
        found |= {name: np.full((len(text), 1), b"1.0:0:theirs", object) for name in classes}
        names = {it.name for it in request.outputs} or found.keys()
        wanted = [it for it in self.outputs if it.name in names and found[it.name] is not None]
        datatypes: dict[str, Any] = {it.name: "BYTES" if it.name in classes else it.datatype for it in wanted}
        told = [{"name": name, "datatype": it, "shape": found[name].shape} for name, it in datatypes.items()]
        raws = [self.nonsense or tensors.raw(found[name], it) for name, it in datatypes.items()]
        version = request.model_version or self.versions[-1]
        return messages.ModelInferResponse(model_version=version, outputs=told, raw_output_contents=raws)


def address(folder: Path) -> str:
    return f"unix:{folder / 'triton'}"


def socket(gateway: GatewayProcess) -> str:
    """The address of the server that it runs for the model `tiny`."""
    shelf = Shelf(gateway.state / "shelf")
    generation = shelf.aliases("tiny")["stable"]
    site = Site(model="tiny", replica="tiny-0", state=gateway.state, shelf=shelf, generation=generation)
    url = Triton(artifact="tiny").attached(site).url
    assert url
    return url
