"""The data listener's doors, told apart by the path: OpenAI's API, and the Open Inference Protocol's under `/v2`."""

from __future__ import annotations

from gateway.edge.request import Door, Handler, Request, speaks_v2


class Front:
    def __init__(self, *, openai: Door, kserve: Door) -> None:
        self.openai = openai
        self.kserve = kserve

    def enter(self, request: Request) -> Handler:
        return (self.kserve if speaks_v2(request.path) else self.openai).enter(request)
