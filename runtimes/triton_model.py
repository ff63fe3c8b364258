"""The model that our own Triton runs: an artifact's graph and tokenizer, behind the interface of its Python backend.

It runs in the backend's stub, a process of Triton's with the packages of Triton's environment. Rows have at least one
axis in Triton's protocol, so what has none here, `text` and `label`, [n], is a column there, and `reshape` says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import triton_python_backend_utils as triton

from runtimes.artifact import Artifact, open_folder
from runtimes.contract import Invalid, Tensor, Unavailable
from runtimes.session import Session, batches, merged, pieces
from runtimes.triton_command import PARAMETER, TOKENS, Served

if TYPE_CHECKING:
    from runtimes.contract import Array


class TritonPythonModel:
    """By this name the backend looks for it."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Say what goes in and out. Called once, before the model is loaded to serve."""
        known = config.as_dict()
        session = _session(_served(known))
        # Not by `add_input`, which knows nothing of reshaping and of rows that differ in length.
        known["input"] = [_described(it) | {"optional": True, "allow_ragged_batch": True} for it in session.inputs]
        known["output"] = [_described(it) for it in (*session.outputs, Tensor(TOKENS, "INT32", (-1,)))]
        return config

    def initialize(self, arguments: dict[str, str]) -> None:
        served = _served(json.loads(arguments["model_config"]))
        self._session = _session(served)
        self._batch_max = served.batch_max

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer calls that Triton has put together. One that is refused harms none of the others."""
        found = [self._rows(request) for request in requests]
        rows = [row for it in found if isinstance(it, list) for row in it]
        try:
            outputs = self._run(rows) if rows else {}
        except Unavailable as fault:
            outputs, found = {}, [_refusal(fault, triton.TritonError.UNAVAILABLE)] * len(requests)
        answers, start = [], 0
        for it in found:
            if not isinstance(it, list):
                answers.append(it)
                continue
            end = start + len(it)
            tensors = [triton.Tensor(name, array[start:end]) for name, array in outputs.items()]
            answers.append(triton.InferenceResponse(tensors))
            start = end
        return answers

    def _rows(self, request: Any) -> Any:
        """Its rows of token ids, or its refusal."""
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            if "text" in inputs:
                inputs["text"] = _decoded(inputs["text"])
            self._session.check(inputs)
            return [row for piece in pieces(inputs) for row in self._session.tokens(piece)]
        except Invalid as fault:
            return _refusal(fault, triton.TritonError.INVALID_ARG)

    def _run(self, rows: list[Array]) -> dict[str, Array]:
        plan = batches(rows, rows_max=self._batch_max)
        outputs = merged(plan, [self._session.run([rows[index] for index in batch]) for batch in plan])
        return outputs | {TOKENS: np.array([len(row) for row in rows], np.int32)}


def _served(config: dict[str, Any]) -> Served:
    return msgspec.json.decode(config["parameters"][PARAMETER]["string_value"], type=Served)


def _session(served: Served) -> Session:
    """The gateway has verified the artifact."""
    found = open_folder(Path(served.artifact))
    assert isinstance(found, Artifact)
    return Session(found, threads=served.threads, provider="cpu")


def _described(tensor: Tensor) -> dict[str, Any]:
    kind = "TYPE_" + tensor.datatype.replace("BYTES", "STRING")
    if len(tensor.shape) == 1:
        return {"name": tensor.name, "data_type": kind, "dims": [1], "reshape": {"shape": []}}
    return {"name": tensor.name, "data_type": kind, "dims": list(tensor.shape[1:])}


def _decoded(text: Array) -> Array:
    found = np.empty(len(text), object)
    try:
        found[:] = [row.decode() for row in text]
    except UnicodeDecodeError:
        raise Invalid("`text` is not UTF-8", param="text") from None
    return found


def _refusal(fault: Exception, code: int) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(str(fault), code))
