"""What the Open Inference Protocol's gRPC is told from the catalogue: a message in, a message out, nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf.message import DecodeError

from gateway.call import Principal
from gateway.edge.catalogue import Catalogue
from gateway.errors import BadRequest, NotFound
from runtimes.dialect import messages
from runtimes.rpc.messages import Body

SERVICE = "inference.GRPCInferenceService"


def live(catalogue: Catalogue) -> bytes:
    return encoded(messages.ServerLiveResponse(live=True))


def ready(catalogue: Catalogue) -> bytes:
    return encoded(messages.ServerReadyResponse(ready=catalogue.ready))


def health(catalogue: Catalogue, body: Body) -> str:
    """A grpc.health.v1 ServingStatus. Raises BadRequest."""
    if decoded(messages.HealthCheckRequest, body).service not in ("", SERVICE):
        return "SERVICE_UNKNOWN"
    return "SERVING" if catalogue.ready else "NOT_SERVING"


def _server_metadata(catalogue: Catalogue, principal: Principal, body: Body) -> bytes:
    return encoded(messages.ServerMetadataResponse(**catalogue.server()))


def _model_ready(catalogue: Catalogue, principal: Principal, body: Body) -> bytes:
    asked = decoded(messages.ModelReadyRequest, body)
    try:
        up = catalogue.model_ready(asked.name, asked.version, principal)
    except NotFound:
        up = False  # Triton's answer for what it does not know, over gRPC; over HTTP its status tells as much
    return encoded(messages.ModelReadyResponse(ready=up))


def _model_metadata(catalogue: Catalogue, principal: Principal, body: Body) -> bytes:
    asked = decoded(messages.ModelMetadataRequest, body)
    return encoded(messages.ModelMetadataResponse(**catalogue.metadata(asked.name, asked.version, principal)))


def _model_config(catalogue: Catalogue, principal: Principal, body: Body) -> bytes:
    asked = decoded(messages.ModelConfigRequest, body)
    return encoded(messages.ModelConfigResponse(config=catalogue.config(asked.name, asked.version, principal)))


def _model_statistics(catalogue: Catalogue, principal: Principal, body: Body) -> bytes:
    asked = decoded(messages.ModelStatisticsRequest, body)
    found = catalogue.statistics(asked.name, asked.version, principal)
    return encoded(messages.ModelStatisticsResponse(model_stats=found))


def _repository_index(catalogue: Catalogue, principal: Principal, body: Body) -> bytes:
    asked = decoded(messages.RepositoryIndexRequest, body)
    return encoded(messages.RepositoryIndexResponse(models=catalogue.index(principal, ready=asked.ready)))


def _repository_control(catalogue: Catalogue, principal: Principal, body: Body) -> bytes:
    raise catalogue.refuse_control()


ANSWERS: Mapping[str, Callable[[Catalogue, Principal, Body], bytes]] = MappingProxyType(
    {
        f"/{SERVICE}/ServerMetadata": _server_metadata,
        f"/{SERVICE}/ModelReady": _model_ready,
        f"/{SERVICE}/ModelMetadata": _model_metadata,
        f"/{SERVICE}/ModelConfig": _model_config,
        f"/{SERVICE}/ModelStatistics": _model_statistics,
        f"/{SERVICE}/RepositoryIndex": _repository_index,
        f"/{SERVICE}/RepositoryModelLoad": _repository_control,
        f"/{SERVICE}/RepositoryModelUnload": _repository_control,
    }
)
"""Method → what answers it to a caller with a key. Each raises GatewayError."""


def decoded(message: Any, body: Body) -> Any:
    try:
        return message.FromString(bytes(body))  # a long one is a bytearray
    except DecodeError:
        raise BadRequest(f"The message is no {message.DESCRIPTOR.full_name}.") from None


def encoded(message: Any) -> bytes:
    body: bytes = message.SerializeToString()
    return body
