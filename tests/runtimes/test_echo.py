import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from runtimes.artifact import Shelf
from runtimes.contract import Exchange, Expired, Reply, Site
from runtimes.echo import Echo, EchoRuntime
from tests.fakes import FakeClock

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEADLINE_S = 1_060.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def echo(clock: FakeClock, tmp_path: Path) -> EchoRuntime:
    return await opened(Echo(), clock, tmp_path)


async def opened(spec: Echo, clock: FakeClock, tmp_path: Path) -> EchoRuntime:
    site = Site(model="echo", replica="echo-0", state=tmp_path, shelf=Shelf(tmp_path / "shelf"))
    runtime = spec.build(site, clock=clock)
    await runtime.open()
    return runtime


def said(text: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]
    return {"model": "echo", "messages": messages, **options}


@asynccontextmanager
async def asked(echo: EchoRuntime, path: str, body: Any) -> AsyncIterator[Reply]:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with echo.exchange(Exchange(path=path, body=encoded, deadline_s=DEADLINE_S)) as reply:
        yield reply


async def whole(echo: EchoRuntime, path: str, body: Any) -> tuple[int, Any]:
    async with asked(echo, path, body) as reply:
        return reply.status, json.loads(b"".join([frame async for frame in reply.frames]))


async def chunks(echo: EchoRuntime, path: str, body: Any) -> list[Any]:
    async with asked(echo, path, {**body, "stream": True}) as reply:
        assert dict(reply.headers)[b"content-type"].startswith(b"text/event-stream")
        frames = [frame async for frame in reply.frames]
    assert all(frame.startswith(b"data: ") and frame.endswith(b"\n\n") for frame in frames)
    assert frames[-1] == b"data: [DONE]\n\n"
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-1]]


async def test_chat_answers_with_the_last_user_message_and_counts_tokens(echo: EchoRuntime) -> None:
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "hello  there"}, {"type": "image_url"}]},
    ]
    status, body = await whole(echo, CHAT, {"model": "echo", "messages": messages})
    answer = ChatCompletion.model_validate(body, strict=True)
    assert status == 200
    assert answer.choices[0].message.content == "hello  there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        2,
        5,
    )


@pytest.mark.parametrize(
    ("prompt", "texts", "tokens_in"),
    [
        ("one two", ["one two"], 2),
        (["one two", "three"], ["one two", "three"], 3),
        ([5, 6, 7], ["token ids: 3"], 3),
        ([[5, 6], [7]], ["token ids: 2", "token ids: 1"], 3),
    ],
)
async def test_completions_answer_with_each_prompt(
    echo: EchoRuntime, prompt: Any, texts: list[str], tokens_in: int
) -> None:
    _, body = await whole(echo, COMPLETIONS, {"model": "echo", "prompt": prompt})
    answer = Completion.model_validate(body, strict=True)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == tokens_in


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_a_token_limit_cuts_the_answer(echo: EchoRuntime, limit: str) -> None:
    _, body = await whole(echo, CHAT, said("one two three", **{limit: 2}))
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one two", "length")
    assert body["usage"]["completion_tokens"] == 2


async def test_an_answer_that_just_fits_its_limit_has_stopped(echo: EchoRuntime) -> None:
    _, body = await whole(echo, CHAT, said("one two", max_tokens=2))
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_the_first_stop_text_ends_the_answer(echo: EchoRuntime) -> None:
    _, body = await whole(echo, CHAT, said("one two three", stop=["three", " two", ""]))
    assert body["choices"][0]["message"]["content"] == "one"


async def test_n_choices_share_the_tokens_of_their_prompt(echo: EchoRuntime) -> None:
    _, body = await whole(echo, COMPLETIONS, {"model": "echo", "prompt": ["one two", "three"], "n": 2})
    assert [choice["text"] for choice in body["choices"]] == ["one two", "one two", "three", "three"]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


async def test_a_chat_stream_is_role_then_tokens_then_end(echo: EchoRuntime) -> None:
    got = await chunks(echo, CHAT, said("one two"))
    answers = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in got]
    deltas = [answer.choices[0].delta for answer in answers]
    assert [(delta.role, delta.content) for delta in deltas] == [
        ("assistant", ""),
        (None, "one"),
        (None, " two"),
        (None, None),
    ]
    assert [answer.choices[0].finish_reason for answer in answers] == [None, None, None, "stop"]
    assert len({answer.id for answer in answers}) == 1


async def test_a_completion_stream_joins_to_the_whole_answer(echo: EchoRuntime) -> None:
    got = await chunks(echo, COMPLETIONS, {"model": "echo", "prompt": ["a b c", "d"], "max_tokens": 2})
    for index, text, finish in [(0, "a b", "length"), (1, "d", "stop")]:
        mine = [it["choices"][0] for it in got if it["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [finish]
    # Before its end a choice has no reason yet; OpenAI sends null there although its SDK's type has no None.
    assert Completion.model_validate(got[-1], strict=True).choices[0].finish_reason == "length"


async def test_nobody_gets_usage_unasked(echo: EchoRuntime) -> None:
    for options in (None, {}, {"include_usage": False}, {"continuous_usage_stats": True}):
        got = await chunks(echo, CHAT, said("one two", stream_options=options))
        assert not any("usage" in chunk for chunk in got)


async def test_usage_asked_for_comes_last_and_without_choices(echo: EchoRuntime) -> None:
    got = await chunks(echo, CHAT, said("one two", n=2, stream_options={"include_usage": True}))
    assert not any("usage" in chunk for chunk in got[:-1])
    assert got[-1]["choices"] == []
    assert got[-1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    ChatCompletionChunk.model_validate(got[-1], strict=True)


async def test_continuous_usage_counts_each_choice_as_it_grows(echo: EchoRuntime) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = await chunks(echo, CHAT, said("one two", stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in got] == [0, 1, 2, 2, 2]
    assert {chunk["usage"]["prompt_tokens"] for chunk in got} == {4}


async def test_an_empty_message_is_answered_with_an_empty_one(echo: EchoRuntime) -> None:
    got = await chunks(echo, CHAT, {"model": "echo", "messages": [{"role": "user", "content": ""}]})
    assert [chunk["choices"][0]["delta"] for chunk in got] == [{"role": "assistant", "content": ""}, {}]


@given(text=st.text())
async def test_any_text_comes_back_whole(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    echo = await opened(Echo(), FakeClock(), tmp_path_factory.getbasetemp())
    got = await chunks(echo, CHAT, said(text))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in got) == text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff", None),
        (b'{"model":"echo","x":' + b"[" * 100_000, None),
        ({"model": "echo"}, "messages"),
        ({"model": 1, "messages": []}, "model"),
        ({"model": "echo", "messages": []}, "messages"),
        ({"model": "echo", "messages": [{"role": "user", "content": 5}]}, "messages"),
        (said("x", n=0), "n"),
        (said("x", max_tokens=-1), "max_tokens"),
        (said("x", stream="yes"), "stream"),
        (said("x", stream_options=[]), "stream_options"),
    ],
)
async def test_a_wrong_body_is_refused_in_openais_shape(echo: EchoRuntime, body: Any, param: str | None) -> None:
    status, answer = await whole(echo, CHAT, body)
    assert status == 400
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("prompt", [[], "", [""], [[]], ["a", 1], [[1], 2], [[1], "a"], [-1], [1.5], None])
async def test_a_prompt_of_the_wrong_kind_is_refused_by_name(echo: EchoRuntime, prompt: Any) -> None:
    status, answer = await whole(echo, COMPLETIONS, {"model": "echo", "prompt": prompt})
    assert (status, answer["error"]["param"]) == (400, "prompt")


async def test_nulls_are_as_good_as_nothing(echo: EchoRuntime) -> None:
    options = ("stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "stop")
    status, body = await whole(echo, CHAT, said("hi", **dict.fromkeys(options)))
    assert (status, body["choices"][0]["message"]["content"]) == (200, "hi")


async def test_what_an_echo_does_not_speak_is_a_404(echo: EchoRuntime) -> None:
    status, answer = await whole(echo, "/v1/embeddings", {"model": "echo", "input": "x"})
    assert status == 404
    assert answer["error"]["type"] == "invalid_request_error"


async def test_a_paced_stream_waits_before_each_token(clock: FakeClock, tmp_path: Path) -> None:
    echo = await opened(Echo(first_token_s=2, token_s=1), clock, tmp_path)
    task = asyncio.create_task(chunks(echo, CHAT, said("one two three")))
    for pause_s in (2, 1, 1):
        await clock.until_asleep()
        assert not task.done()
        clock.advance(pause_s)
    assert len(await task) == 5


async def test_a_pause_is_no_longer_than_the_deadline(clock: FakeClock, tmp_path: Path) -> None:
    echo = await opened(Echo(first_token_s=1_000), clock, tmp_path)
    task = asyncio.create_task(whole(echo, CHAT, said("hi")))
    await clock.until_asleep()
    clock.advance(DEADLINE_S - clock.now_s())
    with pytest.raises(Expired):
        await task


async def test_the_deadline_ends_a_stream_under_way(clock: FakeClock, tmp_path: Path) -> None:
    echo = await opened(Echo(token_s=1), clock, tmp_path)
    async with asked(echo, CHAT, said("one two", stream=True)) as reply:
        frames = [await anext(reply.frames), await anext(reply.frames)]
        clock.advance(100)
        with pytest.raises(Expired):
            await anext(reply.frames)
    assert len(frames) == 2
    assert echo.load().running == 0


def test_a_pace_cannot_be_negative() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"token_s"):
        msgspec.convert({"kind": "echo", "token_s": -1}, Echo)
