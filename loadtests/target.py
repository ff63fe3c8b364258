"""Whom the load goes to: an HTTP server on TCP or on a Unix socket, or one that speaks the Open Inference Protocol over
gRPC. Loopback unless the user says otherwise."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

P = TypeVar("P", bound=asyncio.Protocol)


class TargetFault(Exception):
    """The target can't be used; the message says why and what to do."""


class Target(msgspec.Struct, frozen=True):
    """An address; `socket` if it is a Unix socket's path, else `host` and `port`."""

    text: str
    """As the user wrote it; names the target in reports."""
    host: str = "localhost"
    port: int = 80
    socket: str | None = None
    grpc: bool = False

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.socket else f"{host}:{self.port}"

    @property
    def local(self) -> bool:
        """A name other than `localhost` is not: only its owner knows where it leads."""
        if self.socket or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    async def connect(self, protocol: Callable[[], P], *, within_s: float) -> P:
        """A new connection. Raises OSError, TimeoutError among them."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(within_s):
            if self.socket:
                _, made = await loop.create_unix_connection(protocol, self.socket)
            else:
                _, made = await loop.create_connection(protocol, self.host, self.port)
        return made


class Access(msgspec.Struct, frozen=True):
    """What a target wants to be shown with each call."""

    keys: dict[str, str] = {}
    """API keys by tenant; a tenant that is not in it calls without one."""
    headers: dict[str, str] = {}
    """Of every call, whoever makes it."""

    def of(self, tenant: str) -> dict[str, str]:
        """The headers of a tenant's calls."""
        key = self.keys.get(tenant)
        return self.headers | ({"authorization": f"Bearer {key}"} if key else {})


def chosen(text: str, *, key: str | None, anywhere: bool) -> Target:
    """What a user named, with its key. Raises TargetFault for what can't, or must not, be loaded with it."""
    target = parse(text)
    if not anywhere:
        require_loopback(target)
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise TargetFault(f"the key for {text} is empty or has blanks or line ends in it; a header can't carry those")
    return target


def parse(text: str) -> Target:
    """`http://host:port`, with or without `/v1`, or `unix:/path`; over gRPC `grpc://host:port` or `grpc+unix:/path`.
    Raises TargetFault."""
    scheme, found, path = text.partition("unix:/")
    if found and scheme in ("", "grpc+"):
        return Target(text, socket=f"/{path}", grpc=bool(scheme))
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise TargetFault(f"target {text!r}: {error}; write {FORMS}") from None
    plain = parts.path.rstrip("/") in ("", "/v1") and not parts.query and not parts.username
    if parts.scheme not in ("http", "grpc") or not host or not plain:
        raise TargetFault(f"target {text!r} is no address of a server; write {FORMS}")
    return Target(text, host=host, port=port, grpc=parts.scheme == "grpc")


FORMS = "http://host:port, unix:/path, grpc://host:port or grpc+unix:/path"


def require_loopback(target: Target) -> None:
    """Raises TargetFault for an address that is not this machine's own."""
    if not target.local:
        raise TargetFault(
            f"target {target.text} is not on this machine's loopback; load on somebody else's server is an attack, "
            "so if it is yours to load, say --yes-not-loopback"
        )
