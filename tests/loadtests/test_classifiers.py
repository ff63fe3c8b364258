"""Each door to a classifier, in turn: what the command takes, and that all of them are measured."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from loadtests.classifiers import LAPS, Raw, _raw, _shares
from loadtests.grpc_client import infer_request
from loadtests.scenario import load
from tests.loadtests.test_command import command


def test_a_histogram_becomes_shares_of_what_was_added() -> None:
    assert list(_shares({1.0: 2, 8.0: 4, float("inf"): 4})) == [(1.0, 0.5), (8.0, 1.0)]
    assert list(_shares({1.0: 0, float("inf"): 0})) == []


def test_a_text_goes_as_triton_s_clients_send_it() -> None:
    from tritonclient.grpc import service_pb2

    sent = service_pb2.ModelInferRequest.FromString(infer_request("intent", "é"))
    assert (sent.model_name, sent.inputs[0].shape, sent.raw_input_contents[0]) == (
        "intent",
        [1, 1],
        b"\x02\0\0\0\xc3\xa9",
    )


async def test_without_an_artifact_it_says_how_to_come_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path))
    status, _, errors = await command("classifiers")
    assert status == 1
    assert "support-intent@stable" in errors
    assert "make serve" in errors


async def test_the_bare_runtime_ends_with_who_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = asyncio.create_subprocess_exec, asyncio.get_running_loop().create_future()

    async def starting(*command: str, **how: Any) -> asyncio.subprocess.Process:
        started.set_result(await start(*command, **how))
        return await started

    monkeypatch.setattr(asyncio, "create_subprocess_exec", starting)
    [plan] = load("classify", ("callers_each=[1]",)).steps("classify").values()
    measuring = asyncio.create_task(_raw(Raw("raw", "", rows=1), plan, "classify", tmp_path))
    child = await started
    measuring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await measuring
    assert child.returncode == -signal.SIGKILL


@pytest.mark.engine
async def test_every_door_is_measured_beside_its_runtime_and_beside_triton(tmp_path: Path) -> None:
    kept = tmp_path / "classifiers.json"
    short = ("--set", "callers_each=[2]", "--set", "duration_s=0.3", "--set", "warmup_s=0.1", "--repeat", "1")
    status, shown, errors = await command("classifiers", *short, "--json", str(kept))
    assert status == 0, errors
    sides = {side["name"]: side["runs"] for side in json.loads(kept.read_bytes())["sides"]}
    assert len(sides) == 7
    for name, runs in sides.items():
        assert len(runs) == LAPS
        assert all(set(run["outcomes"]) == {"served"} for run in runs), name
        assert name in shown
