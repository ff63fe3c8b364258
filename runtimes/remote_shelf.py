"""A Shelf at a URL: a bucket, or whatever else fsspec knows. Nothing there is ever changed, only added.

    <url>/<name>/<version>/…              the files; manifest.json comes last, and with it the version is published
    <url>/<name>/aliases/00000001.json …  what the aliases meant after each change; the last number counts

A change of aliases takes the next number, and only one writer gets it: the store itself creates a file only if there is
none (Amazon S3, Google Cloud Storage, Azure; `memory://` within a process). Whoever loses looks again and tries anew.
On other stores fsspec looks before it writes, and each writer reads what stands there afterwards: two changes in the
same moment can still lose one of them.

What is opened is copied into a folder of versions here, proven, and used from there.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from runtimes.artifact import (
    MANIFEST,
    Aliases,
    Artifact,
    Card,
    Manifest,
    Name,
    NotFound,
    Shelf,
    locked,
    manifest_of,
    plain_paths,
    read_manifest,
    verify,
)
from runtimes.clock import Clock
from runtimes.integrity import Rejected, ShelfFault

CACHED_MAX = 8
"""Versions of one name that are kept here; the one opened longest ago goes first, if that is over an hour."""
TRIES_MAX = 100
"""Each that fails is somebody else's success."""

_OLD_S = 3600.0
_VERSION = re.compile(r"([0-9a-f]{12})/manifest\.json\Z")
_NUMBER = re.compile(r"aliases/([0-9]{8})\.json\Z")

T = TypeVar("T")


class Meaning(msgspec.Struct):
    """What the aliases of one name mean."""

    aliases: Aliases
    by: str = ""
    """Of one change only, so that whoever made it knows it again when the store's answer got lost."""
    leaving: list[str] = []
    """Versions that are being removed: nothing may refer to them, or publish them, until that is done."""
    leaving_since_s: float = 0.0


class RemoteShelf(Shelf):
    """`root` is where copies are kept. Safe for many processes on many hosts. Raises ShelfFault if the store cannot be
    had; how long it tries is the store's own setting."""

    look_s = 1.5  # each look is a request that is paid for

    def __init__(self, url: str, root: Path, *, clock: Clock | None = None) -> None:
        super().__init__(root, clock=clock)
        self.where = re.sub(r"//[^/@]*@", "//", url)
        self._turn = threading.Lock()
        self._known: dict[str, tuple[int, bytes]] = {}
        """Name → the last change seen of its aliases, and its number."""
        try:
            import fsspec
        except ImportError:
            raise ShelfFault(f"a shelf at {self.where} needs fsspec: install headrace[remote]") from None
        try:
            self._store, self._base = fsspec.url_to_fs(url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ShelfFault(f"the shelf {self.where} cannot be used: {error}") from error
        self._base = self._base.rstrip("/")

    def publish(self, folder: Path, card: Card) -> Manifest:
        """As ever. The manifest goes last: until then no reader sees any of it."""
        self._check_name(card.name)
        manifest = manifest_of(folder, card, created_s=self.clock.wall_s())
        place = f"{card.name}/{manifest.version}"
        if manifest.version in self._meaning(card.name)[1].leaving:
            raise ShelfFault(f"{card.name}@{manifest.version} is just being removed from {self.where}; try again later")
        if manifest.version in self.versions(card.name):
            return self._manifest(card.name, manifest.version)
        for file in manifest.files:
            with self._failing():
                self._store.makedirs(self._at(f"{place}/{file}").rpartition("/")[0], exist_ok=True)
                self._store.put_file(str(folder / file), self._at(f"{place}/{file}"))
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        if not self._create(f"{place}/{MANIFEST}", content):  # somebody else published the same
            return self._manifest(card.name, manifest.version)
        return manifest

    def resolve(self, reference: str) -> Artifact:
        """As ever, with a copy of its files here. Raises Rejected if they are not what was published."""
        manifest = self.describe(reference)
        home = self.root / manifest.name
        home.mkdir(parents=True, exist_ok=True)
        found = Artifact((home / manifest.version).absolute(), manifest)
        with locked(home):
            for stale in home.glob(".incoming-*"):
                shutil.rmtree(stale)
            if not _holds(found):
                self._download(found)
            found.path.touch()
            self._evict(home)
        return found

    def sweep(self, name: str, *, keep: int) -> list[Manifest]:
        """As ever: said first, so that nobody promotes or publishes meanwhile what goes; then done."""
        self._check_name(name)

        def condemn(meaning: Meaning) -> list[Manifest]:
            if meaning.leaving and self.clock.wall_s() < meaning.leaving_since_s + _OLD_S:
                raise ShelfFault(f"somebody else is removing versions of {name} from {self.where}; try again later")
            found = self.unused(name, keep=keep)
            gone = {it.version for it in found}
            for alias, moves in meaning.aliases.items():
                meaning.aliases[alias] = [it for it in moves if it.version not in gone]
            meaning.leaving = sorted({*meaning.leaving, *gone})
            meaning.leaving_since_s = self.clock.wall_s()
            return found

        def done(meaning: Meaning) -> None:
            meaning.leaving = []

        if not self.unused(name, keep=keep) and not self._meaning(name)[1].leaving:
            return []
        found = self._commit(name, condemn)
        for version in self._meaning(name)[1].leaving:
            with self._failing():
                for file in (MANIFEST, ""):  # what is half removed is not published
                    path = self._at(f"{name}/{version}/{file}").rstrip("/")
                    if self._store.exists(path):
                        self._store.rm(path, recursive=not file)
        self._commit(name, done)
        return found

    def history(self, name: str) -> Aliases:
        self._check_name(name)
        return self._meaning(name)[1].aliases

    def names(self) -> list[str]:
        try:
            with self._asking():
                found = self._store.ls(self._base, detail=False)
        except FileNotFoundError:
            return []
        return [name for name in sorted(path.rstrip("/").rpartition("/")[2] for path in found) if self.has(name)]

    def versions(self, name: str) -> list[str]:
        self._check_name(name)
        leaving = self._meaning(name)[1].leaving
        found = (_VERSION.search(it) for it in self._files(name))
        return sorted(it[1] for it in found if it and it[1] not in leaving)

    def _manifest(self, name: str, version: str) -> Manifest:
        return read_manifest(self._read(f"{name}/{version}/{MANIFEST}"), f"{self.where}/{name}/{version}/{MANIFEST}")

    def _touched_s(self, manifest: Manifest) -> float:
        return manifest.created_s

    def _prove(self, reference: str) -> None:
        self.describe(reference)  # whoever opens it proves a copy; to make one only for that may take long

    def _change(self, name: str, change: Callable[[Aliases], T], *, anew: bool = False) -> T:
        if not self.has(name):
            raise NotFound(f"the shelf {self.where} has no artifact {name!r}")
        return self._commit(name, lambda meaning: change(meaning.aliases))

    def _commit(self, name: str, change: Callable[[Meaning], T]) -> T:
        """Make the next change of a name's aliases. `change` is asked again whenever another was faster."""
        by = secrets.token_hex(8)
        for _ in range(TRIES_MAX):
            number, meaning = self._meaning(name)
            result = change(meaning)
            meaning.by = by
            file = f"{name}/aliases/{number + 1:08}.json"
            content = msgspec.json.format(msgspec.json.encode(meaning), indent=2)
            self._create(file, content)
            if self._decoded(self._read(file), file).by == by:
                return result
        raise ShelfFault(f"{TRIES_MAX} others changed the aliases of {name} on {self.where} first; try again")

    def _meaning(self, name: str) -> tuple[int, Meaning]:
        """The last change of its aliases, and its number; 0 before the first."""
        number, content = self._known.get(name) or (0, b"")
        if not number:
            numbers = [int(it[1]) for path in self._files(name) if (it := _NUMBER.search(path))]
            number = max(numbers, default=1) - 1
        while True:
            try:
                content = self._read(f"{name}/aliases/{number + 1:08}.json")
            except FileNotFoundError:
                break
            number += 1
        if not content:
            return 0, Meaning({})
        self._known[name] = number, content
        return number, self._decoded(content, f"{name}/aliases/{number:08}.json")

    def _decoded(self, content: bytes, file: str) -> Meaning:
        try:
            return msgspec.json.decode(content, type=Meaning)
        except msgspec.DecodeError as error:
            raise Rejected(f"{self.where}/{file} is damaged ({error}); remove it") from error

    def _download(self, wanted: Artifact) -> None:
        """All of it or nothing."""
        manifest = wanted.manifest
        plain_paths(manifest)
        incoming = wanted.path.with_name(f".incoming-{secrets.token_hex(8)}")
        try:
            for file in manifest.files:
                target = incoming / file
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with self._failing():
                        self._store.get_file(self._at(f"{manifest.name}/{manifest.version}/{file}"), str(target))
                except FileNotFoundError:
                    raise Rejected(f"{self.where}: {manifest.name}@{manifest.version} has lost {file!r}") from None
                target.chmod(0o444)
            (incoming / MANIFEST).write_bytes(msgspec.json.encode(manifest))
            verify(Artifact(incoming, manifest))
            incoming.rename(wanted.path)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _evict(self, home: Path) -> None:
        versions = sorted((it for it in home.iterdir() if it.is_dir()), key=lambda it: -it.stat().st_mtime)
        newest_s = versions[0].stat().st_mtime
        for old in versions[CACHED_MAX:]:
            if old.stat().st_mtime < newest_s - _OLD_S:
                shutil.rmtree(old)

    # ---- what is asked of the store ----------------------------------------------------------------------------------

    def _check_name(self, name: str) -> None:
        if not Name.fullmatch(name):
            self._home(name)  # says why

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _files(self, name: str) -> list[str]:
        try:
            with self._asking():
                found: list[str] = self._store.find(self._at(name))
        except FileNotFoundError:
            return []
        return found

    def _read(self, path: str) -> bytes:
        with self._asking():
            content: bytes = self._store.cat_file(self._at(path))
        return content

    def _create(self, path: str, content: bytes) -> bool:
        """Whether there was none."""
        try:
            with self._asking():
                self._store.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
                self._store.pipe_file(self._at(path), content, mode="create")
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """For what is short."""
        # It remembers listings, and takes what they lack for what there is not; but another may have written since. One
        # thread at a time, or another's listing would be remembered in between.
        with self._turn, self._failing():
            self._store.invalidate_cache()
            yield

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """As a shelf does."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each store has errors of its own
            raise ShelfFault(
                f"the shelf {self.where} does not answer as it should ({type(error).__name__}: {error}); "
                "check the address, the network and the credentials"
            ) from error


def open_shelf(place: str | Path, state: Path) -> Shelf:
    """The shelf in a folder, or at a URL, of which copies are kept in the state folder. Raises ShelfFault."""
    scheme, separator, path = str(place).partition("://")
    if not separator:
        return Shelf(Path(place).expanduser())
    if scheme in {"file", "local"}:
        return Shelf(Path(path))
    key = hashlib.sha256(str(place).encode()).hexdigest()[:12]
    return RemoteShelf(str(place), state / "shelves" / key)


def _holds(artifact: Artifact) -> bool:
    """Whether the copy is there and whole; one that is not is removed."""
    if not artifact.path.is_dir():
        return False
    try:
        verify(artifact)
    except Rejected:
        shutil.rmtree(artifact.path)
        return False
    return True
