"""What every runtime keeps, whatever it runs: see runtimes/contract.py."""

import asyncio
import json
import math
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from runtimes import Spec, specs
from runtimes.artifact import Shelf
from runtimes.contract import (
    Exchange,
    Expired,
    Generator,
    InferRequest,
    Load,
    Overloaded,
    Predictor,
    Reply,
    Runtime,
    RuntimeFault,
    Site,
    Unavailable,
)
from runtimes.echo import Echo
from runtimes.onnx import Onnx
from tests import tiny
from tests.fakes import FakeClock, until

IDLE = Load(running=0, waiting=0)
NEVER_S, LONG_AGO_S = math.inf, 0.0
SECRET = "xyzzy-plugh"

GENERATORS = ["echo"]
PREDICTORS = ["onnx"]


@pytest.fixture
def clock() -> FakeClock:
    """Paces what answers. What relays it runs on the machine's own clock."""
    return FakeClock()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    shelf = Shelf(tmp_path / "shelf")
    (tmp_path / "folder").mkdir()
    tiny.publish(shelf, tmp_path / "folder")
    return Site(model="chat", replica="chat-0", state=tmp_path, shelf=shelf)


@asynccontextmanager
async def built(kind: str, site: Site, clock: FakeClock, *, first_token_s: float = 0, token_s: float = 0) -> Any:
    """A runtime of this kind, not yet open; where the kind allows it, with a pace."""
    echo = Echo(first_token_s=first_token_s, token_s=token_s).build(site, clock=clock)
    match kind:
        case "echo":
            yield echo
        case "onnx":
            yield Onnx(artifact="tiny").build(site)
