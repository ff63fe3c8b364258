"""What a Remote adds to the wire: where calls go, with which key, and whether anybody is there."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtimes.artifact import Shelf
from runtimes.contract import Exchange, Invalid, Site, Unavailable
from runtimes.remote import Remote, RemoteRuntime
from tests.fakes import until, work
from tests.runtimes.hostile import Hostile, Peer, answering, hostile

HELLO = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"
KEY = "sk-sesame"


def site(folder: Path = Path("state")) -> Site:
    return Site(model="chat", replica="chat-0", state=folder, shelf=Shelf(folder / "shelf"))


@asynccontextmanager
async def opened(url: str, **fields: Any) -> AsyncIterator[RemoteRuntime]:
    runtime = Remote(url=url, **fields).build(site())
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.aclose()


async def ask(runtime: RemoteRuntime, path: str = "/v1/completions", body: bytes = b"{}") -> tuple[int, bytes]:
    request = Exchange(path=path, body=body, deadline_s=math.inf, headers=((b"traceparent", b"00-1"),))
    async with runtime.exchange(request) as reply:
        return reply.status, b"".join([frame async for frame in reply.frames])


@pytest.mark.parametrize("base", ["/v1", "/v1/", "/api/openai", "", "/"])
async def test_every_path_goes_under_the_base(base: str) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def script(peer: Peer) -> None:
        while True:
            seen.append(await peer.request())
            await peer.send(HELLO)

    async with hostile(script) as host, opened(host.url + base) as runtime:
        for path in sorted(RemoteRuntime.routes):
            assert await ask(runtime, path, b'{"a": 1}') == (200, b"hello")
    lines = [head.split(b"\r\n") for head, _ in seen]
    expected = [
        f"POST {base.rstrip('/')}{path.removeprefix('/v1')} HTTP/1.1".encode() for path in sorted(RemoteRuntime.routes)
    ]
    assert [line[0] for line in lines] == expected
    assert {body for _, body in seen} == {b'{"a": 1}'}
    assert all({b"traceparent: 00-1", b"content-type: application/json"} <= set(line) for line in lines)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/../admin", "/v1/completions?x", "http://other/v1/completions"])
async def test_no_other_path_is_ever_asked_for(path: str) -> None:
    async with hostile(answering(HELLO)) as host, opened(host.url) as runtime:
        with pytest.raises(Invalid):
            await ask(runtime, path)
        assert not host.peers


async def test_the_key_comes_from_the_environment_and_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        heads.append((await peer.request())[0])
        await peer.send(HELLO)

    monkeypatch.setenv("PROVIDER_KEY", KEY)
    async with hostile(script) as host, opened(host.url, key_env="PROVIDER_KEY") as runtime:
        await ask(runtime)
        await runtime.ready()
    assert all(b"\r\nauthorization: Bearer sk-sesame\r\n" in head for head in heads)
    assert len(heads) == 2


@pytest.mark.parametrize("value", [None, "", f"{KEY}\n", f"{KEY} {KEY}", f"{KEY}é"])
async def test_a_key_that_is_missing_or_unfit_is_named_and_not_shown(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROVIDER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("PROVIDER_KEY", value)
    runtime = Remote(url="https://models.example/v1", key_env="PROVIDER_KEY").build(site())
    with pytest.raises(Unavailable, match=r"PROVIDER_KEY.*models\.example") as refused:
        await runtime.open()
    assert KEY not in str(refused.value)
    await runtime.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host/v1",
        "ftp://host/v1",
        "http://",
        "http:///v1",
        "http://host/v1?key=1",
        "http://host/v1#x",
        "http://a:x/v1",
    ],
)
def test_a_url_that_is_not_a_plain_base_is_refused_where_it_stands(url: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="url"):
        msgspec.convert({"kind": "remote", "url": url}, Remote)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:pw@host/v1",
        "http://host:99999/v1",
        "http://hö.st/v1",
        "http://a b/v1",
        "http://a/v1\n",
        "http://[::1/v1",
    ],
)
def test_a_url_that_could_mean_another_is_refused(url: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="url") as refused:
        msgspec.convert({"kind": "remote", "url": url}, Remote)
    assert "pw" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9100/v1", "https://models.example", "http://[::1]:80/v1/", "http://a_b-c/v1"]
)
async def test_a_plain_base_is_taken(url: str) -> None:
    async with opened(url) as runtime:
        assert work(runtime) == (0, 0)


@pytest.mark.parametrize("field", ["connections_max", "connect_s_max", "idle_s_max"])
def test_a_bound_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({"kind": "remote", "url": "http://host/v1", field: 0}, Remote)


def test_the_name_upstream_is_the_gateways_own_unless_given() -> None:
    assert Remote(url="http://host/v1").build(site()).upstream_model is None
    assert Remote(url="http://host/v1", model="gpt-oss").build(site()).upstream_model == "gpt-oss"


@pytest.mark.parametrize("status", [200, 301, 401, 404, 429])
async def test_whoever_answers_below_500_is_ready(status: int) -> None:
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        heads.append((await peer.request())[0])
        await peer.send(b"HTTP/1.1 %d Any\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n" % status)

    async with hostile(script) as host, opened(f"{host.url}/v1") as runtime:
        await runtime.ready()
        assert [head.split(b"\r\n")[0] for head in heads] == [b"GET /v1/models HTTP/1.1"]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", b"SSH-2.0\r\n", b""])
async def test_whoever_fails_to_answer_is_not_ready(answer: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)

    async with hostile(script) as host, opened(host.url) as runtime:
        with pytest.raises(Unavailable, match="localhost"):
            await runtime.ready()


async def test_a_server_that_is_down_is_opened_and_not_ready() -> None:
    async with hostile(answering(HELLO)) as host:
        pass
    async with opened(host.url) as runtime:
        with pytest.raises(Unavailable):
            await runtime.ready()
        with pytest.raises(Unavailable):
            await ask(runtime)


async def test_a_full_pool_is_busy_and_still_ready() -> None:
    async def script(peer: Peer) -> None:
        head, _ = await peer.request()
        if head.startswith(b"GET"):
            await peer.send(HELLO)
        await peer.gone()

    async with hostile(script) as host, opened(host.url, connections_max=1) as runtime:
        calls = [asyncio.create_task(ask(runtime)) for _ in range(2)]
        await until(lambda: work(runtime) == (1, 1))
        await runtime.ready()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert work(runtime) == (0, 0)


async def test_a_redirect_is_relayed_and_not_followed() -> None:
    async with hostile(answering(HELLO)) as other:
        moved = f"HTTP/1.1 307 Go\r\nlocation: {other.url}/v1\r\ncontent-length: 2\r\n\r\n{{}}".encode()
        async with hostile(answering(moved)) as host, opened(host.url) as runtime:
            assert await ask(runtime) == (307, b"{}")
        assert not other.peers


async def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hostile(answering(HELLO)) as proxy, hostile(answering(HELLO)) as host:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        async with opened(host.url) as runtime:
            assert await ask(runtime) == (200, b"hello")
        assert not proxy.peers


async def test_before_open_and_after_close_nothing_is_sent() -> None:
    async with hostile(answering(HELLO)) as host:
        runtime = Remote(url=host.url).build(site())
        await assert_closed(runtime, host)
        await runtime.open()
        await runtime.aclose()
        await runtime.aclose()
        await assert_closed(runtime, host)


async def assert_closed(runtime: RemoteRuntime, host: Hostile) -> None:
    with pytest.raises(Unavailable):
        await ask(runtime)
    with pytest.raises(Unavailable):
        await runtime.ready()
    assert work(runtime) == (0, 0)
    assert not host.peers
