"""The admin plane, on its own listener: health, readiness, metrics, tenants, keys, models, aliases, usage.

Everything but `/healthz`, `/readyz` and `/metrics` needs `Authorization: Bearer <admin token>`; whoever holds the
token may do all of it, and there are no lesser roles. A route is closed unless it is marked open here. No answer
holds a digest or a secret, except a fresh key's, once.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from litestar import (
    Controller,
    HttpMethod,
    Litestar,
    MediaType,
    Request,
    Response,
    Router,
    delete,
    get,
    patch,
    post,
    put,
    route,
)
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, NotFoundException
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from msgspec import UNSET, Struct, UnsetType
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from gateway.alias import Aliases
from gateway.call import Limits, Record
from gateway.errors import BadRequest, GatewayError, MethodNotAllowed, NotFound, TooLarge, Unauthenticated, field_error
from gateway.key import Minted, Unfit, kept
from gateway.report import ModelLook, Report, Shown
from gateway.store import AliasRow, By, Missing, Store, StoreFault, Taken, TenantRow, UsageFilter, UsageTotal
from gateway.tenant import Issuer, KeyView, TenantView

log = logging.getLogger("headrace.admin")


def admin_app(
    *,
    issuer: Issuer,
    aliases: Aliases,
    store: Store,
    report: Callable[[], Awaitable[Report]],
    token: str,
) -> Litestar:
    """`report` says how all is now, but for the store, which is looked at here."""
    collaborators: dict[str, Callable[[], Any]] = {
        "issuer": lambda: issuer,
        "aliases": lambda: aliases,
        "store": lambda: store,
        "report": lambda: report,
    }
    return Litestar(
        [Probes, TenantRoutes, KeyRoutes, ModelRoutes, AliasRoutes, UsageRoutes],
        dependencies={
            name: Provide(give, sync_to_thread=False, use_cache=True) for name, give in collaborators.items()
        },
        guards=[Bearer(token)],
        exception_handlers={Exception: _refuse},
        request_max_body_size=BODY_BYTES_MAX,
        openapi_config=OpenAPIConfig(
            title="Headrace admin API",
            version="1",
            description="Tenants, keys, models, aliases and usage of one gateway. Never exposed beside the data plane.",
            openapi_router=Router("/schema", route_handlers=[], include_in_schema=False, after_request=_found),
            render_plugins=[JsonRenderPlugin(path="/openapi.json")],
            components=Components(security_schemes={"token": SecurityScheme(type="http", scheme="bearer")}),
            security=[{"token": []}],
            use_handler_docstrings=True,
        ),
        logging_config=None,
    )


def admin_token(state: Path) -> str:
    """The token in `<state>/admin.token`, made at the first call, readable by its owner only."""
    return kept(state / "admin.token", lambda: f"hra_{secrets.token_urlsafe(32)}")


#: Longest body any of these routes has use for, and the longest wait for a store that readiness asks.
BODY_BYTES_MAX = 64 * 1024
STORE_S_MAX = 2.0


class Bearer:
    """Lets in whoever shows the token. Handlers are closed unless they carry `open_to_all`."""

    def __init__(self, token: str) -> None:
        self.token = token.encode()

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if handler.opt.get("open_to_all"):
            return
        scheme, _, shown = connection.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(shown.strip().encode(), self.token)
        if not right or not self.token or scheme.lower() != "bearer":
            raise Unauthenticated(
                "The admin API needs `Authorization: Bearer <token>`; the token lies in admin.token in the state "
                "folder."
            )


# ---- health ------------------------------------------------------------------------------------------------


class Check(Struct, frozen=True):
    ready: bool
    reason: str | None


class Readiness(Struct, frozen=True):
    ready: bool
    checks: dict[str, Check]


PROBED_BY = [HttpMethod.GET, HttpMethod.HEAD]


class Probes(Controller):
    tags = ["health"]  # noqa: RUF012  Litestar's own idiom
    opt = {"open_to_all": True}  # noqa: RUF012
    security = [{}]  # noqa: RUF012

    @route("/healthz", http_method=PROBED_BY, media_type=MediaType.TEXT)
    async def healthz(self) -> str:
        """The process is alive; it says nothing of whether it can serve."""
        return "ok"

    @route("/readyz", http_method=PROBED_BY)
    async def readyz(self, store: NamedDependency[Store], report: NamedDependency[Any]) -> Response[Readiness]:
        """200 if every collaborator is ready, else 503; both say of each what is wrong with it."""
        trouble, told = await asyncio.gather(_trouble(store), report())
        reasons = {"store": trouble, **told.checks}
        found = {name: Check(ready=not reason, reason=reason) for name, reason in reasons.items()}
        found |= {name: Check(ready=True, reason=note) for name, note in told.notes.items()}
        readiness = Readiness(ready=all(check.ready for check in found.values()), checks=found)
        return Response(readiness, status_code=200 if readiness.ready else 503)

    @get("/metrics", media_type=MediaType.TEXT)
    async def metrics(self, report: NamedDependency[Any]) -> Response[bytes]:
        """Prometheus' text format."""
        told = await report()
        return Response(generate_latest(Shown(told.families)), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


async def _trouble(store: Store) -> str | None:
    try:
        async with asyncio.timeout(STORE_S_MAX):
            await store.ready()
    except StoreFault as fault:
        return str(fault)
    except TimeoutError:
        return f"the store has not answered within {STORE_S_MAX:g} s"
    return None


# ---- tenants -----------------------------------------------------------------------------------------------


class NewTenant(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    limits: Limits = Limits()


class LimitsChange(Struct, frozen=True, forbid_unknown_fields=True):
    """Fields left out stay as they are; null lifts the limit."""

    rpm: int | UnsetType | None = UNSET
    tpm: int | UnsetType | None = UNSET
    concurrent: int | UnsetType | None = UNSET
    budget_day_nano: int | UnsetType | None = UNSET
    budget_month_nano: int | UnsetType | None = UNSET


class TenantChange(Struct, frozen=True, forbid_unknown_fields=True):
    limits: LimitsChange = LimitsChange()
    disabled: bool | UnsetType = UNSET


class TenantRoutes(Controller):
    path = "/tenants"
    tags = ["tenants"]  # noqa: RUF012

    @get()
    async def index(self, issuer: NamedDependency[Issuer]) -> list[TenantView]:
        """All tenants, by name, and what they have spent this day and this month."""
        return await issuer.tenants()

    @post()
    async def add(self, data: JSONBody[NewTenant], issuer: NamedDependency[Issuer]) -> TenantRow:
        """Add a tenant."""
        return await issuer.add_tenant(data.name, data.limits)

    @patch("/{name:str}")
    async def change(
        self, name: FromPath[str], data: JSONBody[TenantChange], issuer: NamedDependency[Issuer]
    ) -> TenantRow:
        """Change limits, or disable and enable; takes effect within half a second."""
        changed = {key: value for key, value in msgspec.structs.asdict(data.limits).items() if value is not UNSET}
        disabled = None if data.disabled is UNSET else data.disabled
        return await issuer.set_tenant(name, limits=changed, disabled=disabled)

    @delete("/{name:str}")
    async def remove(self, name: FromPath[str], issuer: NamedDependency[Issuer]) -> None:
        """Remove a tenant and its keys; its usage stays."""
        await issuer.remove_tenant(name)


# ---- keys --------------------------------------------------------------------------------------------------


class NewKey(Struct, frozen=True, forbid_unknown_fields=True):
    tenant: str
    name: str = ""
    env: str = "live"
    models: tuple[str, ...] = ("*",)
    routes: tuple[str, ...] = ("*",)
    limits: Limits = Limits()
    lifetime_s: float | None = None


class Rotation(Struct, frozen=True, forbid_unknown_fields=True):
    overlap_s: float = 86_400.0
    """How long the secret before stays valid."""


class IssuedKey(Struct, frozen=True):
    id: str
    key: str
    """Shown this once."""


class KeyRoutes(Controller):
    path = "/keys"
    tags = ["keys"]  # noqa: RUF012

    @get()
    async def index(self, issuer: NamedDependency[Issuer], tenant: FromQuery[str | None] = None) -> list[KeyView]:
        """All keys, or one tenant's, and what they have spent this day and this month; never their secrets."""
        return await issuer.keys(tenant=tenant)

    @post()
    async def add(self, data: JSONBody[NewKey], issuer: NamedDependency[Issuer]) -> IssuedKey:
        """Issue a key. The answer is the only place where it is ever shown."""
        return _issued(await issuer.add_key(**msgspec.structs.asdict(data)))

    @post("/{id:str}/rotate")
    async def rotate(self, id: FromPath[str], data: JSONBody[Rotation], issuer: NamedDependency[Issuer]) -> IssuedKey:
        """A new secret for the key; the one before stays valid for a while."""
        return _issued(await issuer.rotate_key(id, overlap_s=data.overlap_s))

    @delete("/{id:str}")
    async def revoke(self, id: FromPath[str], issuer: NamedDependency[Issuer]) -> None:
        """Refuse the key from now on, everywhere within half a second."""
        await issuer.revoke_key(id)


def _issued(minted: Minted) -> IssuedKey:
    return IssuedKey(minted.id, minted.text)


# ---- models, aliases and usage --------------------------------------------------------------------------------------


class ModelRoutes(Controller):
    path = "/models"
    tags = ["models"]  # noqa: RUF012

    @get()
    async def index(self, report: NamedDependency[Any]) -> list[ModelLook]:
        """Every model's queue and replicas as they are now."""
        return list((await report()).models)


class Shares(Struct, frozen=True, forbid_unknown_fields=True):
    weights: dict[str, int]
    """Model → its share of the calls."""


class AliasRoutes(Controller):
    path = "/aliases"
    tags = ["aliases"]  # noqa: RUF012

    @get()
    async def index(self, aliases: NamedDependency[Aliases]) -> list[AliasRow]:
        """All aliases, by name."""
        return await aliases.store.aliases()

    @put("/{name:path}")
    async def set(self, name: FromPath[str], data: JSONBody[Shares], aliases: NamedDependency[Aliases]) -> AliasRow:
        """Let a name stand for these models, whatever it stood for; takes effect within half a second."""
        return await aliases.set(name.removeprefix("/"), data.weights)

    @delete("/{name:path}")
    async def remove(self, name: FromPath[str], aliases: NamedDependency[Aliases]) -> None:
        """Remove an alias; its models stay."""
        await aliases.store.remove_alias(name.removeprefix("/"))


Limit = Annotated[int, QueryParameter(ge=1, le=10_000)]


class UsageRoutes(Controller):
    path = "/usage"
    tags = ["usage"]  # noqa: RUF012

    @get()
    async def totals(
        self,
        store: NamedDependency[Store],
        tenant: FromQuery[str | None] = None,
        key: FromQuery[str | None] = None,
        model: FromQuery[str | None] = None,
        since_s: FromQuery[float | None] = None,
        until_s: FromQuery[float | None] = None,
        by: FromQuery[By] = "tenant",
    ) -> list[UsageTotal]:
        """Sums of what was used, as far as it has reached the store (half a second behind the calls)."""
        where = UsageFilter(tenant=tenant, key=key, model=model, since_s=since_s, until_s=until_s)
        return await store.usage_totals(where, by=by)

    @get("/records")
    async def records(
        self,
        store: NamedDependency[Store],
        tenant: FromQuery[str | None] = None,
        key: FromQuery[str | None] = None,
        model: FromQuery[str | None] = None,
        since_s: FromQuery[float | None] = None,
        until_s: FromQuery[float | None] = None,
        limit: Limit = 100,
    ) -> list[Record]:
        """One record for each call, newest first."""
        where = UsageFilter(tenant=tenant, key=key, model=model, since_s=since_s, until_s=until_s)
        return await store.usage(where, limit=limit)


# ---- refusals ----------------------------------------------------------------------------------------------


class Conflict(GatewayError):
    status, type, code = 409, "invalid_request_error", "already_exists"


class StoreDown(GatewayError):
    status, type, code, retryable = 503, "server_error", "store_unavailable", True


def _found(response: Response[Any]) -> Response[Any]:
    """Litestar's own page for what is not there is HTML."""
    if response.status_code == 404:
        raise NotFoundException
    return response


def _refuse(request: Request[Any, Any, Any], fault: Exception) -> Response[bytes]:
    """Every error of this plane, in the one shape the data plane has too."""
    error = _as_gateway_error(request, fault)
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    return Response(error.body(), status_code=error.status, media_type=MediaType.JSON, headers=headers)


def _as_gateway_error(request: Request[Any, Any, Any], fault: Exception) -> GatewayError:
    match fault:
        case GatewayError():
            return fault
        case Unfit():
            return BadRequest(_sentence(str(fault)))
        case Missing():
            return NotFound(_sentence(str(fault)))
        case Taken():
            return Conflict(_sentence(str(fault)))
        case StoreFault():
            return StoreDown(_sentence(str(fault)))
        case HTTPException(status_code=404):
            return NotFound(f"There is nothing at {request.url.path}; /schema/openapi.json lists what there is.")
        case HTTPException(status_code=405):
            return MethodNotAllowed(f"{request.url.path} does not take {request.method}.")
        case HTTPException(status_code=413):
            return TooLarge(f"The body is longer than {BODY_BYTES_MAX} bytes.")
        case RecursionError():
            return BadRequest("The body is nested too deeply.")
        case HTTPException(status_code=500, __cause__=msgspec.ValidationError() as cause) if "$.data" in str(cause):
            # For some wrong types, e.g. text for a list, Litestar blames itself.
            return BadRequest(field_error(str(cause)).removeprefix("data."))
        case HTTPException(status_code=400, extra=extra):
            return BadRequest(*_wrong_field(fault, extra))
    log.error("the admin API failed at %s %s", request.method, request.url.path, exc_info=fault)
    return GatewayError("The admin API failed; the gateway's log says how.")


def _wrong_field(fault: HTTPException, extra: Any) -> tuple[str]:
    """Litestar's finding as one sentence; its own text quotes neither the body nor a header."""
    if isinstance(extra, list) and extra:
        field = extra[0].get("key", "data")
        return (f"{'body' if field == 'data' else field}: {extra[0].get('message', fault.detail)}.",)
    return (_sentence(fault.detail),)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
