"""The Open Inference Protocol over gRPC, through the door as it is served, and gRPC's health protocol."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.app import Reservation
from gateway.call import Bounds
from gateway.edge import grpc as edge_grpc
from gateway.edge import texts as edge_texts
from gateway.edge.grpc import Grpc
from gateway.edge.grpc_facts import SERVICE
from gateway.edge.texts import Texts
from runtimes.contract import Broken
from tests.fakes import Stages, let_stand
from tests.gateway.oip import BOUNDS, chunk, parts

KEY = (("authorization", "Bearer good"),)
TEXT = {"name": "text", "datatype": "BYTES", "shape": [1]}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Site:
    def __init__(self, stages: Stages, door: Grpc, address: str, channel: Any) -> None:
        self.stages = stages
        self.door = door
        self.address = address
        self.channel = channel
        self.inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)


@asynccontextmanager
async def open_site(folder: Path, *frames: Any, bounds: Bounds = BOUNDS) -> AsyncIterator[Site]:
    async with parts(folder, *frames) as found:
        door = Grpc(**found.given | {"bounds": bounds})
        with Reservation("127.0.0.1:0", "grpc") as kept:
            async with door.serving(kept.address), grpc.aio.insecure_channel(kept.address) as channel:
                yield Site(found.stages, door, kept.address, channel)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as found:
        yield found


def asked(model: str = "classifier", **changes: Any) -> Any:
    given = {"model_name": model, "inputs": [TEXT], "raw_input_contents": [b"\5\0\0\0hello"]} | changes
    return service_pb2.ModelInferRequest(**given)


def generation(text: str = "hi", *, stream: bool = True, model: str = "llm", **changes: Any) -> Any:
    inputs = [TEXT | {"name": "text_input"}, {"name": "stream", "datatype": "BOOL", "shape": [1]}]
    raws = [len(text).to_bytes(4, "little") + text.encode(), bytes([stream])]
    return service_pb2.ModelInferRequest(model_name=model, inputs=inputs, raw_input_contents=raws, **changes)


async def refused(call: Any, code: str, says: str = "") -> dict[str, Any]:
    """The trailing metadata of a call that must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as found:
        await call
    assert found.value.code().name == code, found.value.details()
    assert says in (found.value.details() or "")
    return dict(found.value.trailing_metadata())


# ---- health ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_is_told_to_everybody(site: Site, service: str) -> None:
    asked = health_pb2.HealthCheckRequest(service=service)
    assert (await site.health.Check(asked)).status == SERVING
    site.stages.pipeline.leaving = True
    assert (await site.health.Check(asked)).status == NOT_SERVING


async def test_nothing_is_known_of_the_health_of_another_service(site: Site) -> None:
    asked = health_pb2.HealthCheckRequest(service="other")
    await refused(site.health.Check(asked), "NOT_FOUND")
    watch = site.health.Watch(asked)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_watchers_are_told_of_every_change(site: Site) -> None:
    watches = [site.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    watches.pop().cancel()
    site.stages.pipeline.leaving = True
    assert (await watches[0].read()).status == NOT_SERVING
    watches[0].cancel()


async def test_live_and_ready_need_no_key(site: Site) -> None:
    assert (await site.inference.ServerLive(service_pb2.ServerLiveRequest())).live
    assert (await site.inference.ServerReady(service_pb2.ServerReadyRequest())).ready


# ---- who may ---------------------------------------------------------------------------------------------


OPEN = {"ServerLive", "ServerReady"}
METHODS = {it.name: it for it in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
ELSEWHERE = {name for name in METHODS if "SharedMemory" in name or name in ("TraceSetting", "LogSettings")}


@pytest.mark.parametrize("name", sorted(METHODS.keys() - OPEN - ELSEWHERE))
async def test_everything_else_needs_a_key(site: Site, name: str) -> None:
    ask = getattr(site.inference, name)
    if name == "ModelStreamInfer":
        await refused(ask(iter([asked()])).read(), "UNAUTHENTICATED")
        return
    message = getattr(service_pb2, METHODS[name].input_type.name)()
    for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "good"),)):
        await refused(ask(message, metadata=metadata), "UNAUTHENTICATED")


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
async def test_what_is_not_served_is_unimplemented(site: Site, name: str) -> None:
    message = getattr(service_pb2, METHODS[name].input_type.name)()
    await refused(getattr(site.inference, name)(message, metadata=KEY), "UNIMPLEMENTED")


async def test_who_has_no_key_is_refused_before_the_message_is_read(site: Site) -> None:
    """It never comes: only the header is sent."""
    ask = site.channel.stream_unary(f"/{SERVICE}/ModelInfer")()
    assert await ask.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_message_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async with open_site(tmp_path, bounds=Bounds(body_s_max=0.1)) as site:
        ask = site.channel.stream_unary(f"/{SERVICE}/ModelInfer")(metadata=KEY)
        assert await ask.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_without_a_message_is_refused(site: Site) -> None:
    await refused(
        site.channel.stream_unary(f"/{SERVICE}/ModelInfer")(iter(()), metadata=KEY), "UNIMPLEMENTED", "no message"
    )


async def test_the_key_may_come_as_anthropic_s_clients_send_it(site: Site) -> None:
    await site.inference.ModelInfer(asked(), metadata=(("x-api-key", "good"),))


async def test_a_model_that_the_key_may_not_use_is_refused(site: Site) -> None:
    narrow = (("authorization", "Bearer narrow"),)
    await refused(site.inference.ModelInfer(asked(), metadata=narrow), "PERMISSION_DENIED")
    named = service_pb2.ModelMetadataRequest(name="classifier")
    await refused(site.inference.ModelMetadata(named, metadata=narrow), "PERMISSION_DENIED")
    index = await site.inference.RepositoryIndex(service_pb2.RepositoryIndexRequest(), metadata=narrow)
    assert [it.name for it in index.models] == ["llm"]


async def test_over_quota_says_when_to_come_back(site: Site) -> None:
    poor = (("authorization", "Bearer poor"),)
    await site.inference.ModelInfer(asked(), metadata=poor)
    trailing = await refused(site.inference.ModelInfer(asked(), metadata=poor), "RESOURCE_EXHAUSTED")
    assert int(trailing["retry-after"]) > 0
    assert trailing["grpc-retry-pushback-ms"] == trailing["retry-after-ms"]
    assert trailing["x-should-retry"] == "true"


async def test_what_can_never_work_is_not_to_be_retried(site: Site) -> None:
    trailing = await refused(site.inference.ModelInfer(asked("nobody"), metadata=KEY), "NOT_FOUND")
    assert (trailing["x-should-retry"], trailing["grpc-retry-pushback-ms"]) == ("false", "-1")


# ---- what is refused ---------------------------------------------------------------------------------------

WRONG = {
    "a version": (asked(model_version="9"), "NOT_FOUND", "no version '9'"),
    "a name without end": (asked("x" * 10_000), "INVALID_ARGUMENT", "model_name"),
    "a model that fails": (asked("broken"), "UNAVAILABLE", "broken"),
    "an input": (asked(inputs=[TEXT | {"name": "nobody"}]), "INVALID_ARGUMENT", "`nobody`"),
    "text that is none": (asked(raw_input_contents=[b"\1\0\0\0\xff"]), "INVALID_ARGUMENT", "UTF-8"),
    "a temperature of no number": (
        generation(stream=False, parameters={"temperature": {"double_param": float("nan")}}),
        "INVALID_ARGUMENT",
        "finite",
    ),
    "an empty text": (generation("", stream=False), "INVALID_ARGUMENT", "`text_input` is empty"),
    "a stream without one": (generation(model="team/llm:1"), "INVALID_ARGUMENT", "ModelStreamInfer"),
    "two texts": (
        asked("llm", inputs=[TEXT | {"name": "text_input", "shape": [2]}], raw_input_contents=[bytes(8)]),
        "INVALID_ARGUMENT",
        "one element",
    ),
    "another input of a generator": (asked("llm"), "INVALID_ARGUMENT", "`text` is none of the model's"),
    "a message too large": (asked(raw_input_contents=[bytes(BOUNDS.body_bytes_max)]), "RESOURCE_EXHAUSTED", "larger"),
}


async def test_a_version_that_there_is_not_is_not_ready(site: Site) -> None:
    for name, version in (("classifier", "9"), ("nobody", "")):
        asked = service_pb2.ModelReadyRequest(name=name, version=version)
        assert not (await site.inference.ModelReady(asked, metadata=KEY)).ready
    assert (await site.inference.ModelReady(service_pb2.ModelReadyRequest(name="classifier"), metadata=KEY)).ready


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_has_a_status_of_its_own(site: Site, what: str) -> None:
    message, code, says = WRONG[what]
    await refused(site.inference.ModelInfer(message, metadata=KEY), code, says)


async def test_a_message_that_is_none_is_refused(site: Site) -> None:
    check = site.channel.unary_unary("/grpc.health.v1.Health/Check")
    await refused(check(b"\xff\xff"), "INVALID_ARGUMENT", "The message is no grpc.health.v1.")
    for method in ("ModelInfer", "ModelMetadata", "ModelReady", "RepositoryIndex", "ModelStatistics", "ModelConfig"):
        ask = site.channel.unary_unary(f"/{SERVICE}/{method}")
        await refused(ask(b"\xff\xff", metadata=KEY), "INVALID_ARGUMENT", "The message is no inference.")


async def test_a_short_message_that_becomes_a_long_one_is_refused(site: Site) -> None:
    bomb = asked(raw_input_contents=[bytes(5_000_000)])
    ask = site.inference.ModelInfer(bomb, metadata=KEY, compression=grpc.Compression.Gzip)
    await refused(ask, "RESOURCE_EXHAUSTED", "larger")


# ---- answers -----------------------------------------------------------------------------------------------


async def test_an_answer_says_which_call_it_was(site: Site) -> None:
    call = site.inference.ModelInfer(asked(id="7"), metadata=KEY)
    answer = await call
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "classifier", "1")
    assert answer.raw_output_contents == [b"\0\0\x80\x3e\0\0\x40\x3f"]
    (record,) = await site.stages.records()
    assert (record.id, record.route) == (dict(await call.trailing_metadata())["x-request-id"], "/v2/infer")


async def test_sampling_parameters_come_in_both_of_triton_s_ways(site: Site) -> None:
    llm: Any = site.stages.replicas["team/llm:1"][0].runtime
    message = generation(stream=False, model="team/llm:1", parameters={"seed": {"int64_param": 7}})
    sampling = b'{"temperature": "0.5"}'
    message.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(len(sampling).to_bytes(4, "little") + sampling)
    answer = await site.inference.ModelInfer(message, metadata=KEY)
    assert answer.raw_output_contents == [b"\5\0\0\0hello"]
    assert b'"temperature":0.5' in llm.got
    assert b'"seed":7' in llm.got


def text(answer: Any) -> tuple[str, bool]:
    """What a part of a stream says, and whether it is the last of its request."""
    assert not answer.error_message, answer.error_message
    (raw,) = answer.infer_response.raw_output_contents
    return raw[4:].decode(), answer.infer_response.parameters["triton_final_response"].bool_param


async def test_a_stream_s_last_text_is_marked(site: Site) -> None:
    stream = site.inference.ModelStreamInfer(iter([generation()]), metadata=KEY)
    assert [text(answer) async for answer in stream] == [("he", False), ("llo", True)]


async def test_a_stream_that_is_cut_short_ends_in_an_error_and_the_next_request_is_answered(tmp_path: Path) -> None:
    async with open_site(tmp_path, chunk("he"), Broken("reset")) as site:
        stream = site.inference.ModelStreamInfer(iter([generation(id="1"), asked(id="2")]), metadata=KEY)
        first, fault, other = [answer async for answer in stream]
        assert text(first) == ("he", False)
        assert "broke off" in fault.error_message
        assert fault.infer_response.id == "1"
        assert other.infer_response.id == "2"


async def test_texts_that_nobody_takes_make_the_engine_wait() -> None:
    texts = Texts()
    for _ in range(edge_texts.UNSENT_MAX):
        assert not texts.full
        texts.write(chunk("word"))
    assert texts.full
    waiting = asyncio.create_task(texts.drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    taking = aiter(texts)
    for _ in range(2):
        await anext(taking)
    async with asyncio.timeout(10):
        await waiting


async def test_who_does_not_read_is_given_up_and_frees_the_engine(tmp_path: Path) -> None:
    texts = [chunk("x" * 100_000) for _ in range(500)]
    async with open_site(tmp_path, *texts, asyncio.Event(), bounds=Bounds(write_s_max=0.3)) as site:
        stream = site.inference.ModelStreamInfer(iter([generation()]), metadata=KEY)
        llm: Any = site.stages.replicas["llm"][0].runtime
        async with asyncio.timeout(20):
            await llm.begun.wait()
            while not site.stages.at_rest():
                await asyncio.sleep(0.01)
        (record,) = await site.stages.records()
        assert (record.outcome, record.code) == ("cancelled", "client_left")
        with pytest.raises(grpc.aio.AioRpcError, match="unread"):
            while await stream.read() is not grpc.aio.EOF:
                pass


async def test_a_long_stream_arrives_whole_however_slowly_it_is_read(tmp_path: Path) -> None:
    texts = [chunk(f"{number} " * 1_000) for number in range(500)]
    async with open_site(tmp_path, *texts, chunk("", "stop"), b"data: [DONE]\n\n") as site:
        stream = site.inference.ModelStreamInfer(iter([generation()]), metadata=KEY)
        found = []
        async for answer in stream:
            found.append(text(answer)[0])
            await asyncio.sleep(0)
        assert "".join(found) == "".join(f"{number} " * 1_000 for number in range(500))


# ---- bounds ------------------------------------------------------------------------------------------------


async def test_connections_are_bounded_and_then_free_again(tmp_path: Path) -> None:
    async with open_site(tmp_path, bounds=Bounds(connections_max=1)) as site, asyncio.timeout(20):
        host, _, port = site.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read(1), "gRPC's greeting"
        assert site.door.connections == 1
        one_more, its_writer = await asyncio.open_connection(host, int(port))
        assert await one_more.read() == b""
        for its in (writer, its_writer):
            its.close()
            await its.wait_closed()
        await site.health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)


async def test_calls_of_all_connections_are_bounded(tmp_path: Path) -> None:
    async with open_site(tmp_path, bounds=Bounds(connections_max=1)) as site:
        watch = site.health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        await refused(site.health.Check(health_pb2.HealthCheckRequest()), "RESOURCE_EXHAUSTED")
        watch.cancel()


async def test_calls_of_one_connection_are_bounded_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_grpc, "STREAMS_MAX", 1)
    async with open_site(tmp_path) as site:
        watch = site.health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        check = asyncio.ensure_future(site.health.Check(health_pb2.HealthCheckRequest()))
        await asyncio.wait((check,), timeout=0.3)
        assert not check.done()
        watch.cancel()
        async with asyncio.timeout(10):
            assert (await check).status == SERVING


async def test_watchers_are_bounded_because_they_need_no_key(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_grpc, "WATCHERS_MAX", 1)
    first = site.health.Watch(health_pb2.HealthCheckRequest())
    await first.read()
    await refused(aiter(site.health.Watch(health_pb2.HealthCheckRequest())).__anext__(), "UNAVAILABLE", "check it")
    first.cancel()
    async with asyncio.timeout(10):
        while site.door.watchers:
            await asyncio.sleep(0.01)


async def test_one_connection_cannot_take_all_places_of_watchers(site: Site) -> None:
    each = edge_grpc.WATCHERS_EACH_MAX
    assert each < edge_grpc.WATCHERS_MAX
    watches = [site.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(each)]
    for watch in watches:
        await watch.read()
    await refused(aiter(site.health.Watch(health_pb2.HealthCheckRequest())).__anext__(), "UNAVAILABLE", "check it")
    # gRPC would share the connection with a channel that has the same options.
    async with grpc.aio.insecure_channel(site.address, options=[("grpc.use_local_subchannel_pool", 1)]) as other:
        stub: Any = health_pb2_grpc.HealthStub(other)
        assert (await stub.Watch(health_pb2.HealthCheckRequest()).read()).status == SERVING
    watches.pop().cancel()
    async with asyncio.timeout(10):
        while site.door.watchers >= each:
            await asyncio.sleep(0.01)
    watches.append(site.health.Watch(health_pb2.HealthCheckRequest()))
    assert (await watches[-1].read()).status == SERVING
    for watch in watches:
        watch.cancel()


async def test_a_stream_without_requests_is_ended(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = site.inference.ModelStreamInfer(metadata=KEY)
    for _ in range(2):
        await stream.write(asked())
        assert (await stream.read()).infer_response.model_name == "classifier"
        # Only now, while the second is waited for already: neither may be late, however slow the machine.
        monkeypatch.setattr(edge_grpc, "IDLE_S_MAX", 0.2)
    assert await stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_idle_connection_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_grpc, "IDLE_S_MAX", 0.2)
    async with open_site(tmp_path) as site:
        await site.health.Check(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(10):
            await site.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await site.health.Check(health_pb2.HealthCheckRequest())


async def test_a_long_message_is_cut(site: Site) -> None:
    named = service_pb2.ModelMetadataRequest(name="x" * 5_000)
    with pytest.raises(grpc.aio.AioRpcError) as found:
        await site.inference.ModelMetadata(named, metadata=KEY)
    assert len(found.value.details() or "") == edge_grpc.MESSAGE_CHARS_MAX


# ---- leaving, and stopping ---------------------------------------------------------------------------------


async def test_a_client_that_cancels_frees_the_engine(tmp_path: Path) -> None:
    async with open_site(tmp_path, chunk("he"), asyncio.Event()) as site:
        stream = site.inference.ModelStreamInfer(iter([generation()]), metadata=KEY)
        await stream.read()
        stream.cancel()
        async with asyncio.timeout(10):
            while not site.stages.at_rest():
                await asyncio.sleep(0.01)
        (record,) = await site.stages.records()
        assert (record.outcome, record.code) == ("cancelled", "client_left")


async def test_a_stream_that_is_cancelled_once_more_while_it_ends_is_not_under_way_for_ever(tmp_path: Path) -> None:
    async with open_site(tmp_path, chunk("he"), asyncio.Event()) as site:
        stream = site.inference.ModelStreamInfer(iter([generation()]), metadata=KEY)
        await stream.read()
        (handler,) = [it for it in asyncio.all_tasks() if getattr(it.get_coro(), "__name__", "") == "_answer"]
        for _ in range(2):  # its deadline, and then its client's leaving
            handler.cancel()
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            while not site.door.at_rest:
                await asyncio.sleep(0.01)
        stream.cancel()


async def test_a_client_s_deadline_is_the_call_s(tmp_path: Path) -> None:
    async with open_site(tmp_path, asyncio.Event()) as site:
        ask = site.inference.ModelInfer(generation(stream=False), metadata=KEY, timeout=30)
        running = asyncio.ensure_future(ask)
        llm: Any = site.stages.replicas["llm"][0].runtime
        async with asyncio.timeout(10):
            await llm.begun.wait()
        left_ms = dict(llm.got_headers)[b"x-envoy-expected-rq-timeout-ms"]
        assert 0 < int(left_ms) <= 31_000, "gRPC counts in steps of its own"
        running.cancel()
        await asyncio.wait((running,))
        async with asyncio.timeout(10):
            while not site.stages.at_rest():
                await asyncio.sleep(0.01)


async def test_a_gateway_that_stops_says_so(tmp_path: Path) -> None:
    async with open_site(tmp_path, chunk("he"), asyncio.Event()) as site:
        stream = site.inference.ModelStreamInfer(iter([generation()]), metadata=KEY)
        assert text(await stream.read()) == ("he", False)
        assert len(site.door.running) == 1
        site.stages.pipeline.stopped = True
        site.door.cut_off()
        assert "stopped" in (await stream.read()).error_message
        stream.cancel()


async def test_a_gateway_that_drains_takes_no_new_call(site: Site) -> None:
    site.stages.pipeline.draining = True
    await refused(site.inference.ModelInfer(asked(), metadata=KEY), "UNAVAILABLE", "stopping")


async def test_an_address_that_another_program_has_is_named(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match="another program") as refused:
            async with site.door.serving(address):
                pass
    assert refused.value.filename == address


async def test_an_alias_is_called_as_a_model_is(site: Site) -> None:
    let_stand(site.stages, "either", {"classifier": 1})
    request = service_pb2.ModelMetadataRequest(name="either")
    assert (await site.inference.ModelMetadata(request, metadata=KEY)).name == "either"
    answer = await site.inference.ModelInfer(asked("either"), metadata=KEY)
    assert answer.model_name == "classifier"
    let_stand(site.stages, "either", {"llm": 1})
    texts = site.inference.ModelStreamInfer(iter([generation(model="either")]), metadata=KEY)
    assert {it.infer_response.model_name async for it in texts} == {"llm"}
