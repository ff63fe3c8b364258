"""Whatever arrives at the Open Inference Protocol's decoders is either understood or refused, and nothing else.

    pip install -e .[fuzz] && python -m tests.fuzz.decoders FOLDER -runs=1000000

Coverage-guided (atheris, libFuzzer's options); FOLDER keeps what it found interesting, and begins with sound requests.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gateway.edge.coding", "gateway.edge.inference", "runtimes.dialect"]):
    from gateway.edge.coding import compressed, decompressed
    from gateway.edge.inference import heard
    from runtimes.dialect import generation, kserve, kserve_grpc, kserve_rest, messages
    from runtimes.dialect.elements import Message, joined

import numpy as np

from gateway.errors import GatewayError
from runtimes.contract import InferReply, Invalid
from tests.tensors import EVERYTHING, Everything, bodies, requests

BYTES_MAX = 1 << 16


def rest(data: bytes) -> None:
    """Two bytes of what the header claims, then the body."""
    claimed = int.from_bytes(data[:2], "little")
    infer(kserve_rest.read(data[2:], claimed if claimed < 0xFFFF else None))


def grpc(data: bytes) -> None:
    infer(kserve_grpc.read(data).message)


def infer(message: Message) -> None:
    predictor = Everything()
    asked = kserve.Tensors(message, lambda outputs, model, version: b"").parse(
        b"", predictor=predictor, deadline_s=0, flow=""
    )
    for name, found in asked.request.inputs.items():
        assert found.dtype == EVERYTHING[name].dtype, name
        assert found.ndim == 2 or name == "text", name
    reply = InferReply({name: np.array([found]) for name, found in EVERYTHING.items()}, 0)
    asked.answer(reply, model="m", predictor=predictor, id="", created_s=0)


def generate(data: bytes) -> None:
    generation.from_json(data).body("m", stream=True)


def generate_grpc(data: bytes) -> None:
    generation.from_message(kserve_grpc.read(data).message).body("m", stream=True)


def events(data: bytes) -> None:
    heard(data)


def coded(data: bytes) -> None:
    for coding in (b"gzip", b"deflate"):
        plain = asyncio.run(decompressed(data, coding, bytes_max=BYTES_MAX))
        assert len(plain) <= BYTES_MAX


def accepted(data: bytes) -> None:
    asyncio.run(compressed(b"x", data))


TARGETS: tuple[Callable[[bytes], None], ...] = (rest, grpc, generate, generate_grpc, events, accepted, coded)


def one(data: bytes) -> None:
    if data:
        with suppress(Invalid, GatewayError):
            TARGETS[data[0] % len(TARGETS)](data[1:])


def seeds(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found: list[tuple[Callable[[bytes], None], bytes]] = []
    for body, json_bytes in bodies():
        found.append((rest, (0xFFFF if json_bytes is None else json_bytes).to_bytes(2, "little") + body))
    found += [(grpc, body) for body in requests()]
    text = [{"name": "text_input", "datatype": "BYTES", "shape": [1]}]
    text += [{"name": "stream", "datatype": "BOOL", "shape": [1]}]
    raw = [joined(["hello"]), b"\1"]
    found += [
        (generate, b'{"text_input":"hello","parameters":{"max_tokens":"5","temperature":0.5},"stream":true}'),
        (generate_grpc, messages.ModelInferRequest(inputs=text, raw_input_contents=raw).SerializeToString()),
        (events, b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n: x\n\n'),
        (accepted, b"gzip;q=0.5, deflate"),
        (coded, zlib.compress(b"hello")),
    ]
    for number, (target, data) in enumerate(found):
        (folder / f"seed-{number}").write_bytes(bytes([TARGETS.index(target)]) + data)


if __name__ == "__main__":
    seeds(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
