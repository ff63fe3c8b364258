"""A model that takes and gives every datatype there is, and sound requests for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from runtimes.contract import Tensor
from runtimes.dialect import kserve_grpc, messages
from runtimes.dialect.elements import joined
from runtimes.dialect.tensors import DTYPES

EVERYTHING: Mapping[str, Any] = {
    "text": np.array(["refund", "ü"], object),
    "BYTES": np.array(["a", "bc"], object),
    "BOOL": np.array([True, False]),
    **{name: np.array([0, 100], dtype) for name, dtype in DTYPES.items() if "INT" in name},
    **{name: np.array([0.5, -2.0], dtype) for name, dtype in DTYPES.items() if "FP" in name},
}
"""Name of an input, and of the output of the same shape → elements; each is named by its datatype, but for `text`."""


class Everything:
    """A Predictor's facts. All inputs but `text`, a column, are [n, 2]."""

    task = "predict"
    labels: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = {}
    inputs = tuple(
        Tensor("text", "BYTES", (-1,), column=True) if name == "text" else Tensor(name, name, (-1, 2))
        for name in EVERYTHING
    )
    outputs = inputs
    platform = "test"
    version = "v7"
    versions: tuple[str, ...] = ()


def bodies() -> Iterator[tuple[bytes, int | None]]:
    """Sound ones for REST, and what their header says of them: one input after the other in JSON, then all as bytes."""
    inputs, tails = [], []
    for name, found in EVERYTHING.items():
        given = declared(name)
        yield json.dumps({"id": "1", "inputs": [given | {"data": found.tolist()}]}).encode(), None
        tails.append(raw(found))
        inputs.append(given | {"parameters": {"binary_data_size": len(tails[-1])}})
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    yield head + b"".join(tails), len(head)


def requests() -> Iterator[bytes]:
    """Sound ones for gRPC: one input after the other as a typed list, then all as raw bytes."""
    inputs, raws = [], []
    for name, found in EVERYTHING.items():
        given = declared(name)
        contents = kserve_grpc.CONTENTS.get(given["datatype"])
        if contents is not None:
            listed = [it.encode() if isinstance(it, str) else it for it in found.tolist()]
            yield messages.ModelInferRequest(inputs=[given | {"contents": {contents: listed}}]).SerializeToString()
        inputs.append(given)
        raws.append(raw(found))
    yield messages.ModelInferRequest(inputs=inputs, raw_input_contents=raws).SerializeToString()


def declared(name: str) -> dict[str, Any]:
    """An input's head, as both wires have it."""
    text = name == "text"
    return {"name": name, "datatype": "BYTES" if text else name, "shape": [2] if text else [1, 2]}


def raw(found: Any) -> bytes:
    return joined(found) if found.dtype == object else found.tobytes()
