"""What a replica runs: its part of the configuration, with the artifact that this means just now.

`artifact = "intent@stable"` is another version after a promotion. The replica asks here, and goes over to what is built
here while calls go on; an engine's sockets, pid file and log are named for the version, so that two stand side by side.
"""

from __future__ import annotations

from typing import Any

import msgspec

import runtimes
from runtimes.artifact import aliased
from runtimes.contract import Generator, Predictor, Site
from runtimes.integrity import ShelfFault


class Source:
    """One replica's. With `attached`, an engine is another process's to start, and is only reached from here; so is one
    that the replica shares with another."""

    def __init__(self, spec: runtimes.Spec, site: Site, *, attached: bool) -> None:
        self.spec = spec
        self.site = site
        self.attached = _shares(spec) or (attached and is_engine(spec))

    @property
    def follows(self) -> bool:
        """Promotions can change what it runs."""
        return any(self._references())

    @property
    def look_s(self) -> float:
        """Pause between two looks at what is promoted."""
        return self.site.shelf.look_s

    @property
    def retry_s(self) -> float:
        """Pause before a version that cannot be run is tried again: one that is only not up yet is looked for often."""
        return ATTACH_S if self.attached else RETRY_S

    @property
    def retire_s(self) -> float:
        """How long what ran before stays as it is: until no call is about to reach it, from other processes either."""
        drain_s: float = getattr(self.spec, "drain_s_max", 0.0)
        return ABOUT_S + (drain_s if is_engine(self.spec) and not self.attached else 0.0)

    def version(self) -> str:
        """The version that the artifact's alias means now, and of an adapter on it; empty if they name none. Reads the
        shelf."""
        return "+".join(map(self._version, self._references())).rstrip("+")

    def build(self, version: str) -> Generator | Predictor:
        """A runtime for this version, not yet open."""
        spec: Any = self.spec
        site = self.site
        for field, reference, wanted in zip(NAMING, self._references(), version.split("+"), strict=False):
            if wanted:
                assert reference is not None
                name = reference.partition("@")[0]
                spec = msgspec.structs.replace(spec, **{field: f"{name}@{wanted}"})
                if field == "artifact" and (is_engine(spec) or _shares(spec)):
                    site = msgspec.structs.replace(site, generation=wanted)
        runtime: Generator | Predictor = (spec.attached(site) if self.attached else spec).build(site)
        return runtime

    def _references(self) -> list[str | None]:
        return [getattr(self.spec, field, None) for field in NAMING]

    def _version(self, reference: str | None) -> str:
        try:
            return "" if reference is None else aliased(reference, self.site.shelf) or ""
        except ShelfFault:
            return ""  # opening it will say what is wrong


def is_engine(spec: runtimes.Spec) -> bool:
    """It starts a process, of which a host has one, however many workers it has."""
    return hasattr(spec, "attached") and getattr(spec, "url", None) is None and not _shares(spec)


def _shares(spec: runtimes.Spec) -> bool:
    """It runs on an engine that another replica starts."""
    return getattr(spec, "shares", None) is not None


#: Fields of a Spec that may name what is on the shelf.
NAMING = ("artifact", "adapter")

#: Pauses between tries, and how long a call may take from being given a replica to having reached its runtime.
RETRY_S = 30.0
ATTACH_S = 1.0
ABOUT_S = 1.0
