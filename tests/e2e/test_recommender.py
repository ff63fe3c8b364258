"""A recommender from its recipe to a client: made of a few ratings, published, and asked over the Open Inference
Protocol."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtimes.environment import Environments
from tests.conftest import LISTEN
from tests.e2e.servers import REPOSITORY, GatewayProcess, Key

pytestmark = pytest.mark.engine

USERS, ITEMS = 40, 30
STRANGER = 10**12
MODELS = LISTEN + '[[models]]\nname = "films"\nreplicas = [{ kind = "onnx", artifact = "recommend-top@stable" }]\n'


def when(user: int, item: int) -> int:
    return (item * 11 + user) % ITEMS


def had(user: int) -> list[int]:
    """In the order in which they were."""
    items = [item for item in range(ITEMS) if (user * 7 + item * 5) % 3]
    return sorted(items, key=lambda it: when(user, it))


@pytest.fixture(scope="module")
def gateway(engine_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(tmp_path_factory.mktemp("h"), MODELS)
    gateway.state.mkdir(mode=0o700)
    ratings = gateway.state / "ratings.csv"
    # Even users like even items, and odd users odd ones.
    lines = [
        f"{user},{it},{5 if user % 2 == it % 2 else 1},{when(user, it)}" for user in range(USERS) for it in had(user)
    ]
    ratings.write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines))
    subprocess.run(
        [
            *(Environments(engine_state).python("train"), "-P", "-m", "training", "run", "recommend-top"),
            *("--set", f"data.train={ratings}", "--set", "gate.recall_20_times_floor_min=0.5"),
            *("--shelf", gateway.state / "shelf"),
        ],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HEADRACE_STATE": str(gateway.state)},
        cwd=gateway.state,
        check=True,
        timeout=600,
    )
    gateway.start()
    yield gateway
    assert gateway.stop() == 0, gateway.text


@pytest.fixture(scope="module")
def key(gateway: GatewayProcess) -> Key:
    return gateway.issue()


async def asked(gateway: GatewayProcess, key: Key, users: list[Any], datatype: str = "INT64") -> Any:
    body = {"inputs": [{"name": "user", "datatype": datatype, "shape": [len(users)], "data": users}]}
    async with gateway.client(key.text) as client:
        return await client.post("/v2/models/films/infer", json=body)


async def rows(gateway: GatewayProcess, key: Key, users: list[int]) -> list[tuple[list[int], list[float]]]:
    """Items and scores for each user."""
    answer = await asked(gateway, key, users)
    assert answer.status_code == 200, answer.text
    found = {it["name"]: it for it in answer.json()["outputs"]}
    assert (found["item"]["datatype"], found["score"]["datatype"]) == ("INT64", "FP32")
    width = found["item"]["shape"][1]
    return [
        tuple(found[name]["data"][at * width : (at + 1) * width] for name in ("item", "score"))
        for at in range(len(users))
    ]


async def test_a_user_gets_what_they_like_and_have_not_had(gateway: GatewayProcess, key: Key) -> None:
    for user, (items, scores) in enumerate(await rows(gateway, key, [*range(USERS)])):
        learnt = had(user)[: round(0.8 * len(had(user)))]
        assert not set(items) & set(learnt)
        assert scores == sorted(scores, reverse=True)
        assert items[0] % 2 == user % 2


async def test_a_stranger_gets_what_most_like_beside_any_other_user(gateway: GatewayProcess, key: Key) -> None:
    [alone] = await rows(gateway, key, [STRANGER])
    beside = await rows(gateway, key, [0, STRANGER])
    assert alone[0] == beside[1][0]
    assert set(alone[0]) == set(range(ITEMS))


async def test_a_name_instead_of_a_number_is_a_400_that_says_so(gateway: GatewayProcess, key: Key) -> None:
    answer = await asked(gateway, key, ["Anna"], "BYTES")
    assert answer.status_code == 400
    assert "`user` is BYTES; the model takes INT64" in answer.text
