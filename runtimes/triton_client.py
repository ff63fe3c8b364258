"""One model of one Triton over gRPC: arrays in, arrays out, and the server's errors in our words."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from runtimes.contract import (
    Datatype,
    Expired,
    Failed,
    InferReply,
    InferRequest,
    Invalid,
    Overloaded,
    RuntimeFault,
    Tensor,
    Unavailable,
)
from runtimes.dialect import messages, tensors
from runtimes.dialect.elements import Part
from runtimes.rpc.call import RpcError
from runtimes.rpc.channel import Address, Channel, trusting_the_system
from runtimes.rpc.status import Status
from runtimes.triton_command import PARAMETER, REFUSAL, TOKENS, Served

if TYPE_CHECKING:
    from runtimes.contract import Array

SERVICE = "/inference.GRPCInferenceService/"
MESSAGE_BYTES_MAX = 64 << 20
"""Of one message in either direction. Token ids take up to four times as much here as in a client's JSON."""
PROBE_S_MAX = 5.0
TRANSPORT = frozenset({"binary_data_output", "triton_enable_empty_final_response"})
"""Parameters about the wire that a request came by, which is not the one to the server."""
SEQUENCE = "sequence_id"
"""Of Triton's sequence extension: which requests follow each other, whose model may remember them."""
NEEDED = {"classify": "scores", "embed": "embedding"}
"""Task → the output without which it is none: [rows, labels], and [rows, width]."""
SAID_CHARS_MAX = 500
"""Of what a server says is wrong with a request."""


class Described(msgspec.Struct, frozen=True):
    """What a model is, by its server's metadata and configuration."""

    task: str
    labels: tuple[str, ...]
    thresholds: Mapping[str, float]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    platform: str
    version: str
    versions: tuple[str, ...]
    """Of a model that is not ours: those that its server answers with, the newest last."""
    rows_max: int
    """That one request may have; 0 for a model without batches, whose first axis may be anything."""
    columns: frozenset[str]
    """Tensors that have a last axis of 1 on the wire, and to nobody else."""
    counts_tokens: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(it.name for it in (*self.inputs, *self.outputs))


class Client:
    """Safe to use concurrently, in the event loop that made it. Calls that are left are cancelled where they run."""

    def __init__(
        self, url: str, model: str, version: str, *, replica: str, metadata: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        self._replica = replica
        self._name = {"name": model, "version": version}
        self._model = {"model_name": model, "model_version": version}
        self._channel = channel = Channel(_address(url), bytes_max=MESSAGE_BYTES_MAX, metadata=metadata)
        self._infer = _Method(channel, "ModelInfer", messages.ModelInferResponse)
        self._ready = _Method(channel, "ModelReady", messages.ModelReadyResponse)
        self._tell = _Method(channel, "ModelMetadata", messages.ModelMetadataResponse)
        self._config = _Method(channel, "ModelConfig", messages.ModelConfigResponse)

    async def infer(
        self, model: Described, request: InferRequest, left_s: Callable[[float], float | None]
    ) -> InferReply:
        """A request of more rows than the model takes goes in pieces, one after the other, so that a long one does not
        hold up the short ones. `left_s` says what is left until a deadline."""
        inputs = fitted(model, request.inputs, self._replica)
        wanted = request.outputs and (*request.outputs, *([TOKENS] if model.counts_tokens else ()))
        parts: list[dict[str, Array]] = []
        version = ""
        for piece in pieces(inputs, model.rows_max):
            message = self._empty(model, request)
            for name in wanted:
                output = message.outputs.add(name=name)
                if name in request.classes:
                    output.parameters["classification"].int64_param = request.classes[name]
            for name, (datatype, array) in piece.items():
                message.inputs.add(name=name, datatype=datatype, shape=array.shape)
                message.raw_input_contents.append(packed(name, datatype, array))
            if message.ByteSize() > MESSAGE_BYTES_MAX:
                raise Invalid(f"the inputs take {message.ByteSize()} bytes; {MESSAGE_BYTES_MAX} go at once")
            # One model for all of it, whatever is published meanwhile.
            message.model_version = version or message.model_version
            answer = await self._call(
                self._infer, message, left_s(request.deadline_s), (*model.names, *request.outputs)
            )
            version = answer.model_version if model.versions else ""
            parts.append(self._arrays(answer))
            self._require_sound(model, request, piece, parts[-1])
        outputs = self._joined(parts)
        for name in model.columns & outputs.keys():
            outputs[name] = outputs[name].reshape(outputs[name].shape[:-1])
        if "label" in outputs:
            outputs["label"] = _strings(outputs["label"])
        tokens_in = int(outputs.pop(TOKENS).sum()) if model.counts_tokens else 0
        return InferReply(outputs, tokens_in, version=version)

    async def ready(self) -> None:
        """Return if the model would answer now, else raise Unavailable."""
        answer = await self._ask(self._ready, messages.ModelReadyRequest(**self._name))
        if not answer.ready:
            raise Unavailable(f"{self._replica}: its server answers, but does not have the model ready")

    async def describe(self, *, task: str, labels: tuple[str, ...]) -> Described:
        """Ask what the model is. `task` and `labels` are for one that does not say."""
        metadata, config = await asyncio.gather(
            self._ask(self._tell, messages.ModelMetadataRequest(**self._name)),
            self._ask(self._config, messages.ModelConfigRequest(**self._name)),
        )
        try:
            found = described(metadata, config.config, task=task, labels=labels)
        except ValueError as error:
            raise Unavailable(f"{self._replica}: {error}") from None
        needed = NEEDED.get(found.task)
        if needed and needed not in {it.name for it in found.outputs}:
            raise Unavailable(f"{self._replica} cannot {found.task}: its model has no output `{needed}`")
        return found

    async def aclose(self) -> None:
        await self._channel.aclose()

    def _empty(self, model: Described, request: InferRequest) -> Any:
        """A message with all that is said beside its tensors. To ours that means nothing, and Triton's own times and
        priorities would hold up others."""
        message = messages.ModelInferRequest(**self._model)
        if not model.versions:
            return message
        message.id = request.id
        message.model_version = request.version or message.model_version
        for name, value in request.parameters.items():
            if name not in TRANSPORT:
                value = _own(value, request.flow) if name == SEQUENCE else value
                try:
                    setattr(message.parameters[name], _choice(value), value)
                except ValueError:
                    raise Invalid(f"the parameter `{name}` is beyond 64 bits", param="parameters") from None
        return message

    def _require_sound(
        self, model: Described, request: InferRequest, piece: Fitted, outputs: Mapping[str, Array]
    ) -> None:
        """Raise Failed unless the output that the model's task is about, if it is wanted, is one for each row."""
        name = NEEDED.get(model.task)
        if name is None or name in request.classes or (request.outputs and name not in request.outputs):
            return
        rows = len(next(iter(piece.values()))[1])
        shape: tuple[int, ...] = outputs[name].shape if name in outputs else ()
        if len(shape) != 2 or shape[0] != rows or (model.labels and shape[1] != len(model.labels)):
            wants = f"{rows} rows" + (f" and {len(model.labels)} labels" if model.labels else "")
            said = f"its `{name}` has the shape {list(shape)}, for {wants}" if shape else f"it gave no `{name}`"
            raise Failed(f"{self._replica}: of its model, {said}", said)

    def _joined(self, parts: list[dict[str, Array]]) -> dict[str, Array]:
        """Raises Failed if they do not go together."""
        if len(parts) == 1:
            return parts[0]
        try:
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        except (KeyError, ValueError):
            said = "it gave other outputs to one part of the rows than to another"
            raise Failed(f"{self._replica}: of its model, {said}", said) from None

    async def _ask(self, method: _Method, message: Any) -> Any:
        try:
            return await self._call(method, message, PROBE_S_MAX)
        except Expired:
            raise Unavailable(f"{self._replica} did not answer a probe within {PROBE_S_MAX:g} s") from None
        except RuntimeFault as fault:
            raise Unavailable(str(fault)) from None

    async def _call(self, method: _Method, message: Any, timeout_s: float | None, names: Iterable[str] = ()) -> Any:
        try:
            return await method.ask(message, timeout_s)
        except RpcError as error:
            fault = fault_of(error.status, error.said, self._replica, names, broken=error.broken)
        except DecodeError:
            fault = Unavailable(f"{self._replica}: its server's answer cannot be read")
        # Outside of the clause: what the server said may quote the call, and would go along as the context.
        raise fault

    def _arrays(self, answer: Any) -> dict[str, Array]:
        try:
            parts = [
                Part(it.name, it.datatype, tuple(it.shape), raw)
                for it, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
            ]
            return {part.name: tensors.array(part) for part in parts}
        except (ValueError, Invalid):
            raise Unavailable(f"{self._replica}: its server's answer cannot be read") from None


# ---- what a model is ---------------------------------------------------------------------------------------


def described(metadata: Any, config: Any, *, task: str, labels: tuple[str, ...]) -> Described:
    """Raises ValueError for a model that Headrace has no types for."""
    ours = None
    if PARAMETER in config.parameters:
        ours = msgspec.json.decode(config.parameters[PARAMETER].string_value, type=Served)
    columns = frozenset(it.name for it in (*config.input, *config.output) if it.HasField("reshape")) if ours else ()
    if config.model_transaction_policy.decoupled:
        raise ValueError("its model is decoupled, with any number of answers to a request; Headrace passes on one")
    versions = tuple(sorted(metadata.versions, key=lambda it: (len(it), it))) or ("1",)
    optional = {it.name for it in config.input if it.optional}
    outputs = tuple(_tensor(it, columns) for it in metadata.outputs if not (ours and it.name == TOKENS))
    return Described(
        task=ours.task if ours else task,
        labels=ours.labels if ours else labels,
        thresholds=ours.thresholds if ours else {},
        inputs=tuple(_tensor(it, columns, optional=it.name in optional) for it in metadata.inputs),
        outputs=outputs,
        platform=metadata.platform,
        version=ours.version if ours else versions[-1],
        versions=() if ours else versions,
        rows_max=config.max_batch_size,
        columns=frozenset(columns),
        counts_tokens=ours is not None and len(outputs) < len(metadata.outputs),
    )


def _own(sequence: bool | int | float | str, flow: str) -> int | str:
    """A sequence's name that no other flow can choose: what a model remembers is for whom it came from. 0 and "" stand
    for none. Raises Invalid for what is no name to Triton either."""
    if type(sequence) is not str and not (type(sequence) is int and 0 <= sequence < 1 << 64):
        raise Invalid(f"`{SEQUENCE}` must be a string, or a whole number of up to 64 bits", param=SEQUENCE)
    if not sequence:
        return sequence
    digest = hashlib.sha256(msgspec.json.encode([flow, sequence])).digest()
    return digest.hex() if isinstance(sequence, str) else int.from_bytes(digest[:8]) >> 1 or 1


def _choice(value: bool | int | float | str) -> str:
    """Where protobuf has such a parameter."""
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    return "uint64_param" if type(value) is int and value >= 1 << 63 else kinds[type(value)]


def _tensor(said: Any, columns: Iterable[str], *, optional: bool = False) -> Tensor:
    if said.datatype not in tensors.DTYPES:
        raise ValueError(f"`{said.name}` holds {said.datatype}, which Headrace cannot pass on")
    shape, column = tuple(said.shape), said.name in columns
    return Tensor(said.name, said.datatype, shape[:-1] if column else shape, column, optional)


# ---- arrays on the wire ------------------------------------------------------------------------------------

Fitted = dict[str, tuple[Datatype, "Array"]]


def fitted(model: Described, inputs: Mapping[str, Array], who: str) -> Fitted:
    """The arrays as the server wants them. Raises Invalid, naming the input, for what it could only refuse."""
    known = {it.name: it for it in model.inputs}
    found: Fitted = {}
    for name, array in inputs.items():
        if name not in known:
            raise Invalid(f"{who} has no input `{name}`; it takes {', '.join(known)}", param=name)
        tensor = known[name]
        dtype = tensors.DTYPES[tensor.datatype]
        if not np.can_cast(array.dtype, dtype, "safe") or (tensor.datatype == "BYTES") != (array.dtype == object):
            raise Invalid(f"`{name}` must hold {tensor.datatype}; got {array.dtype}", param=name)
        if array.dtype == object and not all(isinstance(it, str | bytes) for it in array.flat):
            raise Invalid(f"`{name}` must hold nothing but strings", param=name)
        if array.ndim == 1 and len(tensor.shape) == 2 and tensor.shape[1] == 1:
            array = array.reshape(-1, 1)
        if array.ndim != len(tensor.shape) or any(
            size not in (given, -1) for size, given in zip(tensor.shape, array.shape, strict=True)
        ):
            raise Invalid(f"`{name}` must have the shape {list(tensor.shape)}; got {list(array.shape)}", param=name)
        if name in model.columns:
            array = array.reshape(*array.shape, 1)
        found[name] = (tensor.datatype, array.astype(dtype, copy=False))
    if not found and not (model.versions and all(it.optional for it in model.inputs)):  # ours takes one or the other
        raise Invalid(f"{who} was given no input; it takes {', '.join(known)}")
    if model.rows_max and found:
        rows = {len(array) for _, array in found.values()}
        if len(rows) > 1 or 0 in rows:
            raise Invalid(f"{', '.join(f'`{name}`' for name in found)} must have rows, and all as many")
    return found


def pieces(inputs: Fitted, rows_max: int) -> Iterator[Fitted]:
    """The same rows in parts that the model takes at once."""
    if not rows_max or not inputs:
        yield inputs
        return
    rows = len(next(iter(inputs.values()))[1])
    for start in range(0, rows, rows_max):
        yield {name: (datatype, array[start : start + rows_max]) for name, (datatype, array) in inputs.items()}


def packed(name: str, datatype: Datatype, array: Array) -> bytes:
    try:
        return tensors.raw(array, datatype)
    except UnicodeEncodeError:
        raise Invalid(f"`{name}` holds text that UTF-8 cannot express", param=name) from None


def _strings(array: Array) -> Array:
    found = np.empty(array.size, object)
    found[:] = [it.decode(errors="replace") for it in array.flat]
    return found.reshape(array.shape)


# ---- gRPC --------------------------------------------------------------------------------------------------


def fault_of(status: Status, said: str, who: str, names: Iterable[str] = (), *, broken: bool = False) -> RuntimeFault:
    """The server's words are passed on only where they are about the request, to whoever made it. Of a call that is
    `broken` the words are ours."""
    match status:
        case Status.INVALID_ARGUMENT:
            said = said.removeprefix("[request id: <id_unknown>] ")[:SAID_CHARS_MAX]
            if said.startswith(REFUSAL):
                param, _, said = said.removeprefix(REFUSAL).partition(" ")
                return Invalid(said, param=param or None)
            quoted = re.findall(r"['\"`]([^'\"`]+)['\"`]", said.rpartition("missing")[2])
            return Invalid(said, param=next((name for name in quoted if name in names), None))
        case Status.DEADLINE_EXCEEDED:
            return Expired(f"{who} did not finish before the call's deadline")
        case Status.RESOURCE_EXHAUSTED:
            return Overloaded(f"{who}: its server takes no more at the moment")
        case Status.UNAVAILABLE if broken:
            return Unavailable(f"{who}: its connection broke amid the call: {said}")
        case Status.UNAVAILABLE:
            return Unavailable(f"{who}: its server cannot be reached, or does not have the model ready")
        case Status.NOT_FOUND:
            return Unavailable(f"{who}: its server knows no such model, or no such version of it")
        case Status.UNAUTHENTICATED | Status.PERMISSION_DENIED:
            return Unavailable(f"{who}: its server refused the gateway's own credentials; see `key_env`")
        case _:
            # Behind the first line a model in Python says where in its code it failed, which is nobody's business.
            return Failed(
                f"{who}: its server failed ({status.name})",
                said.partition("\n")[0][:SAID_CHARS_MAX] or "no reason is given",
            )


class _Method:
    def __init__(self, channel: Channel, name: str, response: Any) -> None:
        self._channel = channel
        self._begin = channel.method(SERVICE + name)
        self._response = response

    async def ask(self, message: Any, timeout_s: float | None) -> Any:
        answer = await self._channel.ask(self._begin, message.SerializeToString(), timeout_s=timeout_s)
        return self._response.FromString(bytes(answer))


def _address(url: str) -> Address:
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        return Address(path=rest)
    parts = urlsplit(url)
    if scheme == "grpc":
        return Address(parts.hostname or "", parts.port or 8001)
    return Address(parts.hostname or "", parts.port or 443, tls=trusting_the_system())
