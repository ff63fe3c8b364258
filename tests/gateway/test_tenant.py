import asyncio
import hashlib
import hmac
import os
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.call import Limits
from gateway.errors import Forbidden, KeyExpired, Unauthenticated
from gateway.key import ALPHABET, Pepper, Unfit, kept, mint, parse, pepper_of
from gateway.sqlite import SqliteStore
from gateway.store import AliasRow, KeyRow, Snapshot, Taken, TenantRow, Unreachable
from gateway.tenant import LIFETIME_S_MAX, POLL_S, STALE_S, Issuer, Tenants
from tests.fakes import FakeClock

PEPPER_TEXT = "a pepper long enough"
PEPPER = Pepper(PEPPER_TEXT.encode())
ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "headrace.db")
    await store.open()
    yield store
    await store.aclose()


@pytest.fixture
async def issuer(store: SqliteStore, clock: FakeClock) -> Issuer:
    issuer = Issuer(store=store, pepper=PEPPER, clock=clock)
    await issuer.add_tenant("acme", Limits(rpm=10))
    return issuer


@pytest.fixture
async def tenants(store: SqliteStore, clock: FakeClock) -> AsyncIterator[Tenants]:
    tenants = Tenants(store=store, pepper=PEPPER, clock=clock)
    await tenants.open()
    yield tenants
    await tenants.aclose()


async def next_look(tenants: Tenants, clock: FakeClock) -> None:
    """Let the follower look at the store once."""
    await clock.until_asleep()
    clock.advance(POLL_S)
    await clock.until_asleep()


# ---- the key's text


def test_a_minted_key_has_the_published_form() -> None:
    minted = mint(pepper=PEPPER, env="live")
    head, env, id, secret, checksum = minted.text.split("_")
    assert (head, env, id) == ("hr", "live", minted.id)
    assert (len(id), len(checksum)) == (10, 6)
    assert len(ALPHABET) ** len(secret) >= 2**160
    assert set(id + secret + checksum) <= set(ALPHABET)
    assert parse(minted.text) == (env, id, secret)


def test_no_two_keys_are_alike() -> None:
    minted = [mint(pepper=PEPPER, env="live") for _ in range(1_000)]
    assert len({it.id for it in minted}) == len({it.digest for it in minted}) == 1_000


@given(position=st.integers(0, 10_000), other=st.characters())
def test_a_key_with_any_one_character_changed_is_refused_unread(position: int, other: str) -> None:
    key = mint(pepper=PEPPER, env="live").text
    at = position % len(key)
    changed = key[:at] + other + key[at + 1 :]
    assert (parse(changed) is None) == (changed != key)


@given(st.text(max_size=200))
def test_no_text_but_a_key_is_read_as_one(text: str) -> None:
    assert parse(text) is None
    assert parse(f"hr_{text}") is None


@pytest.mark.parametrize(
    "change",
    [str.lower, str.upper, lambda key: key + "\n", lambda key: " " + key, lambda key: key[:-1]],
    ids=["lower", "upper", "line end", "space", "cut"],
)
def test_a_mangled_key_is_refused_unread(change: Callable[[str], str]) -> None:
    assert parse(change(mint(pepper=PEPPER, env="live").text)) is None


def test_an_endless_key_is_not_even_summed() -> None:
    assert parse("hr_" + "a" * 10_000_000) is None


@pytest.mark.parametrize("env", ["", "Live", "a_b", "x" * 17, "é"])
def test_an_environment_that_does_not_fit_in_a_key_is_unfit(env: str) -> None:
    with pytest.raises(Unfit, match="environment"):
        mint(pepper=PEPPER, env=env)


def test_a_minted_key_keeps_its_text_out_of_its_repr() -> None:
    minted = mint(pepper=PEPPER, env="live")
    assert repr(minted) == f"Minted(id={minted.id!r})"
    assert str(minted) == repr(minted)


@given(key=st.binary(max_size=100), secret=st.text(st.characters(codec="utf-8"), max_size=200))
def test_a_digest_is_hmac_sha_256(key: bytes, secret: str) -> None:
    assert Pepper(key).digest(secret) == hmac.new(key, secret.encode(), hashlib.sha256).digest()


# ---- who is calling


async def test_a_fresh_key_stands_for_its_tenant(issuer: Issuer, tenants: Tenants) -> None:
    minted = await issuer.add_key(tenant="acme", models=("chat",), limits=Limits(tpm=5), lifetime_s=60)
    await tenants.refresh()
    principal = tenants.authenticate(minted.text)
    assert (principal.tenant, principal.key_id, principal.models) == ("acme", minted.id, ("chat",))
    assert (principal.tenant_limits, principal.key_limits) == (Limits(rpm=10), Limits(tpm=5))
    assert principal.expires_s == tenants.clock.wall_s() + 60


async def test_whatever_is_not_a_live_key_gets_one_answer(issuer: Issuer, tenants: Tenants) -> None:
    revoked = await issuer.add_key(tenant="acme")
    await issuer.revoke_key(revoked.id)
    known = await issuer.add_key(tenant="acme")
    await tenants.refresh()
    stranger = mint(pepper=PEPPER, env="live").text
    guess = mint(pepper=PEPPER, env="live", id=known.id).text
    other_env = mint(pepper=PEPPER, env="test", id=known.id).text
    messages = set()
    for key in (revoked.text, stranger, guess, other_env, known.text[:-1], "sk-123", "hr____", "\udcff", "🔑"):
        with pytest.raises(Unauthenticated) as refusal:
            tenants.authenticate(key)
        messages.add(refusal.value.message)
        assert key not in refusal.value.message
    assert len(messages) == 1


@pytest.mark.parametrize("key", [None, ""])
async def test_no_key_is_told_how_to_send_one(tenants: Tenants, key: str | None) -> None:
    with pytest.raises(Unauthenticated, match="Authorization: Bearer"):
        tenants.authenticate(key)


async def test_the_secret_of_one_key_opens_no_other(issuer: Issuer, tenants: Tenants) -> None:
    first, second = await issuer.add_key(tenant="acme"), await issuer.add_key(tenant="acme")
    await tenants.refresh()
    stolen = first.text.replace(first.id, second.id).rpartition("_")[0]
    number, digits = crc32(stolen.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    forged = f"{stolen}_{digits}"
    assert parse(forged) is not None
    with pytest.raises(Unauthenticated):
        tenants.authenticate(forged)


async def test_a_key_expires_to_the_second_and_says_so(issuer: Issuer, tenants: Tenants, clock: FakeClock) -> None:
    minted = await issuer.add_key(tenant="acme", lifetime_s=60)
    await tenants.refresh()
    clock.advance(59)
    assert tenants.authenticate(minted.text).key_id == minted.id
    clock.advance(1)
    with pytest.raises(KeyExpired, match=minted.id):
        tenants.authenticate(minted.text)


async def test_expiry_is_told_only_to_who_holds_the_secret(issuer: Issuer, tenants: Tenants, clock: FakeClock) -> None:
    minted = await issuer.add_key(tenant="acme", lifetime_s=60)
    await tenants.refresh()
    clock.advance(61)
    with pytest.raises(Unauthenticated):
        tenants.authenticate(mint(pepper=PEPPER, env="live", id=minted.id).text)


async def test_a_rotated_key_has_two_secrets_until_the_overlap_ends(
    issuer: Issuer, tenants: Tenants, clock: FakeClock
) -> None:
    old = await issuer.add_key(tenant="acme")
    new = await issuer.rotate_key(old.id, overlap_s=60)
    await tenants.refresh()
    assert new.id == old.id
    assert tenants.authenticate(old.text) == tenants.authenticate(new.text)
    clock.advance(60)
    assert tenants.authenticate(new.text).key_id == old.id
    with pytest.raises(Unauthenticated):
        tenants.authenticate(old.text)


async def test_rotating_again_ends_the_oldest_secret(issuer: Issuer, tenants: Tenants) -> None:
    first = await issuer.add_key(tenant="acme")
    second = await issuer.rotate_key(first.id, overlap_s=60)
    third = await issuer.rotate_key(first.id, overlap_s=60)
    await tenants.refresh()
    assert tenants.authenticate(second.text) == tenants.authenticate(third.text)
    with pytest.raises(Unauthenticated):
        tenants.authenticate(first.text)


async def test_rotating_with_no_overlap_ends_the_old_secret_now(issuer: Issuer, tenants: Tenants) -> None:
    old = await issuer.add_key(tenant="acme")
    await issuer.rotate_key(old.id, overlap_s=0)
    await tenants.refresh()
    with pytest.raises(Unauthenticated):
        tenants.authenticate(old.text)


async def test_a_revoked_key_is_not_brought_back_by_rotating_it(issuer: Issuer) -> None:
    minted = await issuer.add_key(tenant="acme")
    await issuer.revoke_key(minted.id)
    with pytest.raises(Unfit, match="revoked"):
        await issuer.rotate_key(minted.id, overlap_s=60)


async def test_revoking_ends_both_secrets(issuer: Issuer, tenants: Tenants) -> None:
    old = await issuer.add_key(tenant="acme")
    new = await issuer.rotate_key(old.id, overlap_s=60)
    await issuer.revoke_key(old.id)
    await tenants.refresh()
    for key in (old.text, new.text):
        with pytest.raises(Unauthenticated):
            tenants.authenticate(key)


async def test_the_keys_of_a_disabled_tenant_are_forbidden_until_it_is_enabled(
    issuer: Issuer, tenants: Tenants
) -> None:
    minted = await issuer.add_key(tenant="acme")
    await issuer.set_tenant("acme", limits={}, disabled=True)
    await tenants.refresh()
    with pytest.raises(Forbidden, match="'acme' is disabled"):
        tenants.authenticate(minted.text)
    await issuer.set_tenant("acme", limits={}, disabled=False)
    await tenants.refresh()
    assert tenants.authenticate(minted.text).tenant_limits == Limits(rpm=10)


async def test_who_was_let_in_earlier_is_looked_at_again_before_the_call(
    issuer: Issuer, tenants: Tenants, clock: FakeClock
) -> None:
    minted = await issuer.add_key(tenant="acme", lifetime_s=100)
    await tenants.refresh()
    shown = tenants.authenticate(minted.text)
    assert tenants.renew(shown) is shown
    await issuer.set_tenant("acme", limits={"rpm": 2}, disabled=None)
    await tenants.refresh()
    assert tenants.renew(shown).tenant_limits == Limits(rpm=2)
    await issuer.set_tenant("acme", limits={}, disabled=True)
    await tenants.refresh()
    with pytest.raises(Forbidden):
        tenants.renew(shown)
    await issuer.set_tenant("acme", limits={}, disabled=False)
    await issuer.revoke_key(minted.id)
    await tenants.refresh()
    with pytest.raises(Unauthenticated):
        tenants.renew(shown)


async def test_the_keys_of_a_removed_tenant_are_unknown(issuer: Issuer, tenants: Tenants) -> None:
    minted = await issuer.add_key(tenant="acme")
    await tenants.refresh()
    await issuer.remove_tenant("acme")
    await tenants.refresh()
    with pytest.raises(Unauthenticated):
        tenants.authenticate(minted.text)


async def test_another_pepper_knows_no_key(issuer: Issuer, store: SqliteStore, clock: FakeClock) -> None:
    minted = await issuer.add_key(tenant="acme")
    elsewhere = Tenants(store=store, pepper=Pepper(b"another"), clock=clock)
    await elsewhere.refresh()
    with pytest.raises(Unauthenticated):
        elsewhere.authenticate(minted.text)


@pytest.mark.parametrize(
    ("models", "routes", "model", "route", "allowed"),
    [
        (("*",), ("*",), "any/thing", "/v1/classify", True),
        (("chat", "support-*"), ("*",), "support-eu", "/v1/classify", True),
        (("chat", "support-*"), ("*",), "chat2", "/v1/classify", False),
        (("CHAT",), ("*",), "chat", "/v1/classify", False),
        (("*",), ("/v1/chat/*",), "chat", "/v1/chat/completions", True),
        (("*",), ("/v1/chat/*",), "chat", "/v1/embeddings", False),
        (("*",), ("/v1/embeddings", "/v1/c*"), "chat", "/v1/classify", True),
    ],
)
async def test_scopes_allow_what_their_globs_match(
    issuer: Issuer,
    tenants: Tenants,
    models: tuple[str, ...],
    routes: tuple[str, ...],
    model: str,
    route: str,
    allowed: bool,
) -> None:
    minted = await issuer.add_key(tenant="acme", models=models, routes=routes)
    await tenants.refresh()
    principal = tenants.authenticate(minted.text)
    if allowed:
        tenants.authorize(principal, model, route)
    else:
        with pytest.raises(Forbidden, match=minted.id):
            tenants.authorize(principal, model, route)


# ---- following the store


async def test_a_change_is_followed_at_the_next_look(issuer: Issuer, tenants: Tenants, clock: FakeClock) -> None:
    minted = await issuer.add_key(tenant="acme")
    with pytest.raises(Unauthenticated):
        tenants.authenticate(minted.text)
    await next_look(tenants, clock)
    assert tenants.authenticate(minted.text).tenant == "acme"
    await issuer.revoke_key(minted.id)
    await next_look(tenants, clock)
    with pytest.raises(Unauthenticated):
        tenants.authenticate(minted.text)


async def test_whoever_else_lives_by_the_snapshot_is_told_of_each(store: SqliteStore, clock: FakeClock) -> None:
    told: list[Snapshot] = []
    tenants = Tenants(store=store, pepper=PEPPER, clock=clock, listeners=(told.append,))
    await tenants.open()
    await store.set_alias(AliasRow(name="both", weights={"chat": 1}, changed_s=1.0))
    await next_look(tenants, clock)
    assert [[it.name for it in snapshot.aliases] for snapshot in told] == [[], ["both"]]
    await next_look(tenants, clock)
    assert len(told) == 2
    await tenants.aclose()


async def test_a_look_that_fails_is_not_the_last(
    store: SqliteStore, issuer: Issuer, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    faults: list[Exception] = []

    def listener(_: Snapshot) -> None:
        if faults:
            raise faults.pop()

    tenants = Tenants(store=store, pepper=PEPPER, clock=clock, listeners=(listener,))
    await tenants.open()
    faults.append(RuntimeError("can't start new thread"))
    minted = await issuer.add_key(tenant="acme")
    await next_look(tenants, clock)
    assert "keys and tenants stay as they are: can't start new thread" in caplog.text
    assert tenants.trouble() is not None
    await next_look(tenants, clock)
    assert tenants.authenticate(minted.text).tenant == "acme"
    assert tenants.trouble() is None
    await tenants.aclose()


def test_a_look_comes_often_enough_for_the_published_half_second() -> None:
    assert POLL_S < 0.5


async def test_another_process_is_followed(
    issuer: Issuer, tenants: Tenants, store: SqliteStore, clock: FakeClock
) -> None:
    """The command adds and revokes a key while this process follows."""
    state = store.path.parent
    (state / "pepper").write_text(PEPPER_TEXT)
    (state / "headrace.toml").write_text(CONFIG)
    shown = await headrace(state, "key", "add", "--tenant", "acme")
    key, id = shown["key"], shown["id"]
    await next_look(tenants, clock)
    assert tenants.authenticate(key).key_id == id
    await headrace(state, "key", "revoke", id)
    await next_look(tenants, clock)
    with pytest.raises(Unauthenticated):
        tenants.authenticate(key)


CONFIG = '[[models]]\nname = "chat"\n[[models.replicas]]\nkind = "echo"\n'


async def headrace(state: Path, *arguments: str) -> dict[str, str]:
    import msgspec

    command = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *arguments,
        "--json",
        cwd=state,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HEADRACE_STATE": str(state)},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await command.communicate()
    assert command.returncode == 0
    return msgspec.json.decode(out, type=dict[str, str])


class Failing(SqliteStore):
    """A store that can be made to fail, and to hang."""

    fault = ""

    async def version(self) -> int:
        if self.fault:
            raise Unreachable(self.fault)
        return await super().version()


async def test_a_failing_store_leaves_known_keys_working_and_says_so(tmp_path: Path, clock: FakeClock) -> None:
    store = Failing(tmp_path / "headrace.db")
    await store.open()
    issuer = Issuer(store=store, pepper=PEPPER, clock=clock)
    await issuer.add_tenant("acme", Limits())
    minted = await issuer.add_key(tenant="acme")
    tenants = Tenants(store=store, pepper=PEPPER, clock=clock)
    await tenants.open()
    assert tenants.trouble() is None

    store.fault = "the disk is gone"
    await next_look(tenants, clock)
    assert tenants.authenticate(minted.text).tenant == "acme"
    assert "the disk is gone" in (tenants.trouble() or "")
    assert tenants.age_s() == pytest.approx(POLL_S)

    store.fault = ""
    await issuer.revoke_key(minted.id)
    await next_look(tenants, clock)
    assert tenants.trouble() is None
    with pytest.raises(Unauthenticated):
        tenants.authenticate(minted.text)
    await tenants.aclose()
    await store.aclose()


async def test_a_store_that_only_hangs_is_trouble_too(tenants: Tenants, clock: FakeClock) -> None:
    clock.advance(STALE_S)
    assert "takes long to answer" in (tenants.trouble() or "")


async def test_a_store_that_fails_at_the_start_starts_nothing(tmp_path: Path, clock: FakeClock) -> None:
    store = Failing(tmp_path / "headrace.db")
    store.fault = "the disk is gone"
    with pytest.raises(Unreachable):
        await Tenants(store=store, pepper=PEPPER, clock=clock).open()
    await store.aclose()


# ---- issuing


async def test_the_store_holds_no_usable_secret(issuer: Issuer, store: SqliteStore) -> None:
    old = await issuer.add_key(tenant="acme", name="laptop")
    new = await issuer.rotate_key(old.id, overlap_s=60)
    with closing(sqlite3.connect(store.path)) as database:
        dump = "\n".join(database.iterdump()).encode()
    dump += b"".join(file.read_bytes() for file in store.path.parent.glob("headrace.db*"))
    assert old.id.encode() in dump
    for key in (old.text, new.text):
        secret = key.split("_")[3]
        for start in range(len(secret) - 8):
            assert secret[start : start + 8].encode() not in dump
        # Without the pepper a digest can't be recomputed from a guessed secret either.
        for plain in (hashlib.sha256(secret.encode()), hashlib.sha256(key.encode())):
            assert plain.digest() not in dump
            assert plain.hexdigest().encode() not in dump


@pytest.mark.parametrize("name", ["", "two words", "-dash", "a" * 65, "né", "a\nb", "../up"])
async def test_a_name_that_is_none_is_unfit(issuer: Issuer, name: str) -> None:
    with pytest.raises(Unfit, match="no name for a tenant"):
        await issuer.add_tenant(name, Limits())


@pytest.mark.parametrize("limits", [Limits(rpm=-1), Limits(tpm=2**31), Limits(concurrent=-5)])
async def test_a_limit_out_of_range_is_unfit(issuer: Issuer, limits: Limits) -> None:
    with pytest.raises(Unfit, match="whole number"):
        await issuer.add_tenant("other", limits)
    with pytest.raises(Unfit, match="whole number"):
        await issuer.add_key(tenant="acme", limits=limits)


@pytest.mark.parametrize("lifetime_s", [0.0, -1.0, float("nan")])
async def test_a_key_that_never_lives_is_unfit(issuer: Issuer, lifetime_s: float) -> None:
    with pytest.raises(Unfit, match="expire"):
        await issuer.add_key(tenant="acme", lifetime_s=lifetime_s)


@pytest.mark.parametrize("glob", ["", "x" * 201])
async def test_a_glob_that_is_none_is_unfit(issuer: Issuer, glob: str) -> None:
    with pytest.raises(Unfit, match="glob"):
        await issuer.add_key(tenant="acme", models=(glob,))


async def test_changing_one_limit_keeps_the_others(issuer: Issuer) -> None:
    await issuer.set_tenant("acme", limits={"tpm": 5}, disabled=None)
    row = await issuer.set_tenant("acme", limits={"rpm": None}, disabled=None)
    assert row.limits == Limits(rpm=None, tpm=5)
    assert await issuer.store.tenant("acme") == row


class Slow(SqliteStore):
    """Between what a caller reads of a tenant and what it then writes, someone else disables it."""

    async def tenant(self, name: str) -> TenantRow:
        row = await super().tenant(name)
        await super().set_tenant(name, limits={}, disabled=True)
        return row


async def test_a_change_of_limits_never_brings_a_disabled_tenant_back(tmp_path: Path, clock: FakeClock) -> None:
    store = Slow(tmp_path / "slow.db")
    await store.open()
    issuer = Issuer(store=store, pepper=PEPPER, clock=clock)
    await issuer.add_tenant("acme", Limits())
    await asyncio.gather(
        issuer.set_tenant("acme", limits={}, disabled=True),
        issuer.set_tenant("acme", limits={"rpm": 3}, disabled=None),
    )
    (row,) = await store.tenants()
    await store.aclose()
    assert (row.disabled, row.limits) == (True, Limits(rpm=3))


@pytest.mark.parametrize("s", [1e300, float("inf"), float("nan"), LIFETIME_S_MAX * 1.01])
async def test_times_beyond_a_century_are_unfit(issuer: Issuer, s: float) -> None:
    with pytest.raises(Unfit, match="100 years"):
        await issuer.add_key(tenant="acme", lifetime_s=s)
    minted = await issuer.add_key(tenant="acme", lifetime_s=LIFETIME_S_MAX)
    with pytest.raises(Unfit, match="100 years"):
        await issuer.rotate_key(minted.id, overlap_s=s)


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2Jcleared", "tab\t", "right\u202eleft"])
async def test_text_that_could_upset_a_terminal_is_unfit(issuer: Issuer, text: str) -> None:
    with pytest.raises(Unfit, match="control"):
        await issuer.add_key(tenant="acme", name=text)
    with pytest.raises(Unfit, match="control"):
        await issuer.add_key(tenant="acme", models=(text,))


async def test_a_key_that_may_use_nothing_is_unfit(issuer: Issuer) -> None:
    with pytest.raises(Unfit, match="models"):
        await issuer.add_key(tenant="acme", models=())
    with pytest.raises(Unfit, match="routes"):
        await issuer.add_key(tenant="acme", routes=())


async def test_keys_are_shown_with_their_tenants_name_and_without_digests(issuer: Issuer) -> None:
    await issuer.add_tenant("other", Limits())
    minted = await issuer.add_key(tenant="acme", name="laptop")
    await issuer.add_key(tenant="other")
    (view,) = await issuer.keys(tenant="acme")
    assert (view.id, view.tenant, view.name) == (minted.id, "acme", "laptop")
    assert not {"digest", "previous"} & set(view.__struct_fields__)
    assert {view.tenant for view in await issuer.keys()} == {"acme", "other"}


async def test_a_tenant_of_a_taken_name_is_refused(issuer: Issuer) -> None:
    with pytest.raises(Taken):
        await issuer.add_tenant("acme", Limits())


async def test_a_key_row_of_a_vanished_tenant_opens_nothing(store: SqliteStore, clock: FakeClock) -> None:
    minted = mint(pepper=PEPPER, env="live")
    await store.add_tenant(TenantRow(id="t", name="ghost", created_s=0))
    await store.add_key(KeyRow(id=minted.id, tenant_id="t", env="live", digest=minted.digest, created_s=0))
    with sqlite3.connect(store.path) as other:
        other.execute("DELETE FROM tenants")  # past the foreign key, which is off for strangers
    other.close()
    tenants = Tenants(store=store, pepper=PEPPER, clock=clock)
    await tenants.refresh()
    with pytest.raises(Unauthenticated):
        tenants.authenticate(minted.text)


# ---- secrets on disk


def test_the_pepper_is_made_once_and_its_owners_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = pepper_of(state)
    assert stat.S_IMODE((state / "pepper").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert pepper_of(state).digest("x") == first.digest("x")
    assert pepper_of(tmp_path / "other").digest("x") != first.digest("x")
    assert [file.name for file in state.iterdir()] == ["pepper"]


@pytest.mark.parametrize("held", [b"", b"\n", b"short", b"\xff" * 64])
def test_a_secret_that_is_none_is_refused_and_its_file_named(tmp_path: Path, held: bytes) -> None:
    (tmp_path / "pepper").write_bytes(held)
    with pytest.raises(Unfit, match=r"/pepper .*remove"):
        pepper_of(tmp_path)
    assert (tmp_path / "pepper").read_bytes() == held


def test_all_that_make_a_secret_at_once_agree_on_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            path = tmp_path / f"secret-{number}"
            together = Barrier(8)

            def make(mine: int, path: Path = path, together: Barrier = together) -> str:
                together.wait(30)
                return kept(path, lambda: f"a long secret of {mine}")

            assert set(pool.map(make, range(8))) == {path.read_text().strip()}
    assert len(list(tmp_path.iterdir())) == 50
