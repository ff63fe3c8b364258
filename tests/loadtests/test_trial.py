"""Trials against servers on loopback: what is counted, and from when it is measured."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loadtests.arrivals import Closed, Constant, Poisson, Trace
from loadtests.emulator import Emulator, Pace, serving
from loadtests.report import Report
from loadtests.scenario import Cancels, Objective, Scenario, Tenant
from loadtests.target import Access, TargetFault, parse
from loadtests.trial import trial

WHOLE = b'{"usage":{"completion_tokens":1}}'
SERVED = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE)
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize("arrivals", [Closed(), Constant(rate_per_s=400), Poisson(rate_per_s=400)], ids=repr)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_every_call_and_token_is_counted(arrivals: Closed | Constant | Poisson, stream: bool) -> None:
    emulator = Emulator(Pace(tokens=5))
    async with serving(emulator, "127.0.0.1:0") as address:
        report = await run(address, arrivals=arrivals, stream=stream, calls_max=50, duration_s=60.0)
    assert report.outcomes == {"served": 50}
    assert (report.calls, report.tokens) == (emulator.calls, emulator.tokens) == (50, 250)
    # Role, five tokens and the usage: each an event; a first token and four gaps.
    assert report.chunks == (50 * 7 if stream else 0)
    assert (report.first_token and report.first_token.count) == (50 if stream else None)
    assert (report.gap and report.gap.count) == (200 if stream else None)


async def test_an_open_loop_sends_what_its_schedule_says_and_no_more() -> None:
    emulator = Emulator(Pace(tokens=1))
    async with serving(emulator, "127.0.0.1:0") as address:
        report = await run(address, arrivals=Constant(rate_per_s=100), duration_s=0.25)
    assert report.calls == emulator.calls == 25


async def test_the_warm_up_is_not_counted() -> None:
    emulator = Emulator(Pace(tokens=1))
    async with serving(emulator, "127.0.0.1:0") as address:
        report = await run(address, arrivals=Constant(rate_per_s=100), warmup_s=0.1, duration_s=0.1)
    assert (report.calls, emulator.calls) == (10, 20)


async def test_max_tokens_shortens_the_emulators_answer() -> None:
    emulator = Emulator(Pace(tokens=100))
    async with serving(emulator, "127.0.0.1:0") as address:
        report = await run(address, stream=True, tokens_max=3, calls_max=4, duration_s=60.0)
    assert report.tokens == emulator.tokens == 12


async def test_a_unix_socket_is_a_target(tmp_path: Path) -> None:
    emulator = Emulator(Pace(tokens=2))
    async with serving(emulator, f"unix:{tmp_path}/s") as address:
        report = await run(address, stream=True, calls_max=6, duration_s=60.0)
    assert report.outcomes == {"served": 6}


async def test_a_paced_stream_takes_as_long_as_its_tokens() -> None:
    async with serving(Emulator(Pace(first_token_s=0.05, token_s=0.01, tokens=6)), "127.0.0.1:0") as address:
        report = await run(address, stream=True, calls_max=2, duration_s=60.0)
    assert report.first_token is not None and report.total is not None
    # A timer may fire early by the millisecond that a loop counts in.
    assert report.first_token.p50_s >= 0.049
    assert report.total.p50_s >= 0.099


async def test_a_stall_is_part_of_the_latency_of_every_call_that_was_due_meanwhile() -> None:
    """One connection, 20 calls due within 0.2 s, the server silent until 0.4 s and quick ever after. Counted from when
    each was sent, all but the first would look quick."""
    awake = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await a_request(reader):
            await awake.wait()
            writer.write(SERVED)

    async with server(answer) as address:
        asyncio.get_running_loop().call_later(0.4, awake.set)
        report = await run(address, arrivals=Constant(rate_per_s=100), duration_s=0.2, connections=1)
    assert report.outcomes == {"served": 20}
    assert report.total is not None and report.late is not None
    assert report.total.p50_s >= 0.4 - 0.1 - 0.02
    assert report.late.p50_s >= 0.4 - 0.1 - 0.02


async def test_calls_that_no_connection_got_free_for_are_counted_as_unsent() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with server(answer) as address:
        report = await run(address, arrivals=Constant(rate_per_s=100), duration_s=0.1, connections=1, call_s_max=0.1)
    assert report.outcomes == {"timeout": 1, "unsent": 9}
    assert report.total is None


@pytest.mark.parametrize(
    ("sent", "outcome"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}", "429"),
        (SERVED[:-3], "closed"),
        (b"", "closed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", "garbage"),
        (b"nonsense\r\n\r\n", "garbage"),
        (STREAM + b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHUNK), CHUNK), "cut"),
        (STREAM + b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK), "closed"),
        (STREAM + b'15\r\ndata: {"error": {}}\n\n\r\n0\r\n\r\n', "error-event"),
    ],
)
async def test_an_answer_that_is_not_whole_is_not_served(sent: bytes, outcome: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await a_request(reader)
        writer.write(sent)

    async with server(answer) as address:
        report = await run(address, stream=sent.startswith(STREAM), calls_max=1, connections=1)
    assert report.outcomes == {outcome: 1}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CR LF"])
async def test_events_are_whole_however_they_are_cut(end: bytes) -> None:
    events = (CHUNK * 3 + b": a comment\n\n" + CHUNK + b"data: [DONE]\n\n").replace(b"\n", end)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await a_request(reader)
        writer.write(STREAM)
        for number in range(len(events)):
            writer.write(b"1\r\n%b\r\n" % events[number : number + 1])
        writer.write(b"0\r\n\r\n")

    async with server(answer) as address:
        report = await run(address, stream=True, calls_max=1, connections=1)
    assert (report.outcomes, report.chunks, report.tokens) == ({"served": 1}, 4, 4)


async def test_callers_leave_before_the_first_byte_and_amid_the_stream() -> None:
    """The server must see each of them go; the calls of those who stay are served all the same."""
    emulator = Emulator(Pace(first_token_s=0.05, token_s=0.001, tokens=20))
    cancels = Cancels(share=0.5, early=0.5, wait_s_max=0.04, chunks_max=10)
    async with serving(emulator, "127.0.0.1:0") as address:
        report = await run(address, stream=True, calls_max=60, duration_s=60.0, cancels=cancels)
    assert set(report.outcomes) == {"served", "cancelled"}
    assert report.outcomes["cancelled"] >= 10
    assert report.calls == 60
    # Those who left amid the stream had something of it.
    assert report.chunks > report.served * 22
    assert report.total is not None and report.total.count == report.served


async def test_tenants_are_told_apart() -> None:
    tenants = (Tenant("loud", weight=3), Tenant("quiet"))
    async with serving(Emulator(Pace(tokens=2)), "127.0.0.1:0") as address:
        report = await run(address, tenants=tenants, calls_max=100, duration_s=60.0)
    assert sum(it.calls for it in report.tenants.values()) == report.calls == 100
    assert report.tenants["loud"].served > report.tenants["quiet"].served > 0
    assert sum(sum(it.served_in) for it in report.tenants.values()) == 100
    assert sum(report.tokens_in) == report.tokens == 200


async def test_goodput_counts_only_calls_within_the_objective() -> None:
    pace = Pace(first_token_s=0.05, token_s=0.002, tokens=5)
    async with serving(Emulator(pace), "127.0.0.1:0") as address:
        kept, missed, none = [
            (await run(address, stream=True, calls_max=4, duration_s=60.0, slo=slo)).good_per_s
            for slo in (Objective(first_token_s_max=30), Objective(first_token_s_max=0.01), None)
        ]
    assert kept is not None and kept > 0
    assert (missed, none) == (0.0, None)


async def test_a_trace_asks_for_as_many_tokens_as_it_says(tmp_path: Path) -> None:
    line = '{"timestamp": %d, "input_length": 900, "output_length": %d, "hash_ids": [1, 2]}'
    (tmp_path / "t.jsonl").write_text("\n".join(line % pair for pair in ((0, 3), (20, 4), (40, 5))))
    emulator = Emulator(Pace(tokens=100))
    async with serving(emulator, "127.0.0.1:0") as address:
        report = await run(address, stream=True, arrivals=Trace(path=str(tmp_path / "t.jsonl")))
    assert (report.outcomes, report.tokens) == ({"served": 3}, 12)


async def test_the_cost_of_a_process_is_reported_when_it_is_named() -> None:
    async with serving(Emulator(Pace(tokens=2)), "127.0.0.1:0") as address:
        scenario = Scenario(about="", model="m", stream=True, calls_max=20, warmup_s=0)
        report = await trial(scenario, name="test", target=parse(address), access=Access(), pid=os.getpid())
    assert report.cost is not None and report.cost.cpu_us_per_chunk is not None
    assert report.cost.cpu_us_per_call == pytest.approx(report.cost.cpu_us_per_chunk * report.chunks / report.calls)
    assert report.cost.rss_bytes_max > 0


async def test_a_target_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetFault, match="cannot connect, is it running"):
        await run(f"unix:{tmp_path}/nobody")


async def run(address: str, **fields: object) -> Report:
    scenario = Scenario(**{"about": "", "model": "m", "connections": 4, "warmup_s": 0.0, **fields})  # type: ignore[arg-type]
    return await trial(
        scenario, name="test", target=parse(address), access=Access(keys=scenario.keys("hr_test")), pid=None
    )


async def a_request(reader: asyncio.StreamReader) -> bool:
    """Read one; False if the client has closed instead."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return False
    assert b"authorization: Bearer hr_test\r\n" in head
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    await reader.readexactly(int(length.partition(b": ")[2]))
    return True


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """Answers each connection as told, then closes it."""
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await answer(reader, writer)
        finally:
            writer.close()
            tasks.discard(task)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        await asyncio.gather(*tasks)
        await listening.wait_closed()
