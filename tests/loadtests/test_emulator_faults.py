"""Each of the emulator's faults, as the bytes that a client gets."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loadtests.emulator import (
    Emulator,
    Ended,
    Entry,
    Fault,
    FaultError,
    Faults,
    Kind,
    Log,
    Pace,
    rates,
    serving,
    strike,
)
from loadtests.emulator.fault import When, parse
from tests.loadtests.wire import Seen, connect, exchange, request

ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
#: More than any answer here has, and more header than anyone should read.
BYTES_MAX = 250_000
CLOSINGS = (b"data: [DONE]\n\n", b'"type":"response.completed"')


def texts(seen: Seen) -> int:
    """How many tokens' text came."""
    return seen.data.count(b'" water"') if b"text/event-stream" in seen.data else seen.data.count(b" water")


def closed_well(seen: Seen) -> bool:
    """A stream with its closing event, or a body that is whole."""
    if b"transfer-encoding: chunked" in seen.data:
        return seen.data.endswith(b"0\r\n\r\n") and any(closing in seen.body for closing in CLOSINGS)
    head, _, body = seen.data.partition(b"\r\n\r\n")
    return b"content-length: %d" % len(body) in head and body.endswith(b"}")


def page(seen: Seen) -> bool:
    return seen.end == "open" and b"<html>" in seen.body and not any(closing in seen.body for closing in CLOSINGS)


def other(text: bytes) -> Callable[[Seen, bool], bool]:
    """All is well but for one token's text."""
    return lambda seen, stream: seen.end == "open" and closed_well(seen) and text in seen.body


#: Of an answer of four tokens; faults amid it after two.
SHOWS: dict[str, Callable[[Seen, bool], bool]] = {
    "close": lambda seen, stream: seen == Seen(b"", "closed"),
    "reset": lambda seen, stream: seen == Seen(b"", "reset"),
    "hang": lambda seen, stream: seen == Seen(b"", "open"),
    "status": lambda seen, stream: seen.end == "open" and seen.status == 500 and b'"error"' in seen.body,
    "status@503": lambda seen, stream: seen.end == "open" and seen.status == 503,
    "not-http": lambda seen, stream: seen.end == "closed" and not seen.data.startswith(b"HTTP/"),
    "slow-head": lambda seen, stream: seen.end == "open" and closed_well(seen),
    "endless-head": lambda seen, stream: seen.end == "open" and b"\r\n\r\n" not in seen.data,
    "cut-head": lambda seen, stream: seen.end == "closed" and seen.status == 200 and b"\r\n\r\n" not in seen.data,
    "long-length": lambda seen, stream: seen.end == "closed" and said_length(seen) == len(seen.body) + 100,
    "open-end": lambda seen, stream: seen.end == "open" and said_length(seen) == len(seen.body) + 100,
    "not-streamed": lambda seen, stream: closed_well(seen) and b"content-length: " in seen.data,
    "surplus": lambda seen, stream: seen.end == "open" and seen.data.count(b"HTTP/1.1 200 OK") == 2,
    "rst@0": lambda seen, stream: seen.end == "reset" and texts(seen) == 0 and seen.status == 200,
    "rst@2": lambda seen, stream: seen.end == "reset" and texts(seen) == 2,
    "fin@2": lambda seen, stream: seen.end == "closed" and texts(seen) == 2 and not seen.data.endswith(b"0\r\n\r\n"),
    "undone@2": lambda seen, stream: seen.end == "open" and texts(seen) == 2 and not closed_well(seen),
    "stall@2": lambda seen, stream: seen.end == "open" and texts(seen) == 2 and not seen.data.endswith(b"0\r\n\r\n"),
    "second-head@2": lambda seen, stream: seen.end == "closed" and texts(seen) == 2 and b"HTTP/1.1 500" in seen.data,
    "not-sse@2": lambda seen, stream: page(seen) and texts(seen) == (2 if stream else 0),
    "not-json@2": lambda seen, stream: b"[nothing]" in seen.body and (not stream or closed_well(seen)),
    "not-utf8@2": other(b"\xe2\x82"),
    "error-event@2": lambda seen, stream: (
        seen.status == 200 and b"EngineCore" in seen.body and texts(seen) == 2 * stream
    ),
    "huge-event@2": other(b"x" * 1000),
}


def said_length(seen: Seen) -> int:
    return int(seen.data.partition(b"content-length: ")[2].partition(b"\r\n")[0])


@pytest.fixture(autouse=True)
def quick_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strike, "SLOW_S", 0.001)
    monkeypatch.setattr(strike, "ENDLESS_S", 0.001)
    monkeypatch.setattr(strike, "HUGE_EVENT_BYTES", 200_000)
    monkeypatch.setattr(strike, "HUGE_BODY_BYTES", 200_000)


def test_every_fault_is_shown() -> None:
    assert {parse(text).kind for text in SHOWS} == set(Kind)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("fault", SHOWS)
async def test_a_fault_is_what_its_name_says(fault: str, stream: bool, route: str) -> None:
    emulator = Emulator(Pace(tokens=4))
    async with serving(emulator, "127.0.0.1:0") as address:
        seen = await exchange(address, request(route, stream=stream, emulate={"fault": fault}), bytes_max=BYTES_MAX)
        assert SHOWS[fault](seen, stream), seen
        assert (await exchange(address, b"GET /health HTTP/1.1\r\n\r\n")).status == 200
    assert emulator.faulted == {parse(fault).kind: 1}
    assert (emulator.finished, emulator.aborted, emulator.running) == (0, 0, 0)


@pytest.mark.parametrize("fault", [text for text in SHOWS if text not in ("slow-head", "endless-head")])
async def test_a_fault_strikes_paced_answers_alike(fault: str) -> None:
    async with serving(Emulator(Pace(first_token_s=0.01, token_s=0.01, tokens=4)), "127.0.0.1:0") as address:
        seen = await exchange(address, request(stream=True, emulate={"fault": fault}))
    assert SHOWS[fault](seen, True), seen


async def test_a_connection_serves_the_next_call_after_a_fault_that_leaves_it_whole(tmp_path: Path) -> None:
    async with serving(Emulator(Pace(tokens=4)), f"unix:{tmp_path}/s") as address:
        reader, writer = await connect(address)
        for fault in ("status", "undone", "not-sse", "error-event", "not-json"):
            writer.write(request(stream=True, emulate={"fault": fault}))
            await reader.readuntil(b"}}" if fault == "status" else b"0\r\n\r\n")
        writer.write(request(stream=False))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        writer.close()


async def test_the_same_seed_gives_the_same_calls_the_same_faults() -> None:
    async def met(seed: int) -> list[str]:
        faults = Faults(rates(("status@503=0.3", "close=0.2")), seed=seed)
        async with serving(Emulator(Pace(), faults=faults), "127.0.0.1:0") as address:
            seen = [await exchange(address, request(), until=b"}") for _ in range(40)]
        return [each.data[9:12].decode() or each.end for each in seen]

    first, again, other_seed = await met(7), await met(7), await met(8)
    assert first == again != other_seed
    assert set(first) == {"200", "503", "closed"}


def test_a_fault_without_a_place_strikes_anywhere_before_the_last_token() -> None:
    faults = Faults({})
    assert {faults.place(Fault(Kind.rst), 4) for _ in range(200)} == {0, 1, 2, 3}
    assert faults.place(Fault(Kind.rst, 9), 4) == 3
    assert [faults.place(Fault(kind), 4) for kind in (Kind.hang, Kind.surplus)] == [-1, 4]


def test_a_fault_reads_as_it_is_written() -> None:
    assert [str(parse(text)) for text in ("rst", "rst@3", "status@503")] == ["rst", "rst@3", "status@503"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smoke=0.1", "there is no fault 'smoke'"),
        ("hang@3=0.1", "takes no number"),
        ("status@200=0.1", "from 400 to 599"),
        ("rst@x=0.1", "there is no fault 'rst@x'"),
        ("rst", "write NAME=RATE"),
        ("rst=often", "write NAME=RATE"),
    ],
)
def test_a_fault_that_is_none_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(FaultError, match=said):
        rates((text,))


@pytest.mark.parametrize("shares", [{"rst": 1.5}, {"rst": 0.6, "fin": 0.6}, {"rst": -0.1}], ids=repr)
def test_rates_are_shares_of_one_whole(shares: dict[str, float]) -> None:
    with pytest.raises(FaultError, match="1 at most together"):
        Faults({parse(name): share for name, share in shares.items()})


async def test_a_request_for_a_fault_that_is_none_is_refused() -> None:
    emulator = Emulator(Pace())
    async with serving(emulator, "127.0.0.1:0") as address:
        seen = await exchange(address, request(emulate={"fault": "smoke"}), until=b"}}")
    assert seen.status == 400
    assert "there is no fault 'smoke'" in json.loads(seen.body)["error"]["message"]
    assert emulator.calls == 0


def test_only_faults_amid_an_answer_have_a_place() -> None:
    placed = {kind for kind in Kind if kind.when is When.amid}
    assert placed == {parse(text).kind for text in SHOWS if "@" in text} - {Kind.status}


async def test_the_log_says_which_fault_a_call_met_and_how_far_it_came(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    async with serving(Emulator(Pace(tokens=4), log=log), "127.0.0.1:0") as address:
        await exchange(address, request(stream=True, n=2, emulate={"fault": "stall@3"}))
        await exchange(address, request(stream=True, emulate={"fault": "close"}))
    log.close()
    entries = msgspec.json.Decoder(Entry).decode_lines((tmp_path / "log").read_bytes())
    assert [(entry.fault, entry.tokens, entry.ended) for entry in entries] == [
        ("stall@3", 6, Ended.faulted),
        ("close", 0, Ended.faulted),
    ]
    assert entries[0].silent_s is not None and entries[0].silent_s > 0
    assert entries[1].silent_s is None
