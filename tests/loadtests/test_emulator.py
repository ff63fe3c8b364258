"""The emulator's answers, and its account of them."""

import asyncio
import json
from pathlib import Path

import msgspec
import openai
import pytest

from loadtests.emulator import Emulator, Ended, Entry, Log, Pace, serving
from tests.fakes import until
from tests.loadtests.wire import connect, exchange, request

CHAT, COMPLETIONS, RESPONSES = ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
USAGE = {"include_usage": True}
INSTANT = Pace(tokens=4)
#: Goes the long way: written token by token.
PACED = Pace(first_token_s=0.001, tokens=4)


@pytest.mark.parametrize("pace", [INSTANT, PACED], ids=["instant", "paced"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_openais_client_understands_every_answer(stream: bool, pace: Pace) -> None:
    async with (
        serving(Emulator(pace), "127.0.0.1:0") as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client,
    ):
        if stream:
            chunks = [
                chunk
                async for chunk in await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "hi"}], stream=True, stream_options=USAGE
                )
            ]
            text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            assert (text, chunks[-2].choices[0].finish_reason) == (" water" * 4, "stop")
            assert chunks[-1].usage.completion_tokens == 4
            parts = [part async for part in await client.completions.create(model="m", prompt="hi", stream=True)]
            assert "".join(part.choices[0].text for part in parts) == " water" * 4
            events = [event async for event in await client.responses.create(model="m", input="hi", stream=True)]
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
            assert events[-1].response.usage.output_tokens == 4
        else:
            chat = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
            assert (chat.choices[0].message.content, chat.usage.completion_tokens) == (" water" * 4, 4)
            completion = await client.completions.create(model="m", prompt=["a", "b"], n=2)
            assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
            response = await client.responses.create(model="m", input="hi", max_output_tokens=2)
            assert (response.output_text, response.status) == (" water water", "incomplete")
            assert response.incomplete_details.reason == "max_output_tokens"
        assert len((await client.embeddings.create(model="m", input=["a", "b"], encoding_format="float")).data) == 2
        assert [model.id async for model in client.models.list()] == ["emulated"]


@pytest.mark.parametrize("pace", [INSTANT, PACED], ids=["instant", "paced"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_is_where_vllm_has_it(path: str, pace: Pace) -> None:
    async def usage(**options: bool) -> list[int | None]:
        seen = await exchange(address, request(path, stream=True, n=2, stream_options=options), until=b"[DONE]")
        events = [json.loads(event) for event in seen.events if event != b"[DONE]"]
        return [event["usage"]["completion_tokens"] if "usage" in event else None for event in events]

    async with serving(Emulator(pace), "127.0.0.1:0") as address:
        roles = 2 if path == CHAT else 0
        assert await usage() == [None] * (roles + 8)
        assert await usage(continuous_usage_stats=True) == [None] * (roles + 8)
        assert await usage(include_usage=True) == [None] * (roles + 8) + [8]
        each = [0] * roles + [1, 1, 2, 2, 3, 3, 4, 4]
        assert await usage(include_usage=True, continuous_usage_stats=True) == [*each, 8]


@pytest.mark.parametrize(
    ("asked", "tokens", "reason"),
    [
        ({}, 4, "stop"),
        ({"max_tokens": 3}, 3, "length"),
        ({"max_completion_tokens": 2}, 2, "length"),
        ({"max_tokens": 9}, 4, "stop"),
        ({"max_tokens": 9, "ignore_eos": True}, 9, "length"),
    ],
)
async def test_an_answer_is_as_long_as_was_asked(asked: dict[str, object], tokens: int, reason: str) -> None:
    async with serving(Emulator(INSTANT), "127.0.0.1:0") as address:
        answer = json.loads((await exchange(address, request(**asked))).body)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (tokens, reason)


async def test_a_calls_own_id_and_word_are_in_every_event() -> None:
    async with serving(Emulator(PACED), "127.0.0.1:0") as address:
        seen = await exchange(address, request(id="req_a-7", stream=True, emulate={"word": 'canary "7"'}))
    events = [json.loads(event) for event in seen.events[1:-1]]
    assert {event["id"] for event in events} == {"chatcmpl-req_a-7"}
    assert {event["choices"][0]["delta"]["content"] for event in events} == {'canary "7"'}


async def test_a_prompts_tokens_grow_with_its_length() -> None:
    async with serving(Emulator(INSTANT), "127.0.0.1:0") as address:
        counts = [
            json.loads((await exchange(address, request(COMPLETIONS, prompt="a" * length))).body)["usage"]
            for length in (40, 400, 40)
        ]
    assert [count["prompt_tokens"] for count in counts] == [11, 101, 11]


@pytest.mark.parametrize(
    "sent",
    [
        request(id="req_1"),
        request(id="req_1").replace(b"content-length", b"Content-Length").replace(b"x-request-id", b"X-Request-Id"),
        request(id="req_1").replace(b"host: x", b"host: x\r\nconnection: keep-alive"),
        request(id="req_1").replace(b"host: x", b"host: x\r\nx-length: 7"),
        request(id="req_1").replace(b"host: x", b"host: x\r\nlength: 7"),
        request(id="req_1").replace(b"/v1/chat/completions", b"/v1/chat/completions?a=b"),
    ],
    ids=["usual", "upper case", "connection", "x-length", "length", "query"],
)
async def test_a_request_is_understood_alike_however_it_is_written_and_cut(sent: bytes) -> None:
    emulator = Emulator(INSTANT)
    async with serving(emulator, "127.0.0.1:0") as address:
        whole = (await exchange(address, request(id="req_1"))).data
        reader, writer = await connect(address)
        for pieces in ([sent], [sent[:30], sent[30:]], [sent[:-1], sent[-1:]], [bytes((byte,)) for byte in sent]):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert await reader.readexactly(len(whole)) == whole
        writer.close()
    assert emulator.finished == emulator.calls == 5


async def test_a_client_that_means_to_close_is_left() -> None:
    async with serving(Emulator(PACED), "127.0.0.1:0") as address:
        seen = await exchange(address, request().replace(b"host: x", b"host: x\r\nconnection: close"))
        assert (seen.status, seen.end) == (200, "closed")


async def test_a_body_that_waits_for_leave_gets_it() -> None:
    async with serving(Emulator(INSTANT), "127.0.0.1:0") as address:
        reader, writer = await connect(address)
        head, _, body = request().replace(b"host: x", b"host: x\r\nexpect: 100-continue").partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        writer.close()


async def test_a_second_request_amid_an_answer_closes_the_connection() -> None:
    emulator = Emulator(Pace(first_token_s=60))
    async with serving(emulator, "127.0.0.1:0") as address:
        assert (await exchange(address, request() + request())).end in ("closed", "reset")
    assert emulator.aborted == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request(model=None), 400),
        (request(max_tokens=0), 400),
        (request(n=129), 400),
        (request(RESPONSES, n=2), 400),
        (request(emulate={"smoke": 1}), 400),
        (request("/v1/embeddings", input=None), 400),
        (request("/v1/nothing"), 404),
        (b"GET /health HTTP/1.1\r\n\r\n", 200),
    ],
)
async def test_what_can_not_be_answered_is_refused(sent: bytes, status: int) -> None:
    emulator = Emulator(INSTANT)
    async with serving(emulator, "127.0.0.1:0") as address:
        assert (await exchange(address, sent)).status == status
    assert emulator.calls == 0


# ---- its account of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [INSTANT, PACED], ids=["instant", "paced"])
async def test_the_log_has_a_line_for_every_call(pace: Pace, tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    emulator = Emulator(pace, log=log)
    async with serving(emulator, "127.0.0.1:0") as address:
        await exchange(address, request(id="req_a", stream=True, n=2))
        await exchange(address, request(RESPONSES, id="req_b", model="other"))
        await exchange(address, request(id='"no id"'))
    log.close()
    first, second, third = entries(tmp_path / "log")
    assert (first.id, first.route, first.model, first.stream, first.choices) == ("req_a", CHAT, "m", True, 2)
    assert (first.tokens, first.tokens_made, first.ended, first.fault) == (8, 8, Ended.finished, "")
    assert (second.id, second.route, second.model, second.tokens) == ("req_b", RESPONSES, "other", 4)
    assert third.id == "1"
    assert first.asked_s <= first.ended_s <= second.asked_s
    assert (emulator.calls, emulator.finished, emulator.tokens) == (3, 3, 16)
    assert emulator.prompt_tokens == first.prompt_tokens + second.prompt_tokens + third.prompt_tokens


async def test_a_client_that_leaves_is_counted_with_what_it_was_sent(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    emulator = Emulator(Pace(token_s=60, tokens=4), log=log)
    async with serving(emulator, "127.0.0.1:0") as address:
        reader, writer = await connect(address)
        writer.write(request(stream=True))
        await reader.readuntil(b" water")
        assert (emulator.running, emulator.aborted) == (1, 0)
        writer.close()
        await until(lambda: emulator.aborted == 1)
        await exchange(address, request(stream=False))
    log.close()
    streamed, whole = entries(tmp_path / "log")
    assert (streamed.ended, streamed.tokens, streamed.tokens_made) == (Ended.aborted, 1, 1)
    assert streamed.silent_s is not None
    assert list(emulator.silences_s) == [streamed.silent_s]
    assert (whole.ended, whole.tokens, whole.silent_s) == (Ended.aborted, 0, None)
    assert emulator.running == 0


async def test_tokens_are_made_for_a_client_that_does_not_read_but_not_written() -> None:
    emulator = Emulator(Pace(token_s=0.00001, tokens=200_000))
    async with serving(emulator, "127.0.0.1:0") as address:
        reader, writer = await connect(address)
        writer.transport.pause_reading()
        writer.write(request(stream=True))
        await until(lambda: any(connection.paused for connection in emulator.connections))
        writer.transport.abort()
        await until(lambda: emulator.aborted == 1)
    assert 0 < emulator.tokens < 200_000
    del reader


async def test_the_log_can_be_read_while_the_emulator_runs(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    async with serving(Emulator(INSTANT, log=log), "127.0.0.1:0") as address:
        await exchange(address, request(id="req_a"))
        await until(lambda: [entry.id for entry in entries(tmp_path / "log")] == ["req_a"])
    log.close()


async def test_metrics_have_vllms_names() -> None:
    emulator = Emulator(Pace(token_s=60))
    async with serving(emulator, "127.0.0.1:0") as address:
        await exchange(address, request(max_tokens=1))
        reader, writer = await connect(address)
        writer.write(request(stream=True))
        await reader.readuntil(b" water")
        text = (await exchange(address, b"GET /metrics HTTP/1.1\r\n\r\n")).body.decode()
        writer.close()
        del reader
    figures = {
        line.split("{")[0]: float(line.split()[-1])
        for line in text.splitlines()
        if "finished_reason" not in line and line[0] != "#"
    }
    assert figures["vllm:num_requests_running"] == 1
    assert figures["vllm:generation_tokens_total"] == emulator.made == 2
    assert figures["vllm:prompt_tokens_total"] == emulator.prompt_tokens
    assert 'vllm:request_success_total{engine="0",model_name="emulated",finished_reason="stop"} 1' in text


def entries(path: Path) -> list[Entry]:
    return msgspec.json.Decoder(Entry).decode_lines(path.read_bytes())
