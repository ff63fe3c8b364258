"""A Shelf at a URL: several hosts publish, promote and sweep at once, and none of them sees half of anything."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gateway.promotion import Source
from runtimes.artifact import MANIFEST, Manifest, NotFound, Shelf, verify
from runtimes.contract import Site
from runtimes.integrity import Rejected, ShelfFault
from runtimes.onnx import Onnx
from runtimes.remote_shelf import CACHED_MAX, TRIES_MAX, RemoteShelf, open_shelf
from tests import tiny
from tests.fakes import FakeClock
from tests.runtimes import disk_store

HOUR_S = 3600.0


class Crowded(MemoryFileSystem):  # type: ignore[misc]
    """A store that remembers its listings, as buckets' do. Somebody else may act just before an exclusive write,
    or the answer to one may get lost."""

    protocol = "crowded"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.listed: dict[str, list[str]] = {}
        self.first: Callable[[], object] | None = None
        self.loses_answers = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("crowded://", "memory://"))
        return stripped

    def find(self, path: str, **options: Any) -> list[str]:
        return self.listed.setdefault(path, super().find(path, **options))

    def cat_file(self, path: str, **options: Any) -> bytes:
        for folder, files in self.listed.items():
            if path.startswith(folder) and self._strip_protocol(path) not in files:
                raise FileNotFoundError(path)
        content: bytes = super().cat_file(path, **options)
        return content

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listed.clear()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        first, self.first = self.first, None
        if first is not None:
            first()
        super().pipe_file(path, value, mode, **options)
        if self.loses_answers:
            raise FileExistsError(path)  # what a client says whose second try found its first one done


@pytest.fixture(autouse=True)
def stores() -> Iterator[None]:
    fsspec.register_implementation("crowded", Crowded, clobber=True)
    yield
    for kind in (MemoryFileSystem, Crowded):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def hosts(tmp_path: Path, clock: FakeClock) -> Callable[[str], RemoteShelf]:
    """The same shelf, seen from hosts of these names."""
    return lambda name: RemoteShelf("crowded://bucket/models", tmp_path / name, clock=clock)


@pytest.fixture
def shelf(hosts: Callable[[str], RemoteShelf]) -> RemoteShelf:
    return hosts("here")


def publish(shelf: Shelf, folder: Path, *thresholds: float) -> list[str]:
    """A version of `tiny` for each; promotes nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(tiny.graph("classify"))
    (folder / "tokenizer.json").write_text("{}")
    return [shelf.publish(folder, tiny.card("classify", thresholds={"card": it})).version for it in thresholds]


def test_what_one_host_publishes_and_promotes_another_resolves(
    hosts: Callable[[str], RemoteShelf], tmp_path: Path
) -> None:
    here, there = hosts("here"), hosts("there")
    old, new = publish(here, tmp_path / "made", 0.1, 0.2)
    here.promote("tiny", old)
    found = there.resolve("tiny")
    verify(found)
    assert (found.manifest.version, found.path) == (old, tmp_path / "there" / "tiny" / old)
    there.promote("tiny", new)
    assert here.resolve("tiny@stable").manifest.version == new
    assert here.rollback("tiny") == old
    assert there.aliases("tiny") == {"stable": old}
    assert [it.version for it in there.list("tiny")] == [old, new]
    assert there.names() == ["tiny"]


def test_the_same_content_is_the_same_version_at_a_url_and_in_a_folder(shelf: RemoteShelf, tmp_path: Path) -> None:
    folder = Shelf(tmp_path / "folder")
    assert publish(shelf, tmp_path / "made", 0.1) == publish(folder, tmp_path / "made", 0.1)
    assert publish(shelf, tmp_path / "made", 0.1) == shelf.versions("tiny")


def test_what_is_missing_is_answered_with_what_there_is(shelf: RemoteShelf, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing yet"):
        shelf.resolve("tiny")
    [version] = publish(shelf, tmp_path / "made", 0.1)
    with pytest.raises(NotFound, match=version):
        shelf.resolve("tiny@stable")
    with pytest.raises(NotFound, match="it has tiny"):
        shelf.resolve("other")
    with pytest.raises(NotFound, match="no artifact 'other'"):
        shelf.promote("other", version)
    with pytest.raises(NotFound, match="no earlier promotion"):
        shelf.rollback("tiny")
    with pytest.raises(ShelfFault, match="cannot name"):
        shelf.versions("../tiny")


def test_a_version_without_its_manifest_is_not_there(shelf: RemoteShelf, tmp_path: Path) -> None:
    [version] = publish(shelf, tmp_path / "made", 0.1)
    Crowded().rm_file(f"/bucket/models/tiny/{version}/{MANIFEST}")
    assert shelf.versions("tiny") == []
    assert shelf.names() == []


def test_a_change_that_another_was_faster_with_is_made_after_it(
    hosts: Callable[[str], RemoteShelf], tmp_path: Path
) -> None:
    here, there = hosts("here"), hosts("there")
    first, second = publish(here, tmp_path / "made", 0.1, 0.2)
    here._store.first = lambda: there.promote("tiny", second, "canary")
    here.promote("tiny", first)
    assert here.aliases("tiny") == there.aliases("tiny") == {"stable": first, "canary": second}


def test_a_change_that_others_are_always_faster_with_is_given_up(
    hosts: Callable[[str], RemoteShelf], tmp_path: Path
) -> None:
    here, there = hosts("here"), hosts("there")
    versions = publish(here, tmp_path / "made", 0.1, 0.2)
    turns = itertools.cycle(versions)

    def faster() -> None:
        there.promote("tiny", next(turns), "canary")
        here._store.first = faster

    here._store.first = faster
    with pytest.raises(ShelfFault, match=f"{TRIES_MAX} others"):
        here.promote("tiny", versions[0])
    assert set(there.aliases("tiny")) == {"canary"}


def test_a_rollback_whose_answer_got_lost_is_made_once(shelf: RemoteShelf, tmp_path: Path) -> None:
    versions = publish(shelf, tmp_path / "made", 0.1, 0.2, 0.3)
    for version in versions:
        shelf.promote("tiny", version)
    shelf._store.loses_answers = True
    assert shelf.rollback("tiny") == versions[1]
    assert shelf.aliases("tiny") == {"stable": versions[1]}


def test_two_publishers_of_the_same_agree_on_its_manifest(
    hosts: Callable[[str], RemoteShelf], tmp_path: Path, clock: FakeClock
) -> None:
    here, there = hosts("here"), hosts("there")
    theirs: list[str] = []

    def meanwhile() -> None:
        clock.advance(60)
        theirs.extend(publish(there, tmp_path / "theirs", 0.1))

    here._store.first = meanwhile
    assert publish(here, tmp_path / "made", 0.1) == theirs
    assert [it.created_s for it in here.list("tiny")] == [clock.wall_s()]


@pytest.mark.parametrize("first", ["sweep", "promote"])
def test_a_version_is_swept_away_or_promoted_but_not_both(
    hosts: Callable[[str], RemoteShelf], tmp_path: Path, clock: FakeClock, first: str
) -> None:
    here, there = hosts("here"), hosts("there")
    used, unused = publish(here, tmp_path / "made", 0.1, 0.2)
    here.promote("tiny", used)
    clock.advance(2 * HOUR_S)
    if first == "promote":
        here._store.first = lambda: there.promote("tiny", unused, "canary")
        assert here.sweep("tiny", keep=0) == []
        assert there.resolve("tiny@canary").manifest.version == unused
        return
    there._store.first = lambda: here.sweep("tiny", keep=0)
    with pytest.raises(NotFound, match=unused):
        there.promote("tiny", unused, "canary")
    assert there.versions("tiny") == [used]
    assert not any(unused in path for path in Crowded.store)
    assert publish(there, tmp_path / "made", 0.2) == [unused]
    assert there.resolve(f"tiny@{unused}").manifest.version == unused


def test_a_sweep_that_was_killed_is_ended_by_a_later_one(
    shelf: RemoteShelf, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, unused = publish(shelf, tmp_path / "made", 0.1, 0.2)
    shelf.promote("tiny", used)
    clock.advance(2 * HOUR_S)
    with monkeypatch.context() as killed:
        killed.setattr(shelf._store, "rm", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shelf.sweep("tiny", keep=0)
    assert shelf.versions("tiny") == [used]
    with pytest.raises(ShelfFault, match="try again later"):
        publish(shelf, tmp_path / "made", 0.2)
    with pytest.raises(ShelfFault, match="somebody else"):
        shelf.sweep("tiny", keep=0)
    clock.advance(2 * HOUR_S)
    shelf.sweep("tiny", keep=0)
    assert publish(shelf, tmp_path / "made", 0.2) == [unused]


@pytest.fixture
def promoted(shelf: RemoteShelf, tmp_path: Path) -> Manifest:
    [version] = publish(shelf, tmp_path / "made", 0.1)
    shelf.promote("tiny", version)
    return shelf.describe("tiny")


def test_a_file_that_is_not_what_was_published_never_gets_here(
    shelf: RemoteShelf, promoted: Manifest, tmp_path: Path
) -> None:
    Crowded().pipe_file(f"/bucket/models/tiny/{promoted.version}/model.onnx", b"another")
    with pytest.raises(Rejected, match=r"model\.onnx"):
        shelf.resolve("tiny")
    assert {it.name for it in (tmp_path / "here" / "tiny").iterdir()} == {".lock"}


def test_a_copy_that_was_damaged_is_fetched_again(shelf: RemoteShelf, promoted: Manifest) -> None:
    file = shelf.resolve("tiny").path / "model.onnx"
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(b"short")
    assert (shelf.resolve("tiny").path / "model.onnx").read_bytes() == whole


def test_a_copy_is_used_while_it_is_whole(shelf: RemoteShelf, promoted: Manifest) -> None:
    shelf.resolve("tiny")
    Crowded().rm_file(f"/bucket/models/tiny/{promoted.version}/model.onnx")
    verify(shelf.resolve("tiny"))


def test_only_the_copies_opened_last_are_kept(shelf: RemoteShelf, tmp_path: Path) -> None:
    versions = publish(shelf, tmp_path / "made", *(it / 100 for it in range(CACHED_MAX + 2)))
    for age, version in enumerate(reversed(versions[:-1]), 1):
        path = shelf.resolve(f"tiny@{version}").path
        os.utime(path, (path.stat().st_mtime - 2 * age * HOUR_S,) * 2)
    shelf.resolve(f"tiny@{versions[-1]}")
    assert {it.name for it in (tmp_path / "here" / "tiny").iterdir()} == {".lock", *versions[-CACHED_MAX:]}


def test_a_gateway_s_replica_follows_a_promotion_at_a_url(hosts: Callable[[str], RemoteShelf], tmp_path: Path) -> None:
    here, there = hosts("here"), hosts("there")
    old, new = publish(there, tmp_path / "made", 0.1, 0.2)
    there.promote("tiny", old)
    site = Site(model="tiny", replica="tiny-0", state=tmp_path, shelf=here)
    source = Source(Onnx(artifact="tiny"), site, attached=False)
    assert (source.version(), source.look_s) == (old, here.look_s)
    there.promote("tiny", new)
    assert source.version() == new
    assert here.look_s > Shelf.look_s


def test_a_store_that_fails_is_named_without_its_password(tmp_path: Path) -> None:
    shelf = RemoteShelf("crowded://key:secret@bucket/models", tmp_path)
    shelf._store.find = lambda path: (_ for _ in ()).throw(TimeoutError("no route"))
    with pytest.raises(ShelfFault, match=r"crowded://bucket/models .*no route") as failed:
        shelf.resolve("tiny")
    assert "secret" not in str(failed.value)


def test_a_place_is_a_folder_or_a_url(tmp_path: Path) -> None:
    assert type(open_shelf(tmp_path / "shelf", tmp_path)) is Shelf
    assert open_shelf(f"file://{tmp_path}/shelf", tmp_path).root == tmp_path / "shelf"
    remote = open_shelf("memory://models", tmp_path)
    assert isinstance(remote, RemoteShelf)
    assert remote.root.parent == tmp_path / "shelves"
    with pytest.raises(ShelfFault, match="nostore"):
        open_shelf("nostore://bucket", tmp_path)


def test_processes_that_publish_and_promote_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each promotes versions of its own and one they all have, to aliases of its own and one they all have."""
    processes, each = 3, 4
    for number in range(processes):
        publish(Shelf(tmp_path / "made-only"), tmp_path / f"made-{number}", 0.1)
    command = [sys.executable, disk_store.__file__, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(number), str(each)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        for number in range(processes)
    ]
    assert [it.wait(timeout=120) for it in running] == [0] * processes
    shelf = disk_store.shelf(tmp_path, "reader")
    history = shelf.history("tiny")
    for number in range(processes):
        assert len(history[f"own-{number}"]) == each
    changes = [it.name for it in (tmp_path / "store" / "tiny" / "aliases").iterdir()]
    assert len(changes) == 2 * processes * each
    assert len(shelf.versions("tiny")) == processes * each + 1
    for version in shelf.versions("tiny"):
        verify(shelf.resolve(f"tiny@{version}"))
