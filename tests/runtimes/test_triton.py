import asyncio
import math
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest

from runtimes import triton_client
from runtimes.artifact import Shelf
from runtimes.contract import (
    Expired,
    Failed,
    InferReply,
    InferRequest,
    Invalid,
    Overloaded,
    RuntimeFault,
    Site,
    Tensor,
    Unavailable,
)
from runtimes.process import scratch
from runtimes.rpc.status import Status
from runtimes.triton import Triton, TritonRuntime
from runtimes.triton_client import MESSAGE_BYTES_MAX, SAID_CHARS_MAX, fault_of, fitted, pieces
from tests import tiny
from tests.fakes import FakeClock, work
from tests.triton import FakeTriton, address

LABELS = ("none", "one", "two")
LATE_S = 30.0


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(model="cls", replica="cls-0", state=tmp_path / "state", shelf=Shelf(tmp_path / "shelf"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def triton(tmp_path: Path) -> AsyncIterator[FakeTriton]:
    fake = FakeTriton()
    async with fake.serving(address(tmp_path)):
        yield fake


@pytest.fixture
async def runtime(site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock) -> AsyncIterator[TritonRuntime]:
    async with opened(site, address(tmp_path), clock) as runtime:
        yield runtime


@asynccontextmanager
async def opened(site: Site, url: str, clock: FakeClock, **options: Any) -> AsyncIterator[TritonRuntime]:
    runtime = Triton(url=url, model="theirs", **{"task": "classify", "labels": LABELS, **options}).build(
        site, clock=clock
    )
    try:
        await runtime.open()
        yield runtime
    finally:
        await runtime.aclose()


def texts(*rows: Any) -> Mapping[str, Any]:
    found = np.empty(len(rows), object)
    found[:] = rows
    return {"text": found}


async def infer(runtime: TritonRuntime, *rows: str, deadline_s: float = math.inf) -> InferReply:
    return await runtime.infer(InferRequest(texts(*rows), deadline_s))


# ---- what it is --------------------------------------------------------------------------------------------


async def test_a_model_elsewhere_is_what_its_server_and_the_configuration_say(
    runtime: TritonRuntime, triton: FakeTriton
) -> None:
    assert (runtime.task, runtime.labels, runtime.platform, runtime.version) == ("classify", LABELS, "python", "1")
    assert (runtime.inputs, runtime.outputs) == (triton.inputs, triton.outputs)


async def test_of_a_model_that_nobody_says_the_task_of_only_tensors_are_known(
    site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock
) -> None:
    async with opened(site, address(tmp_path), clock, task=None, labels=()) as runtime:
        assert (runtime.task, runtime.labels) == ("predict", ())


async def test_a_model_that_cannot_do_its_task_does_not_open(
    site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock
) -> None:
    with pytest.raises(Unavailable, match="cls-0 cannot embed: its model has no output `embedding`"):
        async with opened(site, address(tmp_path), clock, task="embed", labels=()):
            pass


async def test_a_datatype_that_nothing_here_can_hold_is_named(
    site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock
) -> None:
    odd: Any = "BF16"
    triton.inputs = (Tensor("half", odd, (-1, 1)),)
    with pytest.raises(Unavailable, match="`half` holds BF16"):
        async with opened(site, address(tmp_path), clock):
            pass


async def test_after_an_outage_the_model_is_asked_anew_what_it_is(runtime: TritonRuntime, triton: FakeTriton) -> None:
    triton.ready = False
    with pytest.raises(Unavailable, match="does not have the model ready"):
        await runtime.ready()
    triton.ready, triton.versions = True, ["9", "10"]
    await runtime.ready()
    assert runtime.version == "10"


async def test_a_version_that_is_published_later_is_told_and_answers(
    runtime: TritonRuntime, triton: FakeTriton
) -> None:
    triton.versions = ["1", "2"]
    assert (await infer(runtime, "a")).version == "2", "as its server says, before anybody has asked what is new"
    await runtime.ready()
    assert (runtime.version, runtime.versions) == ("2", ("1", "2"))
    reply = await runtime.infer(InferRequest(texts("a"), math.inf, version="1"))
    assert (reply.version, triton.asked.model_version) == ("1", "1")


async def test_what_a_request_says_beside_its_tensors_goes_with_it(runtime: TritonRuntime, triton: FakeTriton) -> None:
    parameters = {
        "sequence_id": 5,
        "sequence_start": True,
        "heat": 0.5,
        "voice": "low",
        "many": (1 << 64) - 1,
        "binary_data_output": True,
    }
    await runtime.infer(InferRequest(texts("a"), math.inf, id="7", parameters=parameters))
    got = {it: getattr(said, said.WhichOneof("parameter_choice")) for it, said in triton.asked.parameters.items()}
    for name in ("binary_data_output", "sequence_id"):  # the one is about the client's wire, the other see below
        del parameters[name]
    got.pop("sequence_id")
    assert (triton.asked.id, got) == ("7", parameters)
    with pytest.raises(Invalid, match="beyond 64 bits"):
        await runtime.infer(InferRequest(texts("a"), math.inf, parameters={"much": 1 << 64}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda scores: None, "it gave no `scores`"),
        (lambda scores: scores[:-1], r"`scores` has the shape \[1, 3\], for 2 rows and 3 labels"),
        (lambda scores: scores[:, :2], r"has the shape \[2, 2\]"),
        (lambda scores: scores[:, 0].copy(), r"has the shape \[2\]"),
    ],
)
async def test_scores_that_are_not_one_for_each_row_and_label_are_the_model_s_failure(
    runtime: TritonRuntime, triton: FakeTriton, spoil: Any, said: str
) -> None:
    triton.spoil = spoil
    with pytest.raises(Failed) as failed:
        await infer(runtime, "a", "b")
    assert re.search(said, failed.value.said)
    others = InferRequest(texts("a", "b"), math.inf, outputs=("said",))
    assert (await runtime.infer(others)).outputs.keys() == {"said"}, "whoever wants no scores gets what there is"


async def test_parts_that_do_not_go_together_are_the_model_s_failure(
    site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock
) -> None:
    async with opened(site, address(tmp_path), clock, task=None, labels=()) as runtime:
        triton.spoil = lambda scores: scores if len(scores) == 4 else scores[:, :1].copy()
        with pytest.raises(Failed, match="to one part of the rows than to another"):
            await infer(runtime, *"abcdef")


async def test_all_parts_of_a_call_are_answered_by_one_version(runtime: TritonRuntime, triton: FakeTriton) -> None:
    asked: list[str] = []

    def publish(scores: Any) -> Any:
        asked.append(triton.asked.model_version)
        triton.versions.append(str(len(asked) + 1))
        return scores

    triton.spoil = publish
    reply = await infer(runtime, *"abcdefghij")
    assert (asked, reply.version) == (["", "2", "2"], "2")


async def test_classes_are_those_of_its_server(runtime: TritonRuntime, triton: FakeTriton) -> None:
    request = InferRequest(texts(*"abcdef"), math.inf, outputs=("scores",), classes={"scores": 1})
    reply = await runtime.infer(request)
    assert reply.outputs["scores"].tolist() == [[b"1.0:0:theirs"]] * 6
    assert triton.asked.outputs[0].parameters["classification"].int64_param == 1


@pytest.mark.parametrize("name", [True, 5.5, -1, 1 << 64, float("nan")])
async def test_what_is_no_name_of_a_sequence_is_refused(runtime: TritonRuntime, name: Any) -> None:
    with pytest.raises(Invalid, match="`sequence_id` must be"):
        await runtime.infer(InferRequest(texts("a"), math.inf, parameters={"sequence_id": name}))


@pytest.mark.parametrize("ids", [(5, 6), ("a", "b")])
async def test_a_sequence_is_its_flow_s_own(runtime: TritonRuntime, triton: FakeTriton, ids: tuple[Any, Any]) -> None:
    async def known_as(flow: str, sequence: int | str) -> int | str:
        request = InferRequest(texts("a"), math.inf, flow=flow, parameters={"sequence_id": sequence})
        await runtime.infer(request)
        said = triton.asked.parameters["sequence_id"]
        found: int | str = getattr(said, said.WhichOneof("parameter_choice"))
        return found

    names = [await known_as(flow, sequence) for flow in ("one", "other") for sequence in ids]
    assert len({*names}) == 4
    assert names[0] == await known_as("one", ids[0])
    assert not await known_as("one", type(ids[0])()), "for no sequence at all"


async def test_a_model_of_any_number_of_answers_does_not_open(
    site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock
) -> None:
    triton.decoupled = True
    with pytest.raises(Unavailable, match="decoupled"):
        async with opened(site, address(tmp_path), clock):
            pass


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either `artifact`"),
        ({"artifact": "a", "url": "grpc://h", "model": "m"}, "either `artifact`"),
        ({"url": "http://h:8000", "model": "m"}, "`url` must be grpc"),
        ({"url": "grpc://h:99999", "model": "m"}, "`url` must be grpc"),
        ({"url": "grpc://h"}, "`model` must say"),
        ({"url": "grpc://h", "model": "m", "threads": 2}, "`threads` means nothing beside `url`"),
        ({"artifact": "a", "model": "m"}, "`model` means nothing beside `artifact`"),
        ({"url": "grpc://h", "model": "m", "task": "classify"}, "`labels` go together"),
        ({"url": "grpc://h", "model": "m", "labels": ["a"]}, "`labels` go together"),
    ],
)
def test_a_contradiction_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=said):
        msgspec.convert({"kind": "triton", **given}, Triton)


@pytest.mark.parametrize("url", ["grpc://h", "grpc://h:1", "grpcs://h", "grpc://[::1]:8001", "unix:/run/triton"])
def test_an_address_is_one_of_grpcs(url: str) -> None:
    assert Triton(url=url, model="m").slots == 64


def test_other_processes_of_this_host_reach_a_supervised_one_by_its_socket(site: Site) -> None:
    spec = Triton(artifact="tiny", running_max=7)
    assert spec.attached(site) == Triton(url=f"unix:{scratch(site) / 'grpc:1'}", model="model", running_max=7)


# ---- calls -------------------------------------------------------------------------------------------------


async def test_arrays_come_back_as_they_were_computed(runtime: TritonRuntime) -> None:
    reply = await infer(runtime, "a", "é", "")
    assert [LABELS[row.argmax()] for row in reply.outputs["scores"]] == ["one", "two", "none"]
    assert reply.outputs["said"].tolist() == [[b"a"], ["é".encode()], [b""]]
    assert (reply.tokens_in, reply.batch_rows_max) == (0, 0)


async def test_only_the_outputs_that_are_wanted_come(runtime: TritonRuntime) -> None:
    reply = await runtime.infer(InferRequest(texts("a"), math.inf, outputs=("scores",)))
    assert reply.outputs.keys() == {"scores"}


async def test_more_rows_than_the_model_takes_go_in_pieces_and_come_back_in_order(
    runtime: TritonRuntime, triton: FakeTriton
) -> None:
    lengths = [0, 1, 2, 2, 1, 0, 0, 2, 1, 1]
    reply = await infer(runtime, *("x" * length for length in lengths))
    assert reply.outputs["scores"].argmax(axis=1).tolist() == lengths
    assert triton.rows == [4, 4, 2]


async def test_a_model_without_batches_gets_everything_at_once(
    site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock
) -> None:
    triton.rows_max = 0
    async with opened(site, address(tmp_path), clock) as runtime:
        await infer(runtime, *["a"] * 9)
    assert triton.rows == [9]


async def test_integers_are_widened_and_nothing_else_is_changed(runtime: TritonRuntime) -> None:
    both = {**texts("a"), "weight": np.ones((1, 2), np.int32)}
    assert (await runtime.infer(InferRequest(both, math.inf))).outputs
    with pytest.raises(Invalid, match="`weight` must hold INT64; got uint64"):
        await runtime.infer(InferRequest({"weight": np.ones((1, 2), np.uint64)}, math.inf))


@pytest.mark.parametrize("rows_max", [0, 4])
async def test_a_model_that_needs_no_input_may_be_given_none(runtime: TritonRuntime, rows_max: int) -> None:
    described = runtime._described
    assert described is not None
    inputs = tuple(msgspec.structs.replace(it, optional=True) for it in described.inputs)
    free = msgspec.structs.replace(described, inputs=inputs, rows_max=rows_max)
    assert [*pieces(fitted(free, {}, "cls-0"), rows_max)] == [{}]


SECRET = "xyzzy"


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ({"pixels": np.ones((1, 2))}, "pixels"),
        ({"text": np.array([1])}, "text"),
        ({"weight": np.array([[SECRET, SECRET]], object)}, "weight"),
        ({"text": np.array([[SECRET, SECRET]], object)}, "text"),
        ({"weight": np.ones((1, 3), np.int64)}, "weight"),
        (texts(SECRET, 5), "text"),
        (texts(f"{SECRET}\ud800"), "text"),
        ({**texts(SECRET, SECRET), "weight": np.ones((1, 2), np.int64)}, None),
        (texts(), None),
        ({}, None),
    ],
)
async def test_what_the_server_could_only_refuse_never_reaches_it_and_is_quoted_nowhere(
    runtime: TritonRuntime, triton: FakeTriton, inputs: Mapping[str, Any], param: str | None
) -> None:
    with pytest.raises(Invalid) as refused:
        await runtime.infer(InferRequest(inputs, math.inf))
    assert refused.value.param == param
    assert param is None or f"`{param}`" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert not triton.begun.is_set()
    assert work(runtime) == (0, 0)


async def test_a_request_that_is_too_large_for_a_message_is_refused(runtime: TritonRuntime) -> None:
    with pytest.raises(Invalid, match=f"{MESSAGE_BYTES_MAX} go at once"):
        await infer(runtime, "x" * (MESSAGE_BYTES_MAX + 1))


async def test_a_message_of_many_times_grpcs_default_is_taken(runtime: TritonRuntime) -> None:
    long = "x" * (16 << 20)
    reply = await infer(runtime, long)
    assert reply.outputs["said"].tolist() == [[long.encode()]]


# ---- time --------------------------------------------------------------------------------------------------


async def test_what_is_left_of_a_call_goes_with_it(
    runtime: TritonRuntime, triton: FakeTriton, clock: FakeClock
) -> None:
    await infer(runtime, "a", deadline_s=clock.now_s() + 50)
    assert triton.left_s is not None
    assert 0 < triton.left_s < 51  # gRPC rounds up what it sends


async def test_a_server_that_does_not_answer_by_then_is_left(
    runtime: TritonRuntime, triton: FakeTriton, clock: FakeClock
) -> None:
    triton.go_on.clear()
    async with asyncio.timeout(LATE_S):
        while not triton.begun.is_set():  # on a slow machine the call may be late before it is there
            with pytest.raises(Expired, match="cls-0 did not finish"):
                await infer(runtime, "a", deadline_s=clock.now_s() + 0.1)
        await triton.left.wait()
    assert work(runtime) == (0, 0)


async def test_a_call_that_is_late_already_is_not_sent(
    runtime: TritonRuntime, triton: FakeTriton, clock: FakeClock
) -> None:
    with pytest.raises(Expired):
        await infer(runtime, "a", deadline_s=clock.now_s())
    assert not triton.begun.is_set()


async def test_a_cancelled_call_is_cancelled_where_it_runs(runtime: TritonRuntime, triton: FakeTriton) -> None:
    triton.go_on.clear()
    call = asyncio.create_task(infer(runtime, "a"))
    await triton.begun.wait()
    assert work(runtime) == (1, 0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(triton.left.wait(), LATE_S)
    assert work(runtime) == (0, 0)


async def test_closing_waits_for_calls_under_way_and_takes_no_more(runtime: TritonRuntime, triton: FakeTriton) -> None:
    triton.go_on.clear()
    call = asyncio.create_task(infer(runtime, "a"))
    await triton.begun.wait()
    closing = asyncio.create_task(runtime.aclose())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="being stopped"):
        await infer(runtime, "a")
    assert not closing.done()
    triton.go_on.set()
    assert (await call).outputs
    await closing


async def test_a_call_that_closing_cuts_off_fails_and_is_not_cancelled(
    runtime: TritonRuntime, triton: FakeTriton, clock: FakeClock
) -> None:
    triton.go_on.clear()
    call = asyncio.create_task(infer(runtime, "a"))
    await triton.begun.wait()
    closing = asyncio.create_task(runtime.aclose())
    await clock.until_asleep()
    clock.advance(30)
    with pytest.raises(Unavailable, match="was stopped amid the call"):
        await call
    await closing


# ---- what goes wrong there ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Expired),
        (grpc.StatusCode.INVALID_ARGUMENT, Invalid),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.NOT_FOUND, Unavailable),
        (grpc.StatusCode.UNAUTHENTICATED, Unavailable),
        (grpc.StatusCode.INTERNAL, Failed),
        (grpc.StatusCode.CANCELLED, Failed),
    ],
)
async def test_its_errors_are_ours(
    runtime: TritonRuntime, triton: FakeTriton, code: grpc.StatusCode, kind: type[RuntimeFault]
) -> None:
    triton.trouble = (code, f"failed on {SECRET}\nAt:\n  /models/theirs/1/model.py(7): execute")
    with pytest.raises(kind) as failed:
        await infer(runtime, "a")
    if isinstance(failed.value, Failed):
        assert failed.value.said == f"failed on {SECRET}", "for whoever made the call, and for no log"
    if kind is not Invalid:
        error = failed.value
        assert not any(SECRET in str(it) or SECRET in repr(it) for it in (error, error.__cause__, error.__context__))
    assert work(runtime) == (0, 0)


async def test_a_connection_that_breaks_is_not_a_server_that_cannot_be_reached(
    runtime: TritonRuntime, triton: FakeTriton
) -> None:
    triton.go_on.clear()
    call = asyncio.create_task(infer(runtime, "a"))
    await triton.begun.wait()
    (wire,) = runtime._client._channel._wires
    wire.close()
    with pytest.raises(Unavailable, match="cls-0: its connection broke amid the call: the connection was closed"):
        await call
    triton.go_on.set()
    assert (await infer(runtime, "a")).outputs


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ("[request id: <id_unknown>] unexpected shape for input 'text' for model 'cls'. Expected [-1,1]", "text"),
        ("headrace:text `text` is not UTF-8", "text"),
        ("headrace: takes either `text`, or `input_ids`", None),
        (
            "expected 2 inputs but got 1 inputs. Got input(s) ['text'], but missing required input(s) ['weight'].",
            "weight",
        ),
        ("inference request batch-size must be <= 8 for 'cls'", None),
    ],
)
def test_a_refusal_names_the_input_if_the_servers_words_do(said: str, param: str | None) -> None:
    fault = fault_of(Status.INVALID_ARGUMENT, said, "cls-0", ("text", "weight"))
    assert isinstance(fault, Invalid)
    assert fault.param == param
    assert "request id" not in str(fault) and "headrace:" not in str(fault)


def test_long_words_about_a_bad_request_are_cut() -> None:
    fault = fault_of(Status.INVALID_ARGUMENT, "wrong " * SAID_CHARS_MAX, "cls-0")
    assert len(str(fault)) == SAID_CHARS_MAX


async def test_a_server_that_does_not_say_whether_it_is_ready_is_not(
    runtime: TritonRuntime, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_client, "PROBE_S_MAX", 0.05)
    triton.silent = True
    with pytest.raises(Unavailable, match="cls-0 did not answer a probe"):
        await runtime.ready()


async def test_an_answer_that_is_none_is_the_servers_failure(runtime: TritonRuntime, triton: FakeTriton) -> None:
    triton.nonsense = b"abc"
    with pytest.raises(Unavailable, match="its server's answer cannot be read"):
        await infer(runtime, "a")


async def test_an_unknown_model_does_not_open(site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock) -> None:
    runtime = Triton(url=address(tmp_path), model="nobodys").build(site, clock=clock)
    with pytest.raises(Unavailable, match="cls-0: its server knows no such model"):
        await runtime.open()
    await runtime.aclose()


async def test_a_server_that_comes_back_is_found(site: Site, tmp_path: Path, clock: FakeClock) -> None:
    triton, url = FakeTriton(), address(tmp_path)
    async with triton.serving(url):
        runtime = Triton(url=url, model="theirs").build(site, clock=clock)
        await runtime.open()
    try:
        with pytest.raises(Unavailable, match="cannot be reached"):
            await infer(runtime, "a")
        with pytest.raises(Unavailable):
            await runtime.ready()
        async with triton.serving(url), asyncio.timeout(LATE_S):
            while True:
                try:
                    await runtime.ready()
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
            assert (await infer(runtime, "a")).outputs
    finally:
        await runtime.aclose()


async def test_a_server_that_is_down_at_first_is_opened_later(site: Site, tmp_path: Path, clock: FakeClock) -> None:
    runtime = Triton(url=address(tmp_path), model="theirs").build(site, clock=clock)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await runtime.open()
    async with FakeTriton().serving(address(tmp_path)), asyncio.timeout(LATE_S):
        while True:
            try:
                await runtime.open()
                break
            except Unavailable:
                await asyncio.sleep(0.05)
        assert (await infer(runtime, "a")).outputs
        await runtime.aclose()


# ---- who asks ----------------------------------------------------------------------------------------------


async def test_its_key_goes_as_a_bearer_token(
    site: Site, triton: FakeTriton, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_KEY", "sk-theirs")
    async with opened(site, address(tmp_path), clock, key_env="TRITON_KEY") as runtime:
        await infer(runtime, "a")
    assert triton.authorization == "Bearer sk-theirs"


async def test_over_tls_the_machines_own_authorities_are_trusted_and_no_others(
    site: Site, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout {key} -out {certificate}"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([openssl, *made.split(), *names], check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    async with FakeTriton().serving("127.0.0.1:0", credentials) as port:
        with pytest.raises(Unavailable):
            async with opened(site, f"grpcs://localhost:{port}", clock):
                pass
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with opened(site, f"grpcs://localhost:{port}", clock) as runtime:
            assert (await infer(runtime, "a")).outputs


# ---- one of our own ----------------------------------------------------------------------------------------


async def test_without_an_engine_it_says_how_to_get_one(site: Site, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    tiny.publish(site.shelf, tmp_path / "folder")
    runtime = Triton(artifact="tiny").build(site)
    with pytest.raises(Unavailable, match="cls-0: triton is not installed: run `headrace engine install triton`"):
        await runtime.open()
    await runtime.aclose()


async def test_a_missing_artifact_is_named(site: Site) -> None:
    runtime = Triton(artifact="nothing@stable").build(site)
    with pytest.raises(Unavailable, match=r"cls-0: the shelf .* has no artifact 'nothing'"):
        await runtime.open()
    await runtime.aclose()
