"""`gc`: what nobody can ask for any more goes, and only that."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from runtimes.artifact import Manifest, Shelf
from runtimes.clock import SystemClock
from runtimes.integrity import ShelfFault
from tests import tiny
from training import exchange_command, leftovers

HOUR_S = 3600.0
PAST_S = 1_700_000_000.0


class Past(SystemClock):
    def wall_s(self) -> float:
        return PAST_S


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path))
    return tmp_path


@pytest.fixture
def manifest(state: Path) -> Manifest:
    """A promoted version, and one nobody means, both old."""
    shelf = Shelf(state / "shelf", clock=Past())
    for content, thresholds in (("old", {"card": 0.5}), ("new", {})):
        (state / content).mkdir()
        manifest = tiny.publish(shelf, state / content, thresholds=thresholds)
        if content == "old":
            (shelf.root / "tiny" / "aliases.json").unlink()
    for version in shelf.versions("tiny"):
        os.utime(shelf.root / "tiny" / version, (1.0, 1.0))
    return manifest


def run_folder(state: Path, name: str, *, age_s: float = 2 * HOUR_S) -> Path:
    folder = state / "runs" / name
    (folder / "stages").mkdir(parents=True)
    for file in ("run.json", "stages/train.pt"):
        (folder / file).write_bytes(b"12345")
        os.utime(folder / file, (PAST_S - age_s,) * 2)
    return folder


def test_a_run_that_led_to_nothing_on_the_shelf_is_found_with_its_size(state: Path, manifest: Manifest) -> None:
    lost = run_folder(state, "tiny-ffffffffffff")
    run_folder(state, f"tiny-{manifest.lineage.recipe_hash[:12]}")
    run_folder(state, "tiny-eeeeeeeeeeee", age_s=HOUR_S / 2)
    (state / "runs" / "notes").mkdir()
    [found] = leftovers.find(state / "runs", [manifest], now_s=PAST_S)
    assert (found.path, found.name, found.size_bytes) == (lost, "tiny", 10)


def test_a_run_under_way_is_left_alone(state: Path) -> None:
    folder = run_folder(state, "tiny-ffffffffffff")
    [found] = leftovers.find(state / "runs", [], now_s=PAST_S)
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not leftovers.remove(found)
    assert (folder / "run.json").exists()
    assert leftovers.remove(found)
    assert not folder.exists()


def test_gc_removes_nothing_until_it_is_told_to(
    state: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(state, "gone-ffffffffffff")
    shelf = Shelf(state / "shelf")
    before = shelf.versions("tiny")
    exchange_command.gc(json_=True)
    told = json.loads(capsys.readouterr().out)
    assert shelf.versions("tiny") == before
    assert folder.exists()
    exchange_command.gc(yes=True, json_=True)
    done = json.loads(capsys.readouterr().out)
    assert done == told | {"removed": True}
    assert shelf.versions("tiny") == [manifest.version]
    assert set(done["what"]) == {f"tiny@{it}" for it in before if it != manifest.version} | {str(folder)}
    assert not folder.exists()
    exchange_command.gc()
    assert "0 versions and 0 runs, 0 bytes" in capsys.readouterr().out


def test_gc_leaves_a_damaged_name_and_its_runs_as_they_are_and_goes_on(
    state: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf(state / "shelf")
    other = run_folder(state, "gone-ffffffffffff")
    damaged = shelf.root / "damaged"
    shutil.copytree(shelf.root / "tiny", damaged)
    its = run_folder(state, "damaged-ffffffffffff")
    before = shelf.versions("damaged")
    with pytest.raises(ShelfFault, match="holds the manifest of tiny@"):
        exchange_command.gc(yes=True)
    assert "1 versions and 1 runs" in capsys.readouterr().out
    assert shelf.versions("tiny") == [manifest.version]
    assert shelf.versions("damaged") == before
    assert (other.exists(), its.exists()) == (False, True)
