"""A gateway's part behind the Open Inference Protocol's doors, over fakes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gateway.call import Bounds
from gateway.edge.catalogue import Catalogue
from gateway.edge.inference import Inference
from runtimes.clock import SystemClock
from runtimes.contract import InferReply, Unavailable
from tests.fakes import FakeGenerator, FakePredictor, Frame, Script, Stages, a_principal, events, limits

SCORES = np.array([[0.25, 0.75]], np.float32)
BOUNDS = Bounds(body_bytes_max=65_536, json_depth_max=20)


class Parts(NamedTuple):
    stages: Stages
    given: dict[str, Any]
    """What a door is made of."""


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


STREAM = (chunk("he"), chunk("llo", "stop"), b"data: [DONE]\n\n")
WHOLE = Script([json.dumps({"choices": [{"text": "hello", "finish_reason": "stop"}], "usage": {}}).encode()])


@asynccontextmanager
async def parts(folder: Path, *frames: Frame) -> AsyncIterator[Parts]:
    """Models `classifier`, `llm` (which streams `frames`) `team/llm:1`, and others."""
    clock = SystemClock()
    models: dict[str, list[Any]] = {
        "classifier": [
            FakePredictor(task="classify", answer=InferReply({"scores": SCORES}, 3, compute_s=0.25), labels=("a", "b"))
        ],
        "broken": [FakePredictor(task="classify", answer=Unavailable("it is gone"), labels=("a", "b"))],
        "pooling": [FakeGenerator(WHOLE, routes=frozenset({"/v1/embeddings"}))],
        "llm": [FakeGenerator(events(*(frames or STREAM)))],
        "team/llm:1": [FakeGenerator(WHOLE)],
    }
    keys = {
        "good": a_principal(),
        "narrow": a_principal(models=("llm",)),
        "tensors": a_principal(routes=("/v2/*",)),
        "poor": a_principal("poor", tenant_limits=limits(rpm=1)),
    }
    async with Stages(folder, clock, models, keys=keys) as stages:
        catalogue = Catalogue(pipeline=stages.pipeline, version="0")
        inference = Inference(pipeline=stages.pipeline, catalogue=catalogue, clock=clock)
        given = {"pipeline": stages.pipeline, "catalogue": catalogue, "inference": inference}
        yield Parts(stages, given | {"bounds": BOUNDS, "clock": clock})
        assert stages.at_rest()
