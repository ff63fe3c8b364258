"""A gateway with a defect, for a test that must find it: it keeps a kibibyte of every call."""

from __future__ import annotations

from gateway.__main__ import main
from gateway.call import Call
from gateway.meter import Answer, Client
from gateway.pipeline import Pipeline

run = Pipeline.run
kept: list[bytearray] = []


async def hoard(self: Pipeline, call: Call, client: Client) -> Answer:
    kept.append(bytearray(1024))
    return await run(self, call, client)


if __name__ == "__main__":
    Pipeline.run = hoard  # type: ignore[method-assign]
    main()
