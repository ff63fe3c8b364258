import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from gateway.alias import Aliases
from gateway.call import Limits, Outcome, Record
from gateway.edge.admin import BODY_BYTES_MAX, admin_app, admin_token
from gateway.fairness import Queue
from gateway.key import Pepper, Unfit
from gateway.replica import Health, State
from gateway.report import Family, ModelLook, Report, Sample
from gateway.sqlite import SqliteStore
from gateway.store import Store, Unreachable
from gateway.tenant import Issuer, Tenants
from tests.fakes import FakeClock

TOKEN = "the-admin-token"
SHOWN = {"authorization": f"Bearer {TOKEN}"}
OPEN = {"/healthz", "/readyz", "/metrics"}
LOOK = ModelLook(
    name="chat",
    queue=Queue(running=1, running_max=4, waiting=2, waiting_max=256, tenants_waiting=1),
    replicas=(Health(name="chat-0", kind="echo", state=State.ready, reason="", running=1, slots=4, ejected=False),),
)
AGE = Family(
    "headrace_tenants_age_seconds", "Age of the keys", "gauge", (Sample("headrace_tenants_age_seconds", {}, 3.0),)
)

Client = AsyncTestClient[Litestar]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "headrace.db")
    await store.open()
    yield store
    await store.aclose()


@pytest.fixture
async def tenants(store: SqliteStore) -> Tenants:
    return Tenants(store=store, pepper=Pepper(b"pepper"), clock=FakeClock())


@pytest.fixture
def troubles() -> dict[str, str | None]:
    """What is wrong with each collaborator, for a test to change."""
    return {"journal": None, "model chat": None}


@pytest.fixture
def app(store: SqliteStore, tenants: Tenants, troubles: dict[str, str | None]) -> Litestar:
    return admin_app(
        issuer=issuer_of(tenants),
        aliases=aliases_of(store),
        store=store,
        report=told(models=(LOOK,), checks=troubles, families=(AGE,)),
        token=TOKEN,
    )


def told(**given: Any) -> Callable[[], Awaitable[Report]]:
    async def report() -> Report:
        return Report(**given)

    return report


def issuer_of(tenants: Tenants) -> Issuer:
    return Issuer(store=tenants.store, pepper=tenants.pepper, clock=tenants.clock)


def aliases_of(store: Store) -> Aliases:
    return Aliases(store=store, models=["chat", "large/chat"], clock=FakeClock())


@pytest.fixture
async def stranger(app: Litestar) -> AsyncIterator[Client]:
    async with AsyncTestClient(app) as client:
        yield client


@pytest.fixture
async def client(app: Litestar) -> AsyncIterator[Client]:
    async with AsyncTestClient(app) as client:
        client.headers.update(SHOWN)
        yield client


@pytest.fixture
async def acme(client: Client) -> str:
    assert (await client.post("/tenants", json={"name": "acme", "limits": {"rpm": 5}})).status_code == 201
    return "acme"


def refusal(body: bytes) -> tuple[str, str]:
    """(code, message) of an error in the one shape errors have."""
    told = msgspec.json.decode(body)
    assert set(told) == {"type", "error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    return told["error"]["code"], told["error"]["message"]


# ---- who gets in


async def test_every_route_but_the_three_is_closed_to_strangers(app: Litestar, stranger: Client) -> None:
    seen = set()
    for route in app.routes:
        path = route.path.replace("{name:str}", "acme").replace("{id:str}", "abc").replace("{path:str}", "x")
        for method in route.methods:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
                answer = await stranger.request(method, path, headers=headers)
                if path in OPEN:
                    assert answer.status_code in (200, 204)
                else:
                    assert answer.status_code == 401, (method, path)
                    assert refusal(answer.content)[0] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
        seen.add(route.path)
    assert seen > OPEN
    assert {"/tenants", "/keys", "/keys/{id:str}/rotate", "/models", "/usage", "/schema/openapi.json"} < seen


@pytest.mark.parametrize("shown", ["Bearer", "Bearer ", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é"])
async def test_nearly_the_token_is_not_the_token(stranger: Client, shown: str) -> None:
    answer = await stranger.get("/tenants", headers={"authorization": shown.encode("latin-1")})
    assert answer.status_code == 401
    assert TOKEN not in answer.text


@pytest.mark.parametrize("shown", ["Bearer", "Bearer ", ""])
async def test_an_empty_token_opens_nothing(store: SqliteStore, tenants: Tenants, shown: str) -> None:
    app = admin_app(issuer=issuer_of(tenants), aliases=aliases_of(store), store=store, report=told(), token="")
    async with AsyncTestClient(app) as client:
        assert (await client.get("/tenants", headers={"authorization": shown})).status_code == 401


def test_an_empty_token_file_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "admin.token").touch()
    with pytest.raises(Unfit, match=r"admin\.token"):
        admin_token(tmp_path)


async def test_the_token_opens_whatever_the_case_of_its_scheme(stranger: Client) -> None:
    assert (await stranger.get("/tenants", headers={"authorization": f"bearer {TOKEN}"})).status_code == 200


def test_the_token_is_made_once_and_its_owners_alone(tmp_path: Path) -> None:
    token = admin_token(tmp_path)
    assert admin_token(tmp_path) == token
    assert len(token) >= 32
    assert stat.S_IMODE((tmp_path / "admin.token").stat().st_mode) == 0o600


# ---- health


async def test_a_gateway_whose_every_collaborator_is_well_is_ready(stranger: Client) -> None:
    answer = await stranger.get("/readyz")
    assert answer.status_code == 200
    well = {"ready": True, "reason": None}
    assert answer.json() == {"ready": True, "checks": {"store": well, "journal": well, "model chat": well}}


async def test_one_that_is_not_well_makes_it_unready_and_is_named(
    stranger: Client, troubles: dict[str, str | None]
) -> None:
    troubles["model chat"] = "chat-0: it is starting"
    answer = await stranger.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"]["model chat"] == {"ready": False, "reason": "chat-0: it is starting"}
    assert answer.json()["checks"]["journal"]["ready"]
    assert (await stranger.get("/healthz")).status_code == 200


async def test_head_answers_as_get_does_without_a_body(stranger: Client, troubles: dict[str, str | None]) -> None:
    for path in ("/healthz", "/readyz"):
        answer = await stranger.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    troubles["journal"] = "the disk is full"
    assert (await stranger.head("/readyz")).status_code == 503


class Gone(SqliteStore):
    async def version(self) -> int:
        raise Unreachable("the disk is gone")

    async def spent(self, *, day_s: float, month_s: float) -> list:
        raise Unreachable("the disk is gone")


async def test_a_store_that_fails_is_unready_and_a_503(tmp_path: Path) -> None:
    store = Gone(tmp_path / "gone.db")
    tenants = Tenants(store=store, pepper=Pepper(b"pepper"), clock=FakeClock())
    app = admin_app(
        issuer=issuer_of(tenants),
        aliases=aliases_of(store),
        store=store,
        report=told(),
        token=TOKEN,
    )
    async with AsyncTestClient(app) as client:
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["store"]["reason"]) == (503, "the disk is gone")
        answer = await client.get("/tenants", headers=SHOWN)
        assert (answer.status_code, refusal(answer.content)) == (503, ("store_unavailable", "The disk is gone."))


async def test_metrics_are_prometheus_text(stranger: Client) -> None:
    answer = await stranger.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nheadrace_tenants_age_seconds 3.0\n" in answer.text


# ---- tenants


async def test_a_tenant_is_added_shown_changed_and_removed(client: Client, acme: str) -> None:
    change = {"limits": {"tpm": 9, "rpm": None, "budget_month_nano": 5_000_000_000}, "disabled": True}
    changed = await client.patch("/tenants/acme", json=change)
    assert changed.status_code == 200
    assert changed.json()["limits"] == {
        "rpm": None,
        "tpm": 9,
        "concurrent": None,
        "budget_day_nano": None,
        "budget_month_nano": 5_000_000_000,
    }
    nothing_spent = {"spent_day_nano": 0, "spent_month_nano": 0}
    assert (await client.get("/tenants")).json() == [changed.json() | nothing_spent]
    kept = await client.patch("/tenants/acme", json={})
    assert kept.json() == changed.json()
    assert (await client.delete("/tenants/acme")).status_code == 204
    assert (await client.get("/tenants")).json() == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "says"),
    [
        ("POST", "/tenants", {"name": "acme"}, 409, "already_exists", "'acme'"),
        ("POST", "/tenants", {"name": "two words"}, 400, "invalid_request", "no name for a tenant"),
        ("POST", "/tenants", {"name": "b", "limits": {"rpm": -1}}, 400, "invalid_request", "rpm can't be -1"),
        (
            "POST",
            "/keys",
            {"tenant": "acme", "limits": {"budget_day_nano": 2**53}},
            400,
            "invalid_request",
            "budget_day_nano can't be",
        ),
        (
            "POST",
            "/tenants",
            {"name": "b", "limits": {"rpm": "x"}},
            400,
            "invalid_request",
            "limits.rpm: Expected",
        ),
        ("POST", "/tenants", {"name": "b", "admin": True}, 400, "invalid_request", "body: Object contains unknown"),
        ("POST", "/tenants", {"name": "b", "limits": {"bogus": 1}}, 400, "invalid_request", "`bogus`"),
        ("POST", "/keys", {"tenant": "acme", "limits": {"bogus": 1}}, 400, "invalid_request", "`bogus`"),
        ("PATCH", "/tenants/acme", {"limits": {"bogus": 1}}, 400, "invalid_request", "`bogus`"),
        ("POST", "/tenants", b"[" * 60_000, 400, "invalid_request", "nested"),
        ("POST", "/tenants", None, 400, "invalid_request", "body"),
        ("POST", "/tenants", {}, 400, "invalid_request", "name"),
        ("POST", "/tenants", b"{", 400, "invalid_request", ""),
        ("POST", "/tenants", b"x" * (BODY_BYTES_MAX + 1), 413, "request_too_large", "65536"),
        ("PATCH", "/tenants/nobody", {}, 404, "not_found", "'nobody'"),
        ("DELETE", "/tenants/nobody", None, 404, "not_found", "'nobody'"),
        ("POST", "/keys", {"tenant": "nobody"}, 404, "not_found", "'nobody'"),
        ("POST", "/keys", {"tenant": "acme", "env": "PROD"}, 400, "invalid_request", "environment"),
        ("POST", "/keys", {"tenant": "acme", "lifetime_s": -5}, 400, "invalid_request", "expire"),
        ("POST", "/keys", {"tenant": "acme", "lifetime_s": 1e300}, 400, "invalid_request", "100 years"),
        ("POST", "/keys", {"tenant": "acme", "models": "*"}, 400, "invalid_request", "models"),
        ("POST", "/keys", {"tenant": "acme", "models": []}, 400, "invalid_request", "models"),
        ("POST", "/keys", {"tenant": "acme", "name": "a\nb"}, 400, "invalid_request", "control"),
        ("POST", "/keys/nobody/rotate", None, 400, "invalid_request", "body"),
        ("POST", "/keys/nobody/rotate", b"null", 400, "invalid_request", "body"),
        ("POST", "/keys/nobody/rotate", {}, 404, "not_found", "'nobody'"),
        ("DELETE", "/keys/nobody", None, 404, "not_found", "'nobody'"),
        ("GET", "/keys?tenant=nobody", None, 404, "not_found", "'nobody'"),
        ("GET", "/usage?by=color", None, 400, "invalid_request", "by"),
        ("GET", "/usage?since_s=soon", None, 400, "invalid_request", "since_s"),
        ("GET", "/usage/records?limit=0", None, 400, "invalid_request", "limit"),
        ("GET", "/usage/records?limit=10001", None, 400, "invalid_request", "limit"),
        ("GET", "/nowhere", None, 404, "not_found", "/nowhere"),
        ("GET", "/schema/nowhere", None, 404, "not_found", "/schema/nowhere"),
        ("GET", "/keys/a/b", None, 404, "not_found", "/keys/a/b"),
        ("PUT", "/tenants", None, 405, "method_not_allowed", "PUT"),
    ],
)
async def test_what_is_wrong_is_told_in_one_shape(
    client: Client,
    acme: str,
    method: str,
    path: str,
    body: object,
    status: int,
    code: str,
    says: str,
) -> None:
    content = body if isinstance(body, bytes) else None if body is None else msgspec.json.encode(body)
    answer = await client.request(method, path, content=content, headers={"content-type": "application/json"})
    told_code, message = refusal(answer.content)
    assert (answer.status_code, told_code) == (status, code)
    assert says in message


async def test_a_fault_of_the_gateway_tells_nothing_of_its_inside(
    store: SqliteStore, tenants: Tenants, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> Report:
        raise RuntimeError("inside")

    app = admin_app(issuer=issuer_of(tenants), aliases=aliases_of(store), store=store, report=broken, token=TOKEN)
    async with AsyncTestClient(app) as client:
        answer = await client.get("/models", headers=SHOWN)
    assert answer.status_code == 500
    assert refusal(answer.content)[0] == "internal_error"
    assert "inside" not in answer.text
    assert "RuntimeError: inside" in caplog.text


# ---- keys


async def test_a_key_is_shown_once_and_works(client: Client, acme: str, tenants: Tenants) -> None:
    issued = (await client.post("/keys", json={"tenant": "acme", "models": ["chat*"], "lifetime_s": 60})).json()
    assert set(issued) == {"id", "key"}
    await tenants.refresh()
    principal = tenants.authenticate(issued["key"])
    assert (principal.key_id, principal.models) == (issued["id"], ("chat*",))

    rotated = (await client.post(f"/keys/{issued['id']}/rotate", json={"overlap_s": 5})).json()
    await tenants.refresh()
    assert tenants.authenticate(rotated["key"]) == tenants.authenticate(issued["key"])

    secrets = {key["key"].split("_")[3] for key in (issued, rotated)}
    for path in ("/keys", "/keys?tenant=acme", "/tenants", "/metrics", "/schema/openapi.json"):
        text = (await client.get(path)).text
        assert not any(secret in text for secret in secrets)
        assert "digest" not in text


async def test_a_revoked_key_stays_in_the_list_and_says_when(client: Client, acme: str, tenants: Tenants) -> None:
    id = (await client.post("/keys", json={"tenant": "acme"})).json()["id"]
    assert (await client.delete(f"/keys/{id}")).status_code == 204
    (key,) = (await client.get("/keys")).json()
    assert (key["id"], key["tenant"], key["revoked_s"]) == (id, "acme", tenants.clock.wall_s())


# ---- models, usage, documentation


async def test_models_are_shown_as_they_are_now(client: Client) -> None:
    (model,) = (await client.get("/models")).json()
    assert (model["name"], model["queue"]["waiting"], model["replicas"][0]["state"]) == ("chat", 2, "ready")


async def test_usage_is_summed_and_listed(client: Client, store: SqliteStore) -> None:
    records = [
        Record(
            id=f"r{number}",
            at_s=float(number),
            tenant_id="t",
            tenant="acme",
            key_id="k",
            model=model,
            route="/v1/chat/completions",
            stream=False,
            outcome=Outcome.served,
            tokens_in=10,
        )
        for number, model in enumerate(["chat", "chat", "relay"])
    ]
    await store.append_usage(records)
    totals = (await client.get("/usage?by=model")).json()
    assert [(total["name"], total["calls"], total["tokens_in"]) for total in totals] == [
        ("chat", 2, 20),
        ("relay", 1, 10),
    ]
    assert [total["calls"] for total in (await client.get("/usage?by=none&since_s=1&until_s=2")).json()] == [1]
    listed = (await client.get("/usage/records?tenant=acme&limit=2")).content
    assert msgspec.json.decode(listed, type=list[Record]) == records[:0:-1]


async def test_the_documentation_names_every_route_and_what_opens_it(app: Litestar, client: Client) -> None:
    schema = (await client.get("/schema/openapi.json")).json()
    assert {path for path in schema["paths"]} == {
        "/healthz",
        "/readyz",
        "/metrics",
        "/tenants",
        "/tenants/{name}",
        "/keys",
        "/keys/{id}",
        "/keys/{id}/rotate",
        "/models",
        "/aliases",
        "/aliases/{name}",
        "/usage",
        "/usage/records",
    }
    assert schema["security"] == [{"token": []}]
    for path in OPEN:
        assert schema["paths"][path]["get"]["security"] == [{}]
    for operations in schema["paths"].values():
        for operation in operations.values():
            assert operation["description"]


async def test_a_tenants_limits_come_back_as_limits(client: Client, acme: str) -> None:
    rows = (await client.get("/tenants")).json()
    assert msgspec.convert(rows[0]["limits"], Limits) == Limits(rpm=5)


# ---- aliases


async def test_an_alias_is_set_and_set_anew_and_removed(client: Client) -> None:
    for weights in ({"chat": 90, "large/chat": 10}, {"large/chat": 1}):
        answer = await client.put("/aliases/team/both", json={"weights": weights})
        assert answer.status_code == 200
        assert (await client.get("/aliases")).json() == [answer.json()]
        assert (answer.json()["name"], answer.json()["weights"]) == ("team/both", weights)
    assert (await client.delete("/aliases/team/both")).status_code == 204
    assert (await client.get("/aliases")).json() == []
    assert (await client.delete("/aliases/team/both")).status_code == 404


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("both", {"weights": {"nobody": 1}}, "There is no model 'nobody'"),
        ("both", {"weights": {"chat": 0}}, "a weight above 0"),
        ("both", {"weights": {"chat": 1.5}}, "weights"),
        ("both", {"chat": 1}, "chat"),
        ("chat", {"weights": {"chat": 1}}, "configured model's name"),
    ],
)
async def test_an_alias_that_can_t_be_is_refused(client: Client, name: str, body: Any, why: str) -> None:
    answer = await client.put(f"/aliases/{name}", json=body)
    assert answer.status_code == 400
    assert why in refusal(answer.content)[1]
    assert (await client.get("/aliases")).json() == []
