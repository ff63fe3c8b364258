"""Whatever arrives at the Open Inference Protocol's decoders, or at HTTP/2, is either understood or refused, no more.

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

with atheris.instrument_imports(
    include=[
        "gateway.edge.coding",
        "gateway.edge.inference",
        "runtimes.dialect",
        "runtimes.http2",
        "runtimes.rpc",
        "runtimes.wav",
    ]
):
    from gateway.edge.coding import compressed, decompressed
    from gateway.edge.inference import heard
    from runtimes import wav
    from runtimes.dialect import generation, kserve, kserve_grpc, kserve_rest, messages
    from runtimes.dialect.elements import Message, joined
    from runtimes.http2.frames import END_STREAM, HEADERS, PING, SETTINGS, frame, settings, window_update
    from runtimes.rpc.messages import Messages, TooLong, framed
    from tests.http2 import RESPONSE, Side, header
    from tests.http2 import data as data_frame

import numpy as np

from gateway.errors import GatewayError
from runtimes.contract import InferReply, Invalid
from tests.sounds import pcm
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


def served(data: bytes) -> None:
    """As a server hears it; the first byte says how it is cut."""
    hear(Side(streams_max=3), data)


def answered(data: bytes) -> None:
    """As a client does."""
    hear(Side(client=True), data)


def hear(side: Side, data: bytes) -> None:
    step = 1 + data[0] if data else 1
    for at in range(1, len(data), step):
        side.hear(data[at : at + step])
        http2 = side.connection
        assert len(http2.streams) <= 3
        assert not (http2.fault and http2.streams)
        for stream in tuple(http2.streams.values()):
            assert not (stream.ended_here and stream.ended_there and not stream.unsent)
            if stream.ended_there:
                stream.send_data(bytes(70_000))
                stream.send_fields(b"", end=True)
    for heard in side.heard.values():
        assert heard.broken is None or heard.id not in side.connection.streams


def cut(data: bytes) -> None:
    messages, whole = Messages(bytes_max=BYTES_MAX), Messages(bytes_max=BYTES_MAX)
    with suppress(TooLong):
        found = [bytes(it.body) for it in whole.feed(data)]
        assert [bytes(it.body) for byte in data for it in messages.feed(bytes((byte,)))] == found


def sound(data: bytes) -> None:
    with suppress(ValueError):
        found = wav.read(data, rate_hz=8000, samples_max=1 << 12)
        assert 1 <= len(found) <= 1 << 12
        assert np.isfinite(found).all()


TARGETS: tuple[Callable[[bytes], None], ...] = (
    rest,
    grpc,
    generate,
    generate_grpc,
    events,
    accepted,
    coded,
    served,
    answered,
    cut,
    sound,
)


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
        (generate, b'{"text_input":["hello"],"sampling_parameters":"{\\"max_tokens\\":5,\\"stop_words\\":\\"\\"}"}'),
        (generate_grpc, messages.ModelInferRequest(inputs=text, raw_input_contents=raw).SerializeToString()),
        (events, b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n: x\n\n'),
        (accepted, b"gzip;q=0.5, deflate"),
        (coded, zlib.compress(b"hello")),
        (served, b"\xff" + header(1) + data_frame(1, framed(b"hello"), end=True) + window_update(1, 70_000)),
        (served, b"\x07" + header(1, flags=0) + frame(9, 4, 1) + frame(3, 0, 1, bytes(4)) + settings({4: 1})),
        (answered, b"\xff" + header(1, RESPONSE) + data_frame(1, framed(b"hi")) + frame(HEADERS, 4 | END_STREAM, 1)),
        (answered, b"\xff" + frame(PING, 0, 0, bytes(8)) + frame(SETTINGS, 1, 0) + frame(7, 0, 0, bytes(8))),
        (cut, framed(b"hello") + framed(b"") + framed(b"x" * 300)),
        *((sound, pcm([0, 1, 2, 3], bits=bits, channels=2)) for bits in (8, 16, 24, 32)),
    ]
    for number, (target, data) in enumerate(found):
        (folder / f"seed-{number}").write_bytes(bytes([TARGETS.index(target)]) + data)


if __name__ == "__main__":
    seeds(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
