"""The model that our own Triton runs: an artifact's graph and tokenizer, behind the interface of its Python backend.

It runs in the backend's stub, a process of Triton's with the packages of Triton's environment. Rows have at least one
axis in Triton's protocol, so what has none here, `text` and `label`, [n], is a column there, and `reshape` says so.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import triton_python_backend_utils as triton

from runtimes.artifact import Artifact, open_folder
from runtimes.batch import Batcher, Job, Policy, Row
from runtimes.contract import Invalid, RuntimeFault, Tensor
from runtimes.dialect.tensors import texts
from runtimes.session import Session
from runtimes.triton_command import PARAMETER, REFUSAL, ROWS_MAX, TOKENS, Served

if TYPE_CHECKING:
    from runtimes.contract import Array


class TritonPythonModel:
    """By this name the backend looks for it."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Say what goes in and out. Called once, before the model is loaded to serve."""
        known = config.as_dict()
        served = _served(known)
        session = _session(served)
        reading, outputs = session.reading, session.outputs
        inputs = [_described(it, batched=reading.batched) for it in session.inputs]
        if reading.counts_tokens:
            outputs += (Tensor(TOKENS, "INT32", (-1,)),)
            # Token ids of calls with longer texts go beside those of others.
            inputs = [it | {"allow_ragged_batch": True} for it in inputs]
        # Not by `add_input`, which knows nothing of reshaping and of ragged batches.
        known["input"] = inputs
        known["output"] = [_described(it, batched=reading.batched) for it in outputs]
        if reading.batched:
            config.set_max_batch_size(max(served.batch_max or session.batch_max, ROWS_MAX))
            config.set_dynamic_batching()
        return config

    def initialize(self, arguments: dict[str, str]) -> None:
        served = _served(json.loads(arguments["model_config"]))
        self._session = _session(served)
        self._batch_max = served.batch_max or self._session.batch_max

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer calls that Triton has put together. One that is refused harms none of the others."""
        policy = Policy(rows_max=self._batch_max, delay_s_max=0.0, waiting_max=len(requests))
        batcher = Batcher(policy, who="the model")
        calls = [_Call(str(number)) for number in range(len(requests))]
        for call, request in zip(calls, requests, strict=True):
            batcher.enter(call)
            try:
                batcher.offer(self._rows(call, request), now_s=0.0)
            except Invalid as fault:
                call.fault = fault
        while batch := batcher.take(now_s=0.0)[0]:
            self._run(batch)
            batcher.done(batch, now_s=0.0, compute_s=0.0)
        return [call.response(self._session) for call in calls]

    def _rows(self, call: _Call, request: Any) -> list[Row]:
        reading = self._session.reading
        inputs = {tensor.name(): _read(tensor.name(), tensor.as_numpy()) for tensor in request.inputs()}
        self._session.check(inputs)
        found = [row for piece, _ in reading.pieces(inputs, ROWS_MAX) for row in reading.rows(piece)]
        call.costs = [cost for _, cost, _ in found]
        return [Row(call, index, content, length=cost, kind=kind) for index, (content, cost, kind) in enumerate(found)]

    def _run(self, batch: list[Row]) -> None:
        """If it fails, the rows of each call by themselves, so that none fails for its neighbours."""
        calls = {row.job for row in batch}
        try:
            outputs = self._session.run([row.content for row in batch])
        except RuntimeFault as fault:
            for call in calls:
                if len(calls) > 1:
                    self._run([row for row in batch if row.job is call])
                else:
                    assert isinstance(call, _Call)
                    call.fault = fault
            return
        for at, row in enumerate(batch):
            assert isinstance(row.job, _Call)
            row.job.found[row.index] = outputs, at


class _Call(Job):
    """One request, and what is known of its answer."""

    def __init__(self, flow: str) -> None:
        super().__init__(flow=flow, deadline_s=math.inf)
        self.fault: RuntimeFault | None = None
        self.costs: list[int] = []
        self.found: dict[int, tuple[dict[str, Array], int]] = {}
        """Row → the batch that it was in, and where."""

    def response(self, session: Session) -> Any:
        if self.fault is not None:
            return triton.InferenceResponse(error=_error(self.fault))
        rows = [self.found[index] for index in range(len(self.costs))]
        if session.reading.batched:
            outputs = {name: np.concatenate([batch[name][at : at + 1] for batch, at in rows]) for name in rows[0][0]}
        else:
            [(outputs, _)] = rows
        if session.reading.counts_tokens:
            outputs[TOKENS] = np.array(self.costs, np.int32)
        return triton.InferenceResponse([triton.Tensor(name, array) for name, array in outputs.items()])


def _error(fault: RuntimeFault) -> Any:
    if isinstance(fault, Invalid):
        return triton.TritonError(f"{REFUSAL}{fault.param or ''} {fault}", triton.TritonError.INVALID_ARG)
    return triton.TritonError(str(fault), triton.TritonError.UNAVAILABLE)


def _served(config: dict[str, Any]) -> Served:
    return msgspec.json.decode(config["parameters"][PARAMETER]["string_value"], type=Served)


def _session(served: Served) -> Session:
    """The gateway has verified the artifact."""
    found = open_folder(Path(served.artifact))
    assert isinstance(found, Artifact)
    return Session(found, threads=served.threads, provider="cpu")


def _described(tensor: Tensor, *, batched: bool) -> dict[str, Any]:
    """The first axis of what is batched goes without saying."""
    dims = list(tensor.shape[1:] if batched else tensor.shape)
    known = {"name": tensor.name, "data_type": "TYPE_" + tensor.datatype.replace("BYTES", "STRING")}
    optional = {"optional": True} if tensor.optional else {}
    return known | optional | ({"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}})


def _read(name: str, array: Array) -> Array:
    return texts(name, array.copy()) if array.dtype == object else array  # what Triton hands over is its own
