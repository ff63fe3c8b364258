"""What every runtime keeps, whatever it runs: see runtimes/contract.py."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from runtimes.artifact import Shelf
from runtimes.contract import (
    Exchange,
    Expired,
    Generator,
    InferReply,
    InferRequest,
    Invalid,
    Predictor,
    Runtime,
    RuntimeFault,
    Site,
    Unavailable,
)
from runtimes.echo import Echo
from runtimes.onnx import Onnx
from runtimes.remote import Remote
from runtimes.triton import Triton
from runtimes.vllm import Vllm
from tests import tiny, triton
from tests.e2e.engine import MODEL, socket
from tests.fakes import FakeClock, until, work
from tests.loopback import serving

IDLE = (0, 0)
NEVER_S, LONG_AGO_S = math.inf, 0.0
SECRET = "xyzzy"

VLLM = pytest.param("vllm", marks=pytest.mark.engine)
TRITON = pytest.param("triton", marks=pytest.mark.engine)
RUNTIMES = ["echo", "remote", "onnx", TRITON, VLLM]
GENERATORS = ["echo", "remote", VLLM]
PREDICTORS = ["onnx", TRITON]
PACED = ["echo", "remote"]


class Stage(NamedTuple):
    """A runtime that is not open yet, and what paces it."""

    runtime: Any
    source: Generator | None
    """The echo behind or in it."""
    clock: FakeClock


@pytest.fixture
def engine(kind: str, request: pytest.FixtureRequest) -> str:
    """Where the session's real engine of this kind answers; nowhere for the others."""
    match kind:
        case "vllm":
            return f"unix:{socket(request.getfixturevalue('engine_gateway'))}"
        case "triton":
            return triton.socket(request.getfixturevalue("triton_gateway"))
        case _:
            return ""


@asynccontextmanager
async def staged(kind: str, folder: Path, pace: Echo | None = None, engine: str = "") -> AsyncIterator[Stage]:
    """Only what answers runs on the fake clock: what relays runs on the machine's own."""
    clock = FakeClock()
    shelf = Shelf(folder / "shelf")
    site = Site(model=MODEL, replica="chat-0", state=folder, shelf=shelf)
    echo = (pace or Echo()).build(site, clock=clock)
    match kind:
        case "echo":
            yield Stage(echo, echo, clock)
        case "remote":
            await echo.open()
            async with serving(echo) as url:
                yield Stage(Remote(url=url).build(site), echo, clock)
        case "onnx":
            (folder / "folder").mkdir()
            tiny.publish(shelf, folder / "folder")
            yield Stage(Onnx(artifact="tiny").build(site), None, clock)
        case "triton":
            yield Stage(Triton(url=engine, model="model").build(site), None, clock)
        case "vllm":
            yield Stage(Vllm(url=engine).build(site), None, clock)


@asynccontextmanager
async def opened(kind: str, folder: Path, pace: Echo | None = None, engine: str = "") -> AsyncIterator[Stage]:
    async with staged(kind, folder, pace, engine) as stage:
        await stage.runtime.open()
        try:
            yield stage
        finally:
            await stage.runtime.aclose()


@pytest.fixture
async def generator(kind: str, engine: str, tmp_path: Path) -> AsyncIterator[Generator]:
    """One of each kind, open."""
    async with opened(kind, tmp_path, engine=engine) as stage:
        yield stage.runtime


def chat(text: str, *, deadline_s: float = NEVER_S, **options: Any) -> Exchange:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **options}
    return Exchange(path="/v1/chat/completions", body=json.dumps(body).encode(), deadline_s=deadline_s)


def texts(*rows: str, deadline_s: float = NEVER_S) -> InferRequest:
    return InferRequest({"text": np.array(rows, object)}, deadline_s)


async def asked(runtime: Runtime, text: str = "hello there", deadline_s: float = NEVER_S) -> None:
    """One small call, whatever kind of runtime this is."""
    if isinstance(runtime, Predictor):
        await runtime.infer(texts(text, deadline_s=deadline_s))
    else:
        assert isinstance(runtime, Generator)
        await read(runtime, chat(text, max_tokens=4, deadline_s=deadline_s))


async def read(runtime: Generator, request: Exchange) -> tuple[int, bytes]:
    async with runtime.exchange(request) as reply:
        return reply.status, b"".join([frame async for frame in reply.frames])


def events(stream: bytes) -> list[Any]:
    """What an SSE body says, read strictly: `data: ` and JSON and an empty line, and at last `[DONE]`."""
    assert stream.endswith(b"\n\n")
    lines = stream.removesuffix(b"\n\n").split(b"\n\n")
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("kind", RUNTIMES)
async def test_a_runtime_answers_between_open_and_close_and_at_no_other_time(
    kind: str, engine: str, tmp_path: Path
) -> None:
    async with staged(kind, tmp_path, engine=engine) as stage:
        runtime = stage.runtime
        assert isinstance(runtime, Runtime)
        with pytest.raises(Unavailable):
            await runtime.ready()
        with pytest.raises(Unavailable):
            await asked(runtime)
        await runtime.open()
        await runtime.ready()
        await asked(runtime)
        assert work(runtime) == IDLE
        await runtime.aclose()
        await runtime.aclose()
        with pytest.raises(Unavailable):
            await runtime.ready()
        with pytest.raises(Unavailable):
            await asked(runtime)


@pytest.mark.parametrize("kind", RUNTIMES)
async def test_no_error_carries_the_payload(kind: str, engine: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, engine=engine) as stage:
        with pytest.raises(RuntimeFault) as late:
            await asked(stage.runtime, SECRET, deadline_s=LONG_AGO_S)
        await stage.runtime.aclose()
        with pytest.raises(RuntimeFault) as closed:
            await asked(stage.runtime, SECRET)
    for error in (late.value, closed.value):
        assert not any(SECRET in str(it) or SECRET in repr(it) for it in (error, error.__cause__, error.__context__))


@pytest.mark.parametrize("kind", RUNTIMES)
async def test_a_runtime_that_never_opened_can_be_closed(kind: str, engine: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path, engine=engine) as stage:
        await stage.runtime.aclose()


@pytest.mark.parametrize("kind", GENERATORS)
async def test_a_stream_is_exactly_events_and_done(generator: Generator) -> None:
    options = {"stream": True, "max_tokens": 3, "stream_options": {"include_usage": True}}
    status, body = await read(generator, chat("one two three", **options))
    got = events(body)
    assert status == 200
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == 3
    assert {chunk["object"] for chunk in got} == {"chat.completion.chunk"}


async def test_a_relayed_stream_is_the_one_that_was_sent(tmp_path: Path) -> None:
    async with opened("remote", tmp_path) as stage:
        assert stage.source
        _, sent = await read(stage.source, chat("zwölf Bäume ☃", stream=True))
        _, got = await read(stage.runtime, chat("zwölf Bäume ☃", stream=True))
    serial = re.compile(rb'"id":"[^"]*"')
    assert serial.sub(b"", got) == serial.sub(b"", sent)


@pytest.mark.parametrize("kind", GENERATORS)
async def test_an_http_error_is_a_reply(generator: Generator) -> None:
    request = Exchange(path="/v1/chat/completions", body=b'{"model":"%b"}' % MODEL.encode(), deadline_s=NEVER_S)
    status, body = await read(generator, request)
    assert work(generator) == IDLE
    assert status == 400
    assert "message" in json.loads(body)["error"]


@pytest.mark.parametrize("kind", GENERATORS)
async def test_headers_say_what_kind_of_body_it_is_and_nothing_of_its_framing(generator: Generator) -> None:
    async with generator.exchange(chat("hi", stream=True, max_tokens=2)) as reply:
        headers = dict(reply.headers)
        assert [frame async for frame in reply.frames]
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert not headers.keys() & {b"transfer-encoding", b"content-length", b"connection", b"keep-alive"}


@pytest.mark.parametrize("kind", GENERATORS)
async def test_leaving_early_frees_the_place_at_once(generator: Generator) -> None:
    async with generator.exchange(chat("and so on " * 100, stream=True, max_tokens=200)) as reply:
        await anext(reply.frames)
        assert work(generator) == (1, 0)
    assert work(generator) == IDLE


@pytest.mark.parametrize("kind", GENERATORS)
async def test_a_late_call_to_a_generator_expires_and_holds_nothing(generator: Generator) -> None:
    with pytest.raises(Expired):
        await asked(generator, deadline_s=LONG_AGO_S)
    assert work(generator) == IDLE


@pytest.mark.parametrize("kind", PACED)
async def test_entering_waits_for_the_first_byte(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, Echo(first_token_s=5)) as stage:
        call = asyncio.create_task(read(stage.runtime, chat("hi", stream=True)))
        await stage.clock.until_asleep()
        assert not call.done()
        assert work(stage.runtime) == (1, 0)
        stage.clock.advance(5)
        status, _ = await call
    assert status == 200


@pytest.mark.parametrize("kind", PACED)
async def test_leaving_before_the_first_byte_ends_the_call_where_it_runs(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, Echo(first_token_s=5)) as stage:
        assert stage.source
        call = asyncio.create_task(read(stage.runtime, chat("hi")))
        await stage.clock.until_asleep()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert work(stage.runtime) == IDLE
        source = stage.source
        await until(lambda: work(source) == IDLE)


@pytest.mark.parametrize("kind", PACED)
async def test_leaving_amid_a_stream_ends_the_call_where_it_runs(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path, Echo(token_s=5)) as stage:
        assert stage.source
        async with stage.runtime.exchange(chat("one two", stream=True)) as reply:
            await anext(reply.frames)
            assert work(stage.source) == (1, 0)
        source = stage.source
        await until(lambda: work(source) == IDLE)


@pytest.mark.parametrize("kind", PACED)
async def test_frames_arrive_as_they_are_made(kind: str, tmp_path: Path) -> None:
    async with (
        opened(kind, tmp_path, Echo(token_s=5)) as stage,
        stage.runtime.exchange(chat("one two", stream=True)) as reply,
    ):
        early = b""
        while b"one" not in early:
            early += await anext(reply.frames)
        rest = asyncio.ensure_future(anext(reply.frames))
        await stage.clock.until_asleep()
        assert not rest.done()
        stage.clock.advance(5)
        late = await rest
    assert b"two" not in early
    assert b"two" in late


@pytest.mark.parametrize("kind", GENERATORS)
async def test_calls_at_the_same_time_get_their_own_answers(kind: str, generator: Generator) -> None:
    prompts = [f"Say {word}" for word in ("one", "two", "three", "four", "five", "six")]
    answers = await asyncio.gather(*(read(generator, chat(it, max_tokens=8)) for it in prompts))
    assert work(generator) == IDLE
    together = [json.loads(body) for _, body in answers]
    assert len({answer["id"] for answer in together}) == len(prompts)
    if kind in PACED:
        assert [it["choices"][0]["message"]["content"] for it in together] == prompts


@pytest.fixture
async def predictor(kind: str, engine: str, tmp_path: Path) -> AsyncIterator[Predictor]:
    """One of each kind, open."""
    async with opened(kind, tmp_path, engine=engine) as stage:
        yield stage.runtime


@pytest.mark.parametrize("kind", PREDICTORS)
async def test_a_batch_answers_as_its_rows_do_and_in_their_order(predictor: Predictor) -> None:
    rows = ["my card " * 20, "login", "money", "my password please", "the " * 30]
    together = await predictor.infer(texts(*rows))
    alone = [await predictor.infer(texts(row)) for row in rows]
    for name, array in together.outputs.items():
        if array.dtype == object:
            assert array.tolist() == [label for it in alone for label in it.outputs[name]]
            continue
        np.testing.assert_allclose(array, np.concatenate([it.outputs[name] for it in alone]), atol=1e-5)
    assert together.tokens_in == sum(it.tokens_in for it in alone)


@pytest.mark.parametrize("kind", PREDICTORS)
async def test_a_predictor_says_what_it_answers(predictor: Predictor) -> None:
    reply = await predictor.infer(texts("my card"))
    assert predictor.task == "classify"
    assert reply.outputs["scores"].shape == (1, len(predictor.labels))
    assert reply.outputs["scores"].dtype == np.float32


@pytest.mark.parametrize(
    "inputs",
    [
        {"text": np.array([1, 2])},
        {"text": np.array([[SECRET]], object)},
        {"text": np.array([SECRET, 5], object)},
        {"input_ids": np.ones((1, 2)), "attention_mask": np.ones((1, 2), np.int64)},
        {"pixels": np.ones((1, 2))},
    ],
    ids=["type", "shape", "mixed", "floats", "name"],
)
@pytest.mark.parametrize("kind", PREDICTORS)
async def test_what_does_not_fit_is_invalid_names_the_input_and_quotes_nothing(
    predictor: Predictor, inputs: dict[str, Any]
) -> None:
    with pytest.raises(Invalid) as refused:
        await predictor.infer(InferRequest(inputs, NEVER_S))
    assert next(iter(inputs)) in str(refused.value)
    assert SECRET not in str(refused.value)
    assert work(predictor) == IDLE


@pytest.mark.parametrize("kind", PREDICTORS)
async def test_calls_to_a_predictor_at_the_same_time_get_their_own_answers(predictor: Predictor) -> None:
    words = ["refund", "card", "login"] * 5
    replies: list[InferReply] = await asyncio.gather(*(predictor.infer(texts(word)) for word in words))
    assert [predictor.labels[int(reply.outputs["scores"].argmax())] for reply in replies] == words
    assert work(predictor) == IDLE


@pytest.mark.parametrize("kind", PREDICTORS)
async def test_a_late_call_to_a_predictor_expires_and_holds_nothing(predictor: Predictor) -> None:
    with pytest.raises(Expired):
        await asked(predictor, deadline_s=LONG_AGO_S)
    assert work(predictor) == IDLE


@pytest.mark.parametrize("kind", PREDICTORS)
async def test_a_cancelled_call_to_a_predictor_frees_its_place(predictor: Predictor) -> None:
    calls = [asyncio.create_task(predictor.infer(texts("card"))) for _ in range(3)]
    await until(lambda: sum(work(predictor)) == 3)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert work(predictor) == IDLE
