"""The reply as the client gets it."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.call import Call
from gateway.errors import BadRequest, DeadlineExceeded, EngineFailed, GatewayError
from gateway.meter import AFTER_END_S_MAX, Answer, meter
from gateway.stream import EVENT_BYTES_MAX
from runtimes.clock import SystemClock
from runtimes.contract import Broken, Expired, Reply, Sink
from tests.fakes import FakeClient, FakeClock, Frame, Script, a_call, events, played, until

DONE = b"data: [DONE]\n\n"


async def sent_to(client: FakeClient, script: Script, call: Call) -> Answer:
    return await meter(call, Reply(script.status, script.headers, played(script.frames)), client, FakeClock())


async def begin(script: Script, call: Call) -> Answer:
    return await sent_to(FakeClient(), script, call)


async def relayed(script: Script, call: Call) -> bytes:
    """Everything the client gets."""
    client = FakeClient()
    answer = await sent_to(client, script, call)
    return client.got + answer.body


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def chunk(text: str, index: int = 0, **more: Any) -> bytes:
    return event(id="c1", choices=[{"index": index, "delta": {"content": text}}], **more)


def usage(tokens_in: int, tokens_out: int) -> dict[str, int]:
    return {"prompt_tokens": tokens_in, "total_tokens": tokens_in + tokens_out, "completion_tokens": tokens_out}


def counts(call: Call) -> tuple[int, int, bool]:
    return call.tokens_in, call.tokens_out, call.estimated


TEXTS = ["", "Hel", 'lo "usage" and ', '"error": {} ', "[DONE]", " data: x\n\ndata: y", "é🦆"]
CHAT = b"".join(chunk(text, usage=usage(7, number)) for number, text in enumerate(TEXTS))
TOTAL = event(id="c1", choices=[], usage=usage(7, 6))
PLAIN = b"".join(chunk(text) for text in TEXTS)
RESPONSES = (
    b'event: response.created\ndata: {"response":{"id":"r","usage":null},"sequence_number":0,"type":"response.created"}'
    b'\n\nevent: response.output_text.delta\ndata: {"delta":"Hi","type":"response.output_text.delta"}\n\n'
    b'event: response.completed\ndata: {"response":{"id":"r","usage":{"input_tokens":5,"input_tokens_details":'
    b'{"cached_tokens":4},"output_tokens":2}},"sequence_number":9,"type":"response.completed"}\n\n'
)
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","content":[],"usage":'
    b'{"input_tokens":9,"output_tokens":0}}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":'
    b'{"input_tokens":3,"output_tokens":2,"cache_read_input_tokens":6}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
STREAMS = {
    "metered": (CHAT + TOTAL + DONE, PLAIN + DONE, {}, (7, 6, False)),
    "total only": (PLAIN + TOTAL + DONE, PLAIN + DONE, {}, (7, 6, False)),
    "total asked": (CHAT + TOTAL + DONE, PLAIN + TOTAL + DONE, {"usage_asked": True}, (7, 6, False)),
    "all asked": (
        CHAT + TOTAL + DONE,
        CHAT + TOTAL + DONE,
        {"usage_asked": True, "chunk_usage_asked": True},
        (7, 6, False),
    ),
    "never said": (PLAIN + DONE, PLAIN + DONE, {"body": b"x" * 35}, (9, 14, True)),
    "responses": (RESPONSES, RESPONSES, {"route": "/v1/responses"}, (5, 2, False)),
    "messages": (MESSAGES, MESSAGES, {"route": "/v1/messages"}, (9, 2, False)),
    "comments": (
        b": ping\n\n" + PLAIN + b": usage\n\n" + DONE,
        b": ping\n\n" + PLAIN + b": usage\n\n" + DONE,
        {},
        None,
    ),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
async def test_it_does_not_matter_where_a_stream_is_cut(name: str, newline: bytes) -> None:
    sent, expected, given_, tokens = STREAMS[name]
    sent = sent.replace(b"\n", newline)
    for cut in range(len(sent) + 1):
        call = a_call(stream=True, **given_)
        assert await relayed(events(sent[:cut], sent[cut:]), call) == expected
        assert tokens is None or counts(call) == tokens
        assert call.complete


@settings(deadline=None)
@given(name=st.sampled_from(sorted(STREAMS)), data=st.data(), crlf=st.booleans())
def test_nor_into_how_many_pieces(name: str, data: st.DataObject, crlf: bool) -> None:
    sent, expected, given_, tokens = STREAMS[name]
    if crlf:
        sent = sent.replace(b"\n", b"\r\n")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(sent)), max_size=60)))
    pieces: list[Frame] = [
        sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True) if end > start
    ]
    call = a_call(stream=True, **given_)
    assert asyncio.run(relayed(events(*pieces), call)) == expected
    assert tokens is None or counts(call) == tokens


async def test_the_closing_event_is_held_back_until_all_is_settled() -> None:
    client = FakeClient()
    answer = await sent_to(client, events(CHAT, TOTAL, DONE), a_call(stream=True))
    assert client.got == PLAIN
    assert answer == Answer(200, DONE, events=True)


async def test_cached_tokens_are_part_of_the_input_in_every_dialect() -> None:
    for sent, expected in ((RESPONSES, (5, 4)), (MESSAGES, (9, 6))):
        call = a_call(stream=True)
        await relayed(events(sent), call)
        assert (call.tokens_in, call.tokens_cached) == expected
    call = a_call()
    body = {"usage": usage(50, 2) | {"prompt_tokens_details": {"cached_tokens": 48}}}
    await relayed(Script([json.dumps(body).encode()]), call)
    assert (call.tokens_in, call.tokens_cached) == (50, 48)


async def test_usage_of_choices_and_prompts_adds_up_when_a_stream_is_cut_short() -> None:
    """vLLM numbers choices prompt by prompt, and a chunk says the usage of its own choice alone."""
    call = a_call(stream=True, choices=4, prompts=2)
    sent: list[Frame] = [
        chunk("a", 0, usage=usage(10, 1)),
        chunk("b", 1, usage=usage(10, 1)),
        chunk("c", 2, usage=usage(3, 1)),
        chunk("d", 0, usage=usage(10, 2)),
    ]
    with pytest.raises(EngineFailed):
        await relayed(events(*sent), call)
    assert counts(call) == (13, 4, False)


async def test_several_choices_are_counted_whole_at_the_end() -> None:
    call = a_call(stream=True, choices=2)
    total = event(choices=[], usage=usage(10, 9))
    await relayed(events(chunk("a", 1, usage=usage(10, 1)), total, DONE), call)
    assert counts(call) == (10, 9, False)


async def test_a_messages_stream_cut_short_is_billed_for_its_deltas() -> None:
    start, delta, *_ = MESSAGES.split(b"\n\n")
    call = a_call(stream=True, route="/v1/messages")
    with pytest.raises(EngineFailed):
        await relayed(events(start + b"\n\n", *[delta + b"\n\n"] * 3), call)
    assert counts(call) == (9, 3, True)


async def test_lines_before_the_data_are_kept_when_usage_is_taken_out() -> None:
    sent = b"id: 4\n" + chunk("a", usage=usage(1, 1))
    assert await relayed(events(sent, DONE), a_call(stream=True)) == b"id: 4\n" + chunk("a") + DONE


async def test_nothing_else_in_a_chunk_changes_when_usage_is_taken_out() -> None:
    odd = b'data: {"id":"a","x":1e5, "choices":[{"index":0,"delta":{"content":"\\u00e9"}}],"usage":{"a":1},"y":1.0}\n\n'
    (event_,) = (await relayed(events(odd, DONE), a_call(stream=True))).split(DONE)[:-1]
    assert event_ == (b'data: {"id":"a","x":1e5,"choices":[{"index":0,"delta":{"content":"\\u00e9"}}],"y":1.0}\n\n')


@pytest.mark.parametrize("last", [[], [chunk("x")], [chunk("x", usage=usage(1, 1)), TOTAL]])
async def test_a_stream_without_its_closing_event_is_a_failure(last: list[Frame]) -> None:
    call = a_call(stream=True)
    with pytest.raises(EngineFailed):
        await relayed(events(*last), call)
    assert not call.complete


@pytest.mark.parametrize(
    ("fault", "error"), [(Broken("/run/engine.sock cut"), EngineFailed), (Expired("late"), DeadlineExceeded)]
)
async def test_breaking_off_is_told_without_details_of_the_engine(fault: Exception, error: type[GatewayError]) -> None:
    for script in (events(chunk("x"), fault), Script([b"{", fault])):
        with pytest.raises(error) as raised:
            await relayed(script, a_call(stream=True))
        assert "engine.sock" not in raised.value.message


async def test_a_fault_after_the_closing_event_changes_nothing() -> None:
    call = a_call(stream=True)
    assert await relayed(events(chunk("x"), DONE, Broken("reset")), call) == chunk("x") + DONE
    assert call.complete


async def test_an_engine_that_does_not_hang_up_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AFTER_END_S_MAX <= 1
    monkeypatch.setattr("gateway.meter.AFTER_END_S_MAX", 0.01)
    assert await relayed(events(chunk("x"), DONE, asyncio.Event()), a_call(stream=True)) == chunk("x") + DONE


async def test_an_error_amid_a_stream_ends_it_with_the_engine_s_words() -> None:
    error = {"message": "out of memory", "type": "InternalServerError", "param": None, "code": 500}
    with pytest.raises(EngineFailed) as raised:
        await begin(events(chunk("x"), event(error=error), DONE), a_call(stream=True))
    fault = raised.value
    assert (fault.message, fault.type, fault.param, fault.code) == ("out of memory", "InternalServerError", None, "500")


async def test_what_came_in_one_read_with_an_error_is_delivered_before_it() -> None:
    call = a_call(stream=True)
    together = chunk("x") + chunk("y") + event(error={"message": "out of memory", "code": 500})
    client = FakeClient()
    with pytest.raises(EngineFailed):
        await sent_to(client, events(together, DONE), call)
    assert client.got == chunk("x") + chunk("y")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (event(error={"message": "no", "code": 400}), 400),
        (event(error={"message": "no", "code": 503}), 503),
        (event(error={"message": "no", "code": "weird"}), 502),
        (event(error="no"), 502),
        (b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"no"}}\n\n', 502),
        (b'event: error\ndata: {"type":"error","code":"server_error","message":"no","param":null}\n\n', 502),
    ],
)
async def test_an_error_that_comes_first_still_gets_a_status_of_its_own(sent: bytes, status: int) -> None:
    call = a_call(stream=True)
    with pytest.raises(GatewayError) as raised:
        await begin(events(sent, DONE), call)
    assert (raised.value.status, raised.value.message) == (status, "no")
    assert (call.status, *counts(call)) == (0, 0, 0, False)


async def test_null_errors_are_none() -> None:
    sent = chunk("x", error=None, usage=None)
    assert await relayed(events(sent, DONE), a_call(stream=True)) == sent + DONE


async def test_an_event_has_a_bound() -> None:
    piece = b"x" * (EVENT_BYTES_MAX // 4)
    with pytest.raises(EngineFailed, match=str(EVENT_BYTES_MAX)):
        await relayed(events(b"data: ", *[piece] * 5), a_call(stream=True))


async def test_an_answer_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.meter.ANSWER_BYTES_MAX", 100)
    with pytest.raises(EngineFailed, match="100"):
        await relayed(Script([b"x" * 60, b"x" * 60]), a_call())


async def test_an_answer_in_one_piece_is_not_touched() -> None:
    body = b'{ "usage" : {"prompt_tokens":3,"completion_tokens":1},"choices":[ ] }'
    call = a_call()
    assert await relayed(Script([body[:9], body[9:]]), call) == body
    assert counts(call) == (3, 1, False)


@pytest.mark.parametrize("body", [b"{}", b'{"usage":null}', b'{"usage":{"prompt_tokens":"x"}}'])
async def test_without_usage_the_answer_is_estimated_and_never_above_what_was_allowed(body: bytes) -> None:
    body += b" " * 40
    call = a_call(body=b"x" * 39, tokens_out_max=2)
    assert await relayed(Script([body]), call) == body
    assert counts(call) == (10, 2, True)
    call = a_call(body=b'{"model":"chat","input":["a",  "b","c"]}', route="/v1/embeddings", tokens_out_max=0)
    await relayed(Script([body]), call)
    assert (counts(call), call.items) == ((11, 0, True), 3)


@pytest.mark.parametrize(
    ("route", "given", "items"),
    [
        ("/v1/embeddings", {"input": "a"}, 1),
        ("/v1/embeddings", {"input": ["a", "b"]}, 2),
        ("/v1/embeddings", {"input": [1, 2, 3]}, 1),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, 2),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "a"}]}, 0),
        ("/v1/classify", {"input": ["a", "b", "c"]}, 3),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c"]}, 3),
        ("/v1/score", {"queries": ["a"], "documents": ["b", {"content": []}]}, 3),
        ("/v1/rerank", {"query": "a", "documents": [], "top_n": 1}, 1),
        ("/v1/chat/completions", {"input": ["a", "b"]}, 0),
    ],
)
async def test_items_are_what_a_pooling_model_was_given(route: str, given: Any, items: int) -> None:
    call = a_call(route=route, body=json.dumps({"model": "chat"} | given).encode())
    await relayed(Script([b'{"usage":{"prompt_tokens":3}}']), call)
    assert call.items == items


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"choices":[', b'{"choices":[nothing]}', b"{}{}", b"[]"])
async def test_what_is_no_json_object_is_no_answer_whatever_its_status_says(body: bytes) -> None:
    call = a_call()
    with pytest.raises(EngineFailed, match="no JSON object"):
        await relayed(Script([body]), call)
    assert (call.complete, counts(call)) == (False, (0, 0, False))


async def test_what_was_to_be_streamed_is_no_answer_in_one_piece() -> None:
    body = json.dumps({"choices": [], "usage": usage(7, 3)}).encode()
    call = a_call(stream=True)
    with pytest.raises(EngineFailed, match="in one piece"):
        await relayed(Script([body]), call)
    assert (call.complete, counts(call)) == (False, (0, 0, False))
    assert await relayed(Script([body]), a_call(stream=True, route="/v1/embeddings")) == body


@pytest.mark.parametrize(
    ("code", "status", "kind"), [(500, 500, EngineFailed), ("x", 502, EngineFailed), (400, 400, BadRequest)]
)
async def test_an_error_that_comes_with_a_200_is_an_error(code: Any, status: int, kind: type[GatewayError]) -> None:
    body = json.dumps({"object": "error", "error": {"message": "m", "code": code}, "usage": usage(7, 3)}).encode()
    call = a_call()
    with pytest.raises(kind) as caught:
        await relayed(Script([body]), call)
    assert (caught.value.status, caught.value.message) == (status, "m")
    assert not call.complete


@pytest.mark.parametrize(
    ("body", "message", "type_", "param", "code"),
    [
        (
            b'{"error":{"message":"m","type":"BadRequestError","param":"n","code":400}}',
            "m",
            "BadRequestError",
            "n",
            "400",
        ),
        (b'{"error":{"message":"m","type":null,"param":null,"code":"c"}}', "m", "invalid_request_error", None, "c"),
        (b'{"type":"error","error":{"type":"not_found","message":"m"}}', "m", "not_found", None, "invalid_request"),
        (b'{"object":"error","message":"m","type":"T","param":null,"code":400}', "m", "T", None, "400"),
        (b'{"error":"m"}', "m", "invalid_request_error", None, "invalid_request"),
        (b'{"detail":"m"}', "m", "invalid_request_error", None, "invalid_request"),
        (
            b'{"detail":[{"loc":["body","messages",0],"msg":"m","input":"SECRET"}]}',
            "messages.0: m",
            "invalid_request_error",
            "messages.0",
            "invalid_request",
        ),
        (b"m", "m", "invalid_request_error", None, "invalid_request"),
        (b'{"error":{"message":["odd"],"code":{}}}', None, "invalid_request_error", None, "invalid_request"),
        (b"<html>", None, "invalid_request_error", None, "invalid_request"),
        (b"", None, "invalid_request_error", None, "invalid_request"),
        (b'{"detail":{"a":1}}', None, "invalid_request_error", None, "invalid_request"),
    ],
)
async def test_errors_of_engines_get_one_shape(
    body: bytes, message: str | None, type_: str, param: str | None, code: str
) -> None:
    call = a_call()
    with pytest.raises(BadRequest) as raised:
        await begin(Script([body], status=422), call)
    told = json.loads(raised.value.body())
    said = message or "The engine answered 422 without saying why."
    assert told == {"type": "error", "error": {"message": said, "type": type_, "param": param, "code": code}}
    assert raised.value.status == 422
    assert counts(call) == (0, 0, False)


async def test_when_an_engine_says_to_come_back_is_handed_on() -> None:
    headers = ((b"content-type", b"application/json"), (b"retry-after", b"7"))
    with pytest.raises(GatewayError) as raised:
        await begin(Script([b"{}"], status=429, headers=headers), a_call())
    assert raised.value.retry_after_s == 7
    assert raised.value.retryable


async def test_a_long_plain_error_is_cut() -> None:
    with pytest.raises(EngineFailed) as raised:
        await begin(Script([b"x" * 100_000], status=500), a_call())
    assert len(raised.value.message) <= 1024


IMPOSSIBLE: list[Any] = [-1, 2.5, 10**9 + 1, 10**30, "7", True, []]


@pytest.mark.parametrize("number", IMPOSSIBLE)
@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
async def test_counts_that_can_t_be_true_are_as_if_not_said(field: str, number: Any) -> None:
    said = usage(7, 3) | {field: number}
    call = a_call(body=b"x" * 39)
    await relayed(Script([json.dumps({"usage": said}).encode()]), call)
    assert (call.tokens_in, call.estimated) == (10, True)
    call = a_call(stream=True, body=b"x" * 39)
    sent = [chunk("one", usage=said), chunk("two", usage=said), event(choices=[], usage=said)]
    assert await relayed(events(*sent, DONE), call) == chunk("one") + chunk("two") + DONE
    assert counts(call) == (10, 2, True)


@pytest.mark.parametrize("ending", [[DONE], []], ids=["closed", "cut short"])
async def test_text_that_comes_after_the_last_usage_is_counted_too(ending: list[bytes]) -> None:
    call = a_call(stream=True)
    sent = [chunk("a", usage=usage(7, 1)), *[chunk("x" * 40)] * 3, *ending]
    try:
        await relayed(events(*sent), call)
    except EngineFailed:
        assert not ending
    assert counts(call) == (7, 31, True)


@pytest.mark.parametrize("error", [b'{"message":"caf\xe9"}', b'{"message":"m","\xff":1}', b'"\xff"'])
async def test_an_error_that_is_not_utf_8_is_still_the_engine_s(error: bytes) -> None:
    body = b'{"error":' + error + b"}"
    with pytest.raises(BadRequest) as raised:
        await begin(Script([body], status=400), a_call())
    assert raised.value.status == 400
    for script in (Script([body]), events(b"data: " + body + b"\n\n", DONE)):
        with pytest.raises(EngineFailed):
            await begin(script, a_call(stream=len(script.headers[0][1]) > 20))


async def test_the_largest_counts_that_can_be_true_are_taken() -> None:
    call = a_call()
    await relayed(Script([json.dumps({"usage": usage(10**9, 0)}).encode()]), call)
    assert counts(call) == (10**9, 0, False)


@pytest.mark.parametrize(
    "odd",
    [
        b'{"choices":[{"delta":{"content":"hi"},"logprob":NaN}]}',
        b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"choices":{"a":1},"type":[],"response":7}',
        b'{"type":"content_block_delta","delta":{"text":"hi"},"usage":"x"}',
    ],
)
async def test_an_event_that_can_t_be_read_is_relayed_and_counted_as_a_token(odd: bytes) -> None:
    call = a_call(stream=True)
    sent = b"data: " + odd + b"\n\n"
    assert await relayed(events(sent, DONE), call) == sent + DONE
    assert (call.tokens_out, call.estimated) == (1, True)


async def test_an_event_of_several_lines_is_metered_and_freed_of_usage_like_any_other() -> None:
    split = b'id: 4\ndata: {"choices":[{"index":0}],\ndata: "usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
    call = a_call(stream=True)
    assert await relayed(events(split, DONE), call) == b'id: 4\ndata: {"choices":[{"index":0}]}\n\n' + DONE
    assert counts(call) == (7, 3, False)
    failing = b'data: {"error":\ndata: {"message":"no","code":503}}\n\n'
    with pytest.raises(EngineFailed):
        await relayed(events(failing, DONE), a_call(stream=True))


async def test_without_usage_a_stream_is_counted_by_its_text_and_never_above_what_was_allowed() -> None:
    long = [chunk("x" * 400), chunk("é" * 100), chunk("")]
    call = a_call(stream=True)
    await relayed(events(*long, DONE), call)
    assert (call.tokens_out, call.estimated) == (100 + 50 + 1, True)
    call = a_call(stream=True, tokens_out_max=60, choices=2)
    await relayed(events(*long, DONE), call)
    assert (call.tokens_out, call.estimated) == (120, True)
    call = a_call(stream=True, route="/v1/responses")
    with pytest.raises(EngineFailed):
        await relayed(events(event(type="response.output_text.delta", item_id="i" * 99, delta="x" * 40)), call)
    assert (call.tokens_out, call.estimated) == (10, True)


async def test_what_else_a_chunk_says_is_not_counted_however_the_stream_is_cut() -> None:
    said = event(id="c1", provider="one with a long name", choices=[{"index": 0, "delta": {"content": "hello, world"}}])
    found = set()
    for frames in ([said] * 8, [said * 2] * 4, [said[:50], said[50:] + said * 6 + said[:20], said[20:]]):
        call = a_call(stream=True)
        await relayed(events(*frames, DONE), call)
        found.add(call.tokens_out)
    assert found == {8 * 3}


async def test_what_a_model_calls_is_text_and_the_call_s_id_is_not() -> None:
    calls = [{"index": 0, "id": "i" * 400, "type": "function", "function": {"name": "f", "arguments": "x" * 39}}]
    call = a_call(stream=True)
    await relayed(events(event(choices=[{"index": 0, "delta": {"role": "r" * 400, "tool_calls": calls}}]), DONE), call)
    assert call.tokens_out == 10


@pytest.mark.parametrize("message", [5, "text", [], {"usage": 5}])
async def test_a_message_that_is_no_object_says_no_usage(message: Any) -> None:
    call = a_call(stream=True, route="/v1/messages")
    sent = event(type="message_start", message=message) + event(type="message_stop")
    assert await relayed(events(sent), call) == sent
    assert call.tokens_out == 0


@pytest.mark.parametrize("choices", ["text", {"index": 0}, [{"index": "0"}], [5], 7])
async def test_choices_that_can_t_be_told_apart_are_estimated(choices: Any) -> None:
    call = a_call(stream=True, choices=2)
    await relayed(events(event(choices=choices, usage=usage(5, 5)), DONE), call)
    assert (call.tokens_out, call.estimated) == (1, True)


async def test_choices_nobody_asked_for_are_not_counted() -> None:
    call = a_call(stream=True, choices=2)
    odd = [chunk("a", index, usage=usage(5, 5)) for index in (-1, 2, 10**9)]
    await relayed(events(*odd, chunk("a", 1, usage=usage(5, 4)), DONE), call)
    assert counts(call) == (5, 4, False)


@pytest.mark.parametrize("code", ["what I asked", "x" * 65, "x" * 100_000, "tell\nme", "é", ""])
async def test_a_code_that_is_no_name_is_replaced_so_that_no_prompt_is_recorded(code: str) -> None:
    with pytest.raises(BadRequest) as raised:
        await begin(Script([json.dumps({"error": {"message": "m", "code": code}}).encode()], status=400), a_call())
    assert raised.value.code == "invalid_request"


@pytest.mark.parametrize("after", [b"9" * 3_000, b"-1", b"1.5", b"inf", b"nan", b"", b"Wed, 21 Oct 2026 07:28:00 GMT"])
async def test_advice_that_is_no_sane_number_of_seconds_is_ignored(after: bytes) -> None:
    with pytest.raises(GatewayError) as raised:
        await begin(Script([b"{}"], status=429, headers=((b"retry-after", after),)), a_call())
    assert raised.value.retry_after_s is None


async def test_a_429_without_a_type_is_a_rate_limit() -> None:
    with pytest.raises(GatewayError) as raised:
        await begin(Script([b"{}"], status=429), a_call())
    assert raised.value.type == "rate_limit_error"


async def test_a_log_gets_the_status_of_a_failure_and_not_the_engine_s_words() -> None:
    with pytest.raises(EngineFailed) as raised:
        await begin(Script([b'{"error":{"message":"words"}}'], status=500), a_call())
    assert str(raised.value) == "the engine answered 500"
    assert raised.value.message == "words"


async def test_the_type_of_a_stream_may_be_written_in_any_case() -> None:
    headers = ((b"content-type", b"text/Event-Stream; charset=utf-8"),)
    client = FakeClient()
    await sent_to(client, Script([chunk("x"), DONE], headers=headers), a_call(stream=True))
    assert client.got == chunk("x")


async def test_a_client_that_is_full_is_given_nothing_until_it_has_read() -> None:
    client = FakeClient()
    client.full = True
    sending = asyncio.create_task(sent_to(client, events(chunk("x"), chunk("y"), DONE), a_call(stream=True)))
    await until(lambda: bool(client.parts))
    for _ in range(5):
        await asyncio.sleep(0)
    assert client.got == chunk("x")
    client.full = False
    client.reads.set()
    await sending
    assert client.got == chunk("x") + chunk("y")


async def test_a_client_that_never_reads_is_not_waited_for_beyond_the_deadline() -> None:
    client = FakeClient()
    client.full = True
    call = a_call(stream=True, deadline_s=SystemClock().now_s() + 0.05)
    with pytest.raises(DeadlineExceeded):
        await sent_to(client, events(chunk("x"), chunk("y"), DONE), call)
    assert client.got == chunk("x")


async def test_what_an_engine_s_connection_pours_is_the_same_as_what_it_would_frame() -> None:
    async def pour(sink: Sink) -> None:
        assert all(sink.take(part) for part in (CHAT[:100], CHAT[100:], TOTAL))
        assert not sink.take(DONE)
        assert sink.done

    client, call = FakeClient(), a_call(stream=True)
    reply = Reply(200, events().headers, played([]), pour)
    answer = await meter(call, reply, client, FakeClock())
    assert client.got + answer.body == PLAIN + DONE
    assert counts(call) == (7, 6, False)
