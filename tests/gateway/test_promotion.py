"""A replica goes over to what is promoted, while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import gateway.config
from gateway.config import Config, ConfigError, Model
from gateway.plane import sites
from gateway.promotion import Source
from gateway.replica import Replica, State
from runtimes.artifact import Shelf, aliased
from runtimes.contract import Site, Unavailable
from runtimes.onnx import Onnx
from runtimes.vllm import Vllm
from tests import tiny
from tests.fakes import FakeBatching, FakeClock, FakeGenerator, FakeSource, Script, until


class Engine(FakeGenerator):
    """One that says whether it is open, and whose opening can be held up."""

    def __init__(self) -> None:
        super().__init__(Script([b"{}"]))
        self.opens, self.closes = 0, 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def open(self) -> None:
        await self.go_on.wait()
        await super().open()
        self.opens += 1

    async def aclose(self) -> None:
        self.closes += 1


class Batcher(FakeBatching, Engine):
    """Such an engine that makes batches."""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def source() -> FakeSource:
    return FakeSource({it: Engine() for it in ("a", "b", "c")}, "a")


@pytest.fixture
async def replica(clock: FakeClock, source: FakeSource) -> AsyncIterator[Replica]:
    replica = Replica(name="chat-0", model="chat", kind="fake", source=source, slots=2, clock=clock)
    replica.start()
    await replica.up.wait()
    yield replica
    await replica.aclose()


LOOK_S = 0.5


async def passes(clock: FakeClock, seconds: float) -> None:
    """In small steps, so that whoever sleeps meanwhile wakes in order."""
    for _ in range(round(seconds / LOOK_S)):
        await clock.until_asleep()
        clock.advance(LOOK_S)
        await asyncio.sleep(0.01)  # a thread reads the shelf
    await clock.until_asleep()


async def test_calls_go_to_what_is_promoted_once_it_is_open(
    replica: Replica, source: FakeSource, clock: FakeClock
) -> None:
    a, b = source.runtimes["a"], source.runtimes["b"]
    assert replica.generator is a
    b.go_on.clear()
    source.promoted = "b"
    await passes(clock, 2)
    assert (replica.generator, replica.version) == (a, "a")
    b.go_on.set()
    await until(lambda: replica.version == "b")
    assert replica.generator is b
    assert replica.state is State.ready
    assert a.closes == 0  # a call may be about to reach it
    await passes(clock, 2)
    assert (a.closes, b.closes) == (1, 0)


async def test_going_back_at_once_needs_no_new_start(replica: Replica, source: FakeSource, clock: FakeClock) -> None:
    source.retire_s = 60.0
    source.promoted = "b"
    await passes(clock, 1)
    source.promoted = "a"
    await passes(clock, 1)
    assert replica.version == "a"
    assert source.built == ["a", "b"]
    assert source.runtimes["a"].opens == 1
    await passes(clock, 61)
    assert (source.runtimes["a"].closes, source.runtimes["b"].closes) == (0, 1)


async def test_what_cannot_be_opened_is_left_and_the_next_promotion_is_followed(
    replica: Replica, source: FakeSource, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    source.runtimes["b"].trouble = Unavailable("no such file")
    source.promoted = "b"
    await passes(clock, 2)
    assert (replica.version, replica.state) == ("a", State.ready)
    assert "chat-0 goes on with a: no such file" in caplog.text
    source.promoted = "c"
    await passes(clock, source.retry_s + 1)
    assert replica.version == "c"
    assert source.built.count("b") == 1


async def test_a_look_that_fails_is_not_the_last(
    replica: Replica, source: FakeSource, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    source.fault = OSError(24, "Too many open files")
    source.promoted = "b"
    await passes(clock, 2)
    assert "chat-0 goes on with a" in caplog.text
    assert "Too many open files" in caplog.text
    source.fault = None
    await passes(clock, source.retry_s + 1)
    assert replica.version == "b"


async def test_batches_are_counted_on_whichever_version_they_are_for(
    replica: Replica, source: FakeSource, clock: FakeClock
) -> None:
    def counted() -> tuple[int, float]:
        assert replica.batched is not None
        return sum(replica.batched.rows.counts), replica.batched.queue_s.sum

    assert replica.batched is None, "this engine makes no batches"
    source.runtimes |= {it: Batcher() for it in ("b", "c")}
    source.promoted = "b"
    await passes(clock, 0.5)
    assert counted() == (2, 0.5)
    source.promoted = "c"
    await passes(clock, 0.5)
    assert counted() == (4, 1.0), "the former one may still have calls"
    await passes(clock, 2)
    assert source.runtimes["b"].closes == 1
    assert counted() == (4, 1.0)


async def test_what_is_promoted_while_another_opens_wins(
    replica: Replica, source: FakeSource, clock: FakeClock
) -> None:
    b = source.runtimes["b"]
    b.go_on.clear()
    source.promoted = "b"
    await passes(clock, 1)
    source.promoted = "c"
    b.go_on.set()
    await passes(clock, 2)
    assert replica.version == "c"
    assert b.closes == 1


async def test_a_replica_that_is_down_comes_up_with_what_is_promoted(clock: FakeClock, source: FakeSource) -> None:
    source.runtimes["a"].trouble = Unavailable("damaged")
    replica = Replica(name="chat-0", model="chat", kind="fake", source=source, slots=2, clock=clock)
    replica.start()
    await passes(clock, 1)
    assert replica.state is State.down
    source.promoted = "b"
    await passes(clock, 1)
    assert (replica.state, replica.version) == (State.ready, "b")
    assert replica.up.is_set()
    await replica.aclose()
    assert source.runtimes["b"].closes == 1


def test_only_aliases_are_followed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    made = tmp_path / "made"
    made.mkdir()
    version = tiny.publish(shelf, made).version
    assert aliased("tiny@stable", shelf) == aliased("tiny", shelf) == version
    for reference in (f"tiny@{version}", "tiny@beta", "./tiny", str(made), "org/model", "other", "other@stable"):
        assert aliased(reference, shelf) is None


def test_a_shelf_that_cannot_be_had_is_named_by_its_setting(tmp_path: Path) -> None:
    model = Model(name="tiny", replicas=(Onnx(artifact="tiny"),))
    folder = sites(
        model, Config(models=(model,), state=gateway.config.State(path=str(tmp_path), shelf=f"file://{tmp_path}/other"))
    )
    assert folder[0].shelf.root == tmp_path / "other"
    with pytest.raises(ConfigError, match=r"state\.shelf: .*nostore"):
        sites(model, Config(models=(model,), state=gateway.config.State(shelf="nostore://bucket")))


def test_engines_of_two_versions_have_places_of_their_own(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    made = tmp_path / "made"
    made.mkdir()
    version = tiny.publish(shelf, made).version
    site = Site(model="tiny", replica="tiny-0", state=tmp_path, shelf=shelf)
    for attached in (False, True):
        source = Source(Vllm(artifact="tiny@stable"), site, attached=attached)
        assert source.version() == version
        runtime = source.build(version)
        assert runtime._site.engine == f"tiny-0.{version}"  # type: ignore[attr-defined]
        assert (runtime._spec.artifact, bool(runtime._spec.url)) == (  # type: ignore[attr-defined]
            (None, True) if attached else (f"tiny@{version}", False)
        )
    onnx = Source(Onnx(artifact="tiny"), site, attached=True).build(version)
    assert onnx._spec.artifact == f"tiny@{version}"  # type: ignore[attr-defined]
    assert Source(Vllm(artifact="tiny@stable"), site, attached=False).build("")._site.engine == "tiny-0"  # type: ignore[attr-defined]
