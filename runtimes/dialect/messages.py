"""The messages of `inference.proto` and `health.proto`, as classes.

They live in a pool of their own. In protobuf's default pool a name exists once in a process, and the stock client,
whose messages have the same names, could not be imported beside these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass


def _classes(compiled: bytes) -> dict[str, Any]:
    pool = DescriptorPool()
    found: dict[str, Any] = {}
    for file in FileDescriptorSet.FromString(compiled).file:
        pool.Add(file)
        messages = pool.FindFileByName(file.name).message_types_by_name
        found |= {name: GetMessageClass(descriptor) for name, descriptor in messages.items()}
    return found


_FOUND = _classes((Path(__file__).parent / "messages.binpb").read_bytes())

ModelInferRequest = _FOUND["ModelInferRequest"]
ModelInferResponse = _FOUND["ModelInferResponse"]
ModelStreamInferResponse = _FOUND["ModelStreamInferResponse"]
ServerLiveResponse = _FOUND["ServerLiveResponse"]
ServerReadyResponse = _FOUND["ServerReadyResponse"]
ServerMetadataResponse = _FOUND["ServerMetadataResponse"]
ModelReadyRequest = _FOUND["ModelReadyRequest"]
ModelReadyResponse = _FOUND["ModelReadyResponse"]
ModelMetadataRequest = _FOUND["ModelMetadataRequest"]
ModelMetadataResponse = _FOUND["ModelMetadataResponse"]
ModelConfigRequest = _FOUND["ModelConfigRequest"]
ModelConfigResponse = _FOUND["ModelConfigResponse"]
ModelStatisticsRequest = _FOUND["ModelStatisticsRequest"]
ModelStatisticsResponse = _FOUND["ModelStatisticsResponse"]
RepositoryIndexRequest = _FOUND["RepositoryIndexRequest"]
RepositoryIndexResponse = _FOUND["RepositoryIndexResponse"]

HealthCheckRequest = _FOUND["HealthCheckRequest"]
HealthCheckResponse = _FOUND["HealthCheckResponse"]
