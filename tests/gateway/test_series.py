"""Calls of many rows to a model that speaks tensors: in windows, told as they come."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.call import Call
from gateway.errors import BadRequest, DeadlineExceeded, Draining, EngineFailed
from gateway.meter import Answer
from runtimes.clock import SystemClock
from runtimes.contract import Expired, InferReply, InferRequest, Invalid, Overloaded, RuntimeFault, Unavailable
from runtimes.dialect.entries import WINDOW_ROWS
from runtimes.dialect.openai import TRANSLATIONS
from tests.fakes import FakeClient, FakePredictor, Stages, a_call, until

WIDTH = 384


class Embedder(FakePredictor):
    """Gives a row's number in every place; has a fault for the window of that number, and stands still after `lets`."""

    def __init__(self, faults: dict[int, RuntimeFault] | None = None, *, lets: int = 1000) -> None:
        super().__init__(task="embed", answer=InferReply({}, tokens_in=0))
        self.faults = faults or {}
        self.lets = lets
        self.asked = 0
        self.let = asyncio.Event()
        self.let.set()

    async def infer(self, request: InferRequest) -> InferReply:
        if self.asked == self.lets:
            self.let.clear()
        await self.let.wait()
        window, self.asked = self.asked, self.asked + 1
        if window in self.faults:
            raise self.faults[window]
        rows = len(request.inputs["text"])
        vectors = np.repeat(np.arange(rows, dtype=np.float32)[:, None] / 7, WIDTH, axis=1)
        return InferReply({"embedding": vectors}, 2 * rows, batch_rows_max=8 + window, queue_s=0.5, compute_s=0.25)


Run = Callable[..., Awaitable[tuple[Stages, FakeClient, Call, Any]]]


@pytest.fixture
async def stages_of(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Stages]]]:
    opened: list[Stages] = []

    async def open_stages(*runtimes: Embedder) -> Stages:
        stages = Stages(tmp_path / str(len(opened)), SystemClock(), {"chat": list(runtimes)})
        opened.append(await stages.__aenter__())
        return stages

    yield open_stages
    for stages in opened:
        await stages.__aexit__()


def embed(rows: int, **given: Any) -> Call:
    body = json.dumps({"model": "chat", "input": ["some text"] * rows}).encode()
    translation = TRANSLATIONS["/v1/embeddings"]
    return a_call(route="/v1/embeddings", translation=translation, tokens_out_max=0, body=body, **given)


LONG = 4 * WINDOW_ROWS
"""Rows whose answer is far longer than is kept."""


async def test_a_short_answer_is_whole_before_it_begins(stages_of: Any) -> None:
    stages, client = await stages_of(Embedder()), FakeClient()
    answer = await stages.pipeline.run(embed(3), client)
    assert (client.parts, answer.status, len(json.loads(answer.body)["data"])) == ([], 200, 3)
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.outcome) == (3, 6, "served")


async def test_a_long_answer_begins_before_it_is_whole(stages_of: Any) -> None:
    model, client = Embedder(), FakeClient()
    stages = await stages_of(model)
    call = embed(LONG)
    running = asyncio.create_task(stages.pipeline.run(call, client))
    await until(lambda: bool(client.parts))
    assert model.asked < 4
    answer: Answer = await running
    assert (client.status, client.events) == (200, False)
    whole = json.loads(client.got + answer.body)
    assert [item["index"] for item in whole["data"]] == list(range(LONG))
    assert whole["usage"]["prompt_tokens"] == 2 * LONG
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(client.got)  # its end waits for the record
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.status, record.outcome) == (LONG, 2 * LONG, 200, "served")
    assert (call.batch_rows_max, call.inner_queue_s, call.compute_s) == (11, 2.0, 1.0)
    assert stages.at_rest()


@pytest.mark.parametrize(
    ("fault", "error", "outcome", "failures", "windows"),
    [
        (Unavailable("it crashed"), EngineFailed, "failed", 1, 3),
        (Overloaded("it is full"), EngineFailed, "failed", 1, 3),
        (Expired("it took too long"), DeadlineExceeded, "failed", 0, 4),
        (Invalid("row 800 is too long", param="text"), BadRequest, "rejected", 0, 3),
    ],
    ids=lambda it: getattr(it, "__name__", None) or type(it).__name__,
)
async def test_what_goes_wrong_amid_an_answer_is_raised_and_billed_up_to_there(
    stages_of: Any, fault: RuntimeFault, error: type[Exception], outcome: str, failures: int, windows: int
) -> None:
    """The rows that a model was working on when the time was up are the client's, its tokens are not known."""
    client = FakeClient()
    stages, other = await stages_of(Embedder({3: fault})), Embedder()
    with pytest.raises(error):
        await stages.pipeline.run(embed(LONG), client)
    assert client.status == 200
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.outcome) == (windows * WINDOW_ROWS, 6 * WINDOW_ROWS, outcome)
    assert (record.status, bool(record.code)) == (200, True)
    assert stages.replicas["chat"][0].failures == failures
    assert other.asked == 0
    assert stages.at_rest()


async def test_before_the_first_byte_another_replica_begins_anew_and_the_rows_count_once(stages_of: Any) -> None:
    stages = await stages_of(Embedder({0: Unavailable("it crashed")}), Embedder())
    answer = await stages.pipeline.run(embed(2), FakeClient())
    assert answer.status == 200
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.replica) == (2, 4, "chat-1")


async def test_invalid_rows_found_before_the_first_byte_are_a_400_that_costs_nothing(stages_of: Any) -> None:
    body = json.dumps({"model": "chat", "query": "q", "documents": ["d"] * LONG}).encode()
    call = a_call(route="/v1/rerank", translation=TRANSLATIONS["/v1/rerank"], tokens_out_max=0, body=body)
    stages, client = await stages_of(Embedder({2: Invalid("too long", param="text")})), FakeClient()
    with pytest.raises(BadRequest) as refused:
        await stages.pipeline.run(call, client)
    assert (refused.value.status, refused.value.param) == (400, "documents")
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.status, client.status) == (0, 0, 400, 0)


async def test_a_client_that_does_not_read_is_not_written_to_and_the_model_rests(stages_of: Any) -> None:
    model, client = Embedder(), FakeClient()
    client.full = True
    stages = await stages_of(model)
    running = asyncio.create_task(stages.pipeline.run(embed(LONG), client))
    await until(lambda: bool(client.parts))
    for _ in range(100):
        await asyncio.sleep(0)
    written = len(client.parts)
    assert (written, model.asked < 4) == (1, True)
    client.full = False
    client.reads.set()
    answer = await running
    assert len(json.loads(client.got + answer.body)["data"]) == LONG


async def test_who_leaves_amid_it_pays_for_what_was_made(stages_of: Any) -> None:
    model, client = Embedder(), FakeClient()
    stages = await stages_of(model)
    running = asyncio.create_task(stages.pipeline.run(embed(LONG), client))
    await until(lambda: bool(client.parts))
    model.let.clear()
    windows = model.asked
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.outcome) == (
        windows * WINDOW_ROWS,
        2 * windows * WINDOW_ROWS,
        "cancelled",
    )
    assert not record.estimated
    assert stages.at_rest()


async def test_who_leaves_before_anything_is_made_pays_for_the_rows_that_a_model_was_given(stages_of: Any) -> None:
    stages = await stages_of(Embedder(lets=0))
    call = embed(3)
    running = asyncio.create_task(stages.pipeline.run(call, FakeClient()))
    await until(lambda: call.rows_begun > 0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.estimated) == (3, call.tokens_in_estimate, True)


async def test_a_call_whose_time_is_up_pays_for_the_rows_that_a_model_was_given(stages_of: Any) -> None:
    stages = await stages_of(Embedder({0: Expired("it took too long")}))
    call = embed(3)
    with pytest.raises(DeadlineExceeded):
        await stages.pipeline.run(call, FakeClient())
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.estimated) == (3, call.tokens_in_estimate, True)


async def test_a_call_whose_time_is_up_before_its_answer_begins_pays_for_all_its_windows(stages_of: Any) -> None:
    body = json.dumps({"model": "chat", "query": "q", "documents": ["d"] * LONG}).encode()
    call = a_call(route="/v1/rerank", translation=TRANSLATIONS["/v1/rerank"], tokens_out_max=0, body=body)
    stages = await stages_of(Embedder({2: Expired("it took too long")}))
    with pytest.raises(DeadlineExceeded):
        await stages.pipeline.run(call, FakeClient())
    (record,) = await stages.records()
    assert record.items > 2 * WINDOW_ROWS
    assert (record.tokens_in, record.estimated) == (2 * (record.items - WINDOW_ROWS), False)


@pytest.mark.parametrize("windows", [0, 2])
async def test_nobody_pays_for_rows_whose_answer_the_gateway_cut_off_because_it_stops(
    stages_of: Any, windows: int
) -> None:
    body = json.dumps({"model": "chat", "query": "q", "documents": ["d"] * LONG}).encode()
    call = a_call(route="/v1/rerank", translation=TRANSLATIONS["/v1/rerank"], tokens_out_max=0, body=body)
    model = Embedder(lets=windows)
    stages = await stages_of(model)
    running = asyncio.create_task(stages.pipeline.run(call, FakeClient()))
    await until(lambda: model.asked == windows and call.rows_begun > 0)
    stages.pipeline.stopped = True
    running.cancel()
    with pytest.raises(Draining):
        await running
    (record,) = await stages.records()
    assert (record.items, record.tokens_in, record.estimated) == (0, 0, False)
