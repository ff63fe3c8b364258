"""What a user of Triton's own clients may write, in all four forms, and a stock gRPC health check. It knows an address,
a model and headers, not who serves: a Triton and a Headrace must give it the same JSON.

    python oip_script.py HTTP_ADDRESS GRPC_ADDRESS MODEL [NAME:VALUE ...]

Not compared, because each server has its own: words of errors, names of versions, of server and platform, inputs and
outputs beyond those asked for here, labels that a classification's columns may have.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import queue
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

TEXTS = ["refund my money please", "login", "the card", "Größe 🙂", ""]
LONG = "money " * 500_000
"""Takes any server longer than SOON_S, as a rule."""
SOON_S = 0.001
LATE_S = 60.0
TRIES = 50
Step = Callable[["User"], Awaitable[Any]]


class User:
    """One form of the client, called as if it were asyncio's."""

    def __init__(self, form: Any, address: str, model: str, headers: dict[str, str], **options: Any) -> None:
        self.form = form
        self.address = address
        self.model = model
        self.headers = headers
        self.http = form in (tritonclient.http, tritonclient.http.aio)
        self.raw = form.InferenceServerClient(address, **options)

    async def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        # A copy each time: the client leaves its own in it.
        return await settled(getattr(self.raw, method)(*arguments, headers={**self.headers}, **named))

    async def told(self, method: str, *arguments: Any) -> Any:
        """An answer of either wire as JSON has it."""
        found = await self.call(method, *arguments)
        return found if isinstance(found, dict | list) else MessageToDict(found, preserving_proto_field_name=True)

    def texts(self, *texts: str, shape: list[int] | None = None, **how: Any) -> list[Any]:
        given = np.array(texts, object).reshape(shape or [len(texts), 1])
        tensor = self.form.InferInput("text", list(given.shape), "BYTES")
        tensor.set_data_from_numpy(given, **how)
        return [tensor]

    async def infer(self, inputs: list[Any], **named: Any) -> Any:
        return seen(await self.call("infer", named.pop("model", self.model), inputs, **named))

    def wanting(self, *names: str, **how: Any) -> list[Any]:
        return [self.form.InferRequestedOutput(name, **how) for name in names]


async def settled(found: Any) -> Any:
    return await found if inspect.isawaitable(found) else found


def seen(result: Any) -> dict[str, Any]:
    """Of an answer."""
    told = result.get_response()
    told = told if isinstance(told, dict) else MessageToDict(told, preserving_proto_field_name=True)
    scores, labels = result.as_numpy("scores"), result.as_numpy("label")
    return {
        "id": told.get("id", ""),
        "scores": None if scores is None else scores.astype(float).tolist(),
        "datatype": None if scores is None else str(scores.dtype),
        "labels": None if labels is None else [as_text(it) for it in labels[:, 0]],
    }


def as_text(label: Any) -> str:
    return label.decode() if isinstance(label, bytes) else str(label)


def described(tensors: list[dict[str, Any]], kind: str, shape: str) -> dict[str, Any]:
    """Of those that this script knows."""
    known = {it["name"]: it for it in tensors if it["name"] in ("text", "input_ids", "scores", "logits", "label")}
    sizes = {name: [*map(int, it[shape])] for name, it in known.items()}
    return {name: [it[kind], *sizes[name]] for name, it in known.items()}


# ---- what there is


async def live(user: User) -> Any:
    return [await user.call("is_server_live"), await user.call("is_server_ready")]


async def ready(user: User) -> Any:
    return [await user.call("is_model_ready", user.model), await user.call("is_model_ready", user.model, "1")]


async def nobody_ready(user: User) -> Any:
    return await user.call("is_model_ready", "nobody")


async def server(user: User) -> Any:
    found = await user.told("get_server_metadata")
    needed = {"binary_tensor_data", "classification", "parameters", "model_configuration", "statistics"}
    return [bool(found["name"]), bool(found["version"]), sorted(needed & {*found["extensions"]})]


async def metadata(user: User) -> Any:
    found = await user.told("get_model_metadata", user.model)
    inputs, outputs = (described(found[side], "datatype", "shape") for side in ("inputs", "outputs"))
    return [found["name"] == user.model, len(found["versions"]), bool(found["platform"]), inputs, outputs]


async def config(user: User) -> Any:
    found = await user.told("get_model_config", user.model)
    found = found.get("config", found)
    kinds = {it["name"]: it["data_type"] for it in [*found["input"], *found["output"]]}
    optional = sorted(it["name"] for it in found["input"] if it.get("optional"))
    told = {name: kinds[name] for name in ("text", "input_ids", "scores", "label")}
    return [found["name"] == user.model, told, optional]


async def index(user: User) -> Any:
    found = await user.told("get_model_repository_index")
    models = found if isinstance(found, list) else found["models"]
    return [it["state"] for it in models if it["name"] == user.model]


async def statistics(user: User) -> Any:
    """What two calls of three texts add."""
    before = await counted(user)
    for _ in range(2):
        await user.infer(user.texts("login", "card", "refund"))
    after = await counted(user)
    return {name: after[name] - before[name] for name in before}


async def counted(user: User) -> dict[str, int]:
    """Once it stands still: calls that their callers have left may go on for a moment."""
    before: dict[str, int] = {}
    async with asyncio.timeout(LATE_S):
        while (now := await counts(user)) != before:
            before = now
            await asyncio.sleep(0.2)
    return now


async def counts(user: User) -> dict[str, int]:
    (found,) = (await user.told("get_inference_statistics", user.model))["model_stats"]
    success = found["inference_stats"].get("success", {})
    return {"inferences": int(found.get("inference_count", 0)), "calls": int(success.get("count", 0))}


# ---- what is computed


async def infer(user: User) -> Any:
    return await user.infer(user.texts(*TEXTS), request_id="7")


async def version(user: User) -> Any:
    return await user.infer(user.texts(*TEXTS), model_version="1")


async def ids(user: User) -> Any:
    inputs = []
    for name, given in (("input_ids", [[2, 4, 8, 3], [2, 6, 3, 0]]), ("attention_mask", [[1] * 4, [1, 1, 1, 0]])):
        tensor = user.form.InferInput(name, [2, 4], "INT64")
        tensor.set_data_from_numpy(np.array(given, np.int64))
        inputs.append(tensor)
    return await user.infer(inputs)


async def in_json(user: User) -> Any:
    """Both ways; over gRPC, which has no JSON, as ever."""
    how = {"binary_data": False} if user.http else {}
    return await user.infer(user.texts(*TEXTS, **how), outputs=user.wanting("scores", "label", **how))


async def requested(user: User) -> Any:
    return await user.infer(user.texts(*TEXTS), outputs=user.wanting("label"))


async def best(user: User) -> Any:
    """The classification extension: the best two classes of each row."""
    result = await user.call("infer", user.model, user.texts(*TEXTS), outputs=user.wanting("scores", class_count=2))
    found = [as_text(it).split(":") for it in result.as_numpy("scores").flat]
    return [result.as_numpy("scores").shape, [[float(score), column] for score, column, *_label in found]]


async def compressed(user: User) -> Any:
    if not user.http:
        return await user.infer(user.texts(*TEXTS), compression_algorithm="gzip")
    how = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}
    return await user.infer(user.texts(*TEXTS), **how)


async def parameters(user: User) -> Any:
    """That ask for nothing a model without a queue policy or sequences does."""
    return await user.infer(user.texts(*TEXTS), timeout=60_000_000, priority=0)


# ---- what is wrong


async def no_such_model(user: User) -> Any:
    return await user.infer(user.texts("login"), model="nobody")


async def no_such_version(user: User) -> Any:
    return await user.infer(user.texts("login"), model_version="99")


async def no_such_output(user: User) -> Any:
    return await user.infer(user.texts("login"), outputs=user.wanting("nobody"))


async def no_such_input(user: User) -> Any:
    tensor = user.form.InferInput("nobody", [1, 1], "INT64")
    tensor.set_data_from_numpy(np.ones((1, 1), np.int64))
    return await user.infer([tensor])


async def no_metadata(user: User) -> Any:
    return await user.told("get_model_metadata", "nobody")


async def missing(user: User) -> Any:
    return await user.infer((await two(user))[:1])


async def ragged(user: User) -> Any:
    """Two inputs of one call that do not belong together."""
    return await user.infer(await two(user))


async def two(user: User) -> list[Any]:
    inputs = []
    for name, columns in (("input_ids", 4), ("attention_mask", 3)):
        tensor = user.form.InferInput(name, [1, columns], "INT64")
        tensor.set_data_from_numpy(np.ones((1, columns), np.int64))
        inputs.append(tensor)
    return inputs


async def wrong_shape(user: User) -> Any:
    return await user.infer(user.texts("a", "b", "c", "d", shape=[1, 2, 2]))


async def wrong_datatype(user: User) -> Any:
    tensor = user.form.InferInput("text", [1, 1], "INT64")
    tensor.set_data_from_numpy(np.ones((1, 1), np.int64))
    return await user.infer([tensor])


# ---- what takes too long, or is given up


async def late(user: User) -> Any:
    """The caller's own clock ends it, and the server goes on."""
    return await first(user, leave_late)


async def cancelled(user: User) -> Any:
    """Given up by its caller, whom the server still serves."""
    return await first(user, cancel)


async def first(user: User, leave: Step) -> Any:
    """What leaving early ends in. An answer may be there before; then once more."""
    for _ in range(TRIES):
        if (ended := await leave(user)) is not None:
            return [ended, await user.infer(user.texts("login"))]
    return "always in time"


async def leave_late(user: User) -> Any:
    if not user.http:
        try:
            await user.infer(user.texts(LONG), client_timeout=SOON_S)
        except InferenceServerException as error:
            return error.status()
        return None
    limit = {"conn_timeout": SOON_S} if user.form is tritonclient.http.aio else {"network_timeout": SOON_S}
    hasty = User(user.form, user.address, user.model, user.headers, **limit)
    try:
        await hasty.infer(user.texts(LONG))
    except (TimeoutError, InferenceServerException):
        return "late"
    finally:
        await settled(hasty.raw.close())
    return None


async def cancel(user: User) -> Any:
    if user.form is tritonclient.http:
        return "this client cannot"
    if user.form is tritonclient.grpc:
        ended: queue.Queue[Any] = queue.Queue()
        call = user.raw.async_infer(
            user.model, user.texts(LONG), lambda result, error: ended.put(error), headers=user.headers
        )
        call.cancel()
        fault = await asyncio.to_thread(ended.get, timeout=LATE_S)
        return None if fault is None else fault.status()
    task = asyncio.ensure_future(user.infer(user.texts(LONG)))
    await asyncio.sleep(SOON_S)
    task.cancel()
    (found,) = await asyncio.gather(task, return_exceptions=True)
    return type(found).__name__ if isinstance(found, BaseException) else None


# ---- streams


async def stream(user: User) -> Any:
    """Two good requests around a bad one, on one stream."""
    asked = [
        (user.model, user.texts("login"), "1"),
        ("nobody", user.texts("card"), "2"),
        (user.model, user.texts("card"), "3"),
    ]
    return [told(result, error) for result, error in await streamed(user, asked)]


def told(result: Any, error: Any) -> Any:
    if error is not None:
        return ["fault", error.status()]
    return seen(result) | {"last": result.get_response().parameters["triton_final_response"].bool_param}


async def streamed(user: User, asked: list[tuple[str, list[Any], str]]) -> list[tuple[Any, Any]]:
    if user.form is tritonclient.grpc:
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        user.raw.start_stream(lambda result, error: arrived.put((result, error)), headers=user.headers)
        found = []
        for model, inputs, id in asked:
            user.raw.async_stream_infer(model, inputs, request_id=id)
            found.append(await asyncio.to_thread(arrived.get, timeout=LATE_S))
        user.raw.stop_stream()
        return found
    answered = asyncio.Event()

    async def ask() -> AsyncIterator[dict[str, Any]]:
        for model, inputs, id in asked:
            yield {"model_name": model, "inputs": inputs, "request_id": id}
            await answered.wait()
            answered.clear()

    found = []
    async with asyncio.timeout(LATE_S):
        async for it in user.raw.stream_infer(ask(), headers=user.headers):
            found.append(it)
            answered.set()
    return found


BOTH: tuple[Step, ...] = (
    *(live, ready, nobody_ready, server, metadata, config, index, statistics),
    *(infer, version, ids, in_json, requested, best, compressed, parameters),
    *(no_such_model, no_such_version, no_such_output, no_such_input, no_metadata),
    *(missing, ragged, wrong_shape, wrong_datatype, late, cancelled, infer),
)
FORMS: dict[str, tuple[Any, tuple[Step, ...]]] = {
    "http": (tritonclient.http, BOTH),
    "http.aio": (tritonclient.http.aio, BOTH),
    "grpc": (tritonclient.grpc, (*BOTH, stream)),
    "grpc.aio": (tritonclient.grpc.aio, (*BOTH, stream)),
}


def healthy(address: str) -> Any:
    """As a load balancer asks, without a key."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        services = ("", "inference.GRPCInferenceService")
        return [stub.Check(health_pb2.HealthCheckRequest(service=it), timeout=LATE_S).status for it in services]


async def outcome(step: Step, user: User) -> Any:
    try:
        return await step(user)
    except InferenceServerException as error:
        return {"fault": error.status(), "says something": len(error.message()) > 10}


async def report(http: str, rpc: str, model: str, headers: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"health": healthy(rpc)}
    for name, (form, steps) in FORMS.items():
        user = User(form, rpc if "grpc" in name else http, model, headers)
        try:
            found |= {f"{name}: {step.__name__}": await outcome(step, user) for step in steps}
        finally:
            await settled(user.raw.close())
    return found


if __name__ == "__main__":
    http, rpc, model, *headers = sys.argv[1:]
    print(json.dumps(asyncio.run(report(http, rpc, model, dict(it.split(":", 1) for it in headers)))))
