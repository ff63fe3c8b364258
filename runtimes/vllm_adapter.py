"""A vLLM's adapter, kept the one that the shelf's alias means while the engine runs.

Each version is loaded under a name of its own, `<model>@<version>`, and calls go to the newest that could be loaded:
those under way end on the one they began with, and no call meets an engine that has neither. The engine keeps what it
has room for and fetches the others from their files again, so going back is as quick, and nothing is unloaded under
somebody who still calls it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from runtimes import adapter
from runtimes.adapter import Adapter
from runtimes.artifact import Hub, locate
from runtimes.clock import Clock
from runtimes.contract import Site, Unavailable
from runtimes.integrity import ShelfFault
from runtimes.wire import Wire

log = logging.getLogger("headrace.vllm")

LOAD_S_MAX = 60.0


class Follower:
    """One model's adapter, on an engine that `wire` reaches."""

    def __init__(
        self,
        *,
        reference: str,
        base: str | None,
        rank_max: int,
        site: Site,
        wire: Wire,
        authorization: tuple[tuple[bytes, bytes], ...],
        clock: Clock,
    ) -> None:
        self._reference = reference
        self._base = base
        self._rank_max = rank_max
        self._site = site
        self._wire = wire
        self._clock = clock
        self._list = wire.head("GET", "/v1/models", authorization)
        self._load = wire.head(
            "POST", "/v1/load_lora_adapter", ((b"content-type", b"application/json"), *authorization)
        )
        self._name: str | None = None
        """What the engine calls the version in use; None before there is one."""
        self._refused: str | None = None
        """Why the newest version is not in use."""

    async def follow(self) -> str:
        """The engine's name for the adapter to use from now on. Raises Unavailable if it has none; a newer version that
        can't be used is told of once, and the one before it stays in use."""
        try:
            wanted = await asyncio.to_thread(self._find)
            name = f"{self._site.model}@{wanted.version}"
            if name != self._name or name not in await self._loaded():
                await self._put(name, wanted)
            self._name, self._refused = name, None
        except ShelfFault as fault:
            why = f"{self._site.replica}: {fault}"
            if self._name is None or self._name not in await self._loaded():
                raise Unavailable(why) from fault
            if why != self._refused:
                log.error("%s; %s stays in use", why, self._name)
            self._refused = why
        return self._name

    def _find(self) -> Adapter:
        shelf = self._site.shelf
        base = Hub("") if self._base is None else locate(self._base, shelf)
        return adapter.find(self._reference, shelf, base=base, rank_max=self._rank_max)

    async def _put(self, name: str, wanted: Adapter) -> None:
        if name in await self._loaded():
            return  # another process of this gateway was faster
        body = msgspec.json.encode({"lora_name": name, "lora_path": str(wanted.path)})
        async with self._wire.exchange(self._load, (), body, self._clock.now_s() + LOAD_S_MAX) as reply:
            said = b"".join([frame async for frame in reply.frames])
        if reply.status != 200 and name not in await self._loaded():
            raise ShelfFault(f"the engine does not take {self._reference} ({reply.status}): {_message(said)}")
        log.info("replica %s: %s is in use", self._site.replica, name)

    async def _loaded(self) -> set[str]:
        async with self._wire.exchange(self._list, (), b"", self._clock.now_s() + LOAD_S_MAX) as reply:
            said = b"".join([frame async for frame in reply.frames])
        try:
            return {model.id for model in _LISTED.decode(said).data}
        except msgspec.DecodeError as error:
            raise Unavailable(f"{self._site.replica} does not list its models as vLLM does ({reply.status})") from error


class _Model(msgspec.Struct):
    id: str


class _Listed(msgspec.Struct):
    data: list[_Model]


_LISTED = msgspec.json.Decoder(_Listed)


def _message(said: bytes) -> str:
    """What vLLM says went wrong, in one line."""
    try:
        answer: Any = msgspec.json.decode(said)
        return str(answer["error"]["message"]).partition("\n")[0][:300]
    except (msgspec.DecodeError, KeyError, TypeError):
        return "it does not say why; is it started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True?"
