"""An adapter on a vLLM, under a name of its own: `<model>@<version>`.

Versions stand side by side, so calls under way end on the one they began with. The engine keeps what it has room for
and fetches the others from their files again, so going back is as quick, and nothing is unloaded under somebody who
still calls it.
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


class Loader:
    """Has one adapter loaded by the engine that `wire` reaches."""

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

    async def loaded(self) -> str:
        """The engine's name for it; it is loaded when this returns, again if the engine was restarted. Raises
        Unavailable, saying what does not fit."""
        if self._name is None or self._name not in await self._names():
            try:
                self._name = await self._put(await asyncio.to_thread(self._find))
            except ShelfFault as fault:
                raise Unavailable(f"{self._site.replica}: {fault}") from fault
        return self._name

    def _find(self) -> Adapter:
        shelf = self._site.shelf
        base = Hub("") if self._base is None else locate(self._base, shelf)
        return adapter.find(self._reference, shelf, base=base, rank_max=self._rank_max)

    async def _put(self, found: Adapter) -> str:
        name = f"{self._site.model}@{found.version}"
        if name in await self._names():
            return name  # another process of this gateway was faster
        body = msgspec.json.encode({"lora_name": name, "lora_path": str(found.path)})
        async with self._wire.exchange(self._load, (), body, self._clock.now_s() + LOAD_S_MAX) as reply:
            said = b"".join([frame async for frame in reply.frames])
        if reply.status != 200 and name not in await self._names():
            raise ShelfFault(f"the engine does not take {self._reference} ({reply.status}): {_message(said)}")
        log.info("replica %s: the engine has loaded %s", self._site.replica, name)
        return name

    async def _names(self) -> set[str]:
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
