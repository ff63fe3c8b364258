"""The messages of gRPC: compiled from what is written down, and the same that everybody else has."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

import runtimes.dialect

FOLDER = Path(runtimes.dialect.__file__).parent
COMPILED = FileDescriptorSet.FromString((FOLDER / "messages.binpb").read_bytes())


def test_they_are_compiled_from_what_is_written(tmp_path: Path) -> None:
    made = tmp_path / "made.binpb"
    protos = ["inference.proto", "health.proto"]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--descriptor_set_out={made}", *protos]
    run(command, check=True, timeout=60)
    assert FileDescriptorSet.FromString(made.read_bytes()) == COMPILED, "`make proto` makes them again"


STOCK: dict[str, Any] = {
    name: descriptor
    for module in (service_pb2, model_config_pb2, health_pb2)
    for name, descriptor in module.DESCRIPTOR.message_types_by_name.items()
}
OWN = {message.name: message for file in COMPILED.file for message in file.message_type}


@pytest.mark.parametrize("name", OWN)
def test_every_field_has_the_number_and_type_that_the_protocol_gives_it(name: str) -> None:
    def require(own: Any, stock: Any) -> None:
        known = {field.name: field for field in stock.fields}
        for field in own.field:
            assert (field.number, field.type) == (known[field.name].number, known[field.name].type), field.name
            assert (field.label == field.LABEL_REPEATED) is known[field.name].is_repeated, field.name
        for nested in own.nested_type:
            require(nested, stock.nested_types_by_name[nested.name])

    require(OWN[name], STOCK[name])
