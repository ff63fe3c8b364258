"""Spans reach a collector over OTLP, and a collector that is gone costs nothing but spans."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.e2e.servers import GatewayProcess

CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
[trace]
otlp = "http://127.0.0.1:{port}/v1/traces"
[[models]]
name = "echo"
replicas = [{{ kind = "echo" }}]
"""
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "xyzzy"}]}


@pytest.fixture
def collector() -> Iterator[tuple[int, queue.Queue[bytes]]]:
    received: queue.Queue[bytes] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, received
        server.shutdown()


async def test_a_call_s_span_reaches_the_collector(collector: tuple[int, queue.Queue[bytes]], tmp_path: Path) -> None:
    port, received = collector
    gateway = GatewayProcess(tmp_path, CONFIG.format(port=port))
    gateway.start()
    async with gateway.client(gateway.issue().text) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert gateway.stop() == 0  # what was not sent yet is sent on the way out
    request = ExportTraceServiceRequest.FromString(received.get(timeout=10))
    names = {span.name for part in request.resource_spans for scope in part.scope_spans for span in scope.spans}
    assert names == {"chat echo", "engine echo-0"}
    assert "xyzzy" not in str(request)


async def test_a_collector_that_is_gone_costs_no_call(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, CONFIG.format(port=9))
    gateway.start()
    async with gateway.client(gateway.issue().text) as client:
        for _ in range(5):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert gateway.stop() == 0
