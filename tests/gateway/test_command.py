"""The `headrace` command: most of it called in this process, the rest as its users call it."""

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from gateway.__main__ import main
from gateway.app import Listener
from gateway.call import Outcome, Record
from gateway.config import ConfigError
from gateway.console import date_text, duration_s, moment_s
from gateway.key import parse

ROOT = Path(__file__).parents[2]
CONFIG = """
[server]
listen = "127.0.0.1:{listen}"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:{admin}"
[[models]]
name = "chat"
[[models.replicas]]
kind = "echo"
"""


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.status, self.err) == (0, "")
        return msgspec.json.decode(self.out)


Headrace = Callable[..., Ended]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder beside a configuration in the current folder."""
    (tmp_path / "headrace.toml").write_text(CONFIG.format(listen=0, admin=0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def headrace(state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Headrace:
    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return Ended(status, *capsys.readouterr())

    return run


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gateway", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


# ---- help and mistakes

COMMANDS = [
    ("serve",),
    ("check",),
    ("tenant", "add"),
    ("tenant", "list"),
    ("tenant", "set"),
    ("tenant", "disable"),
    ("tenant", "enable"),
    ("tenant", "remove"),
    ("key", "add"),
    ("key", "list"),
    ("key", "revoke"),
    ("key", "rotate"),
    ("model", "list"),
    ("alias", "set"),
    ("alias", "list"),
    ("alias", "remove"),
    ("usage",),
    ("engine", "install"),
    ("engine", "list"),
    ("engine", "remove"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_takes_config_and_json(headrace: Headrace, words: tuple[str, ...]) -> None:
    ended = headrace(*words, "--help")
    assert ended.status == 0
    assert "--config" in ended.out
    assert "--json" in ended.out


def test_the_help_lists_every_command_and_shows_examples(headrace: Headrace) -> None:
    ended = headrace("--help")
    assert ended.status == 0
    assert all(words[0] in ended.out for words in COMMANDS)
    assert "headrace key add --tenant acme" in ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("tenant", "add"),
        ("tenant", "add", "acme", "--rpm", "many"),
        ("key", "add"),
        ("key", "add", "--tenant", "acme", "--expires", "soon"),
        ("key", "rotate", "abc", "--overlap", "1"),
        ("usage", "--by", "color"),
        ("tenant", "add", "acme", "--budget-day", "-1"),
        ("tenant", "set", "acme", "--budget-month", "a lot"),
        ("key", "add", "--tenant", "acme", "--budget-day", "none"),
        ("usage", "--since", "yesterday"),
        ("tenant", "list", "--bogus"),
        ("usage", "--records", "--limit", "99999999999999999999"),
        ("usage", "--records", "--limit", "0"),
        ("key", "add", "--tenant", "acme", "--name", "\udcff"),
        ("key", "list", "--tenant", "\udcff"),
    ],
    ids=lambda it: ascii(" ".join(it)),
)
def test_a_wrong_command_line_is_one_line_and_status_2(headrace: Headrace, arguments: tuple[str, ...]) -> None:
    ended = headrace(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("headrace: ")
    assert ended.err.count("\n") == 1
    assert "--help" in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tenant", "add", "two words"), "no name for a tenant"),
        (("tenant", "add", "acme", "--rpm", "-1"), "rpm can't be -1"),
        (("tenant", "set", "nobody", "--rpm", "1"), "no tenant 'nobody'"),
        (("tenant", "remove", "nobody"), "no tenant 'nobody'"),
        (("key", "add", "--tenant", "nobody"), "no tenant 'nobody'"),
        (("key", "revoke", "nobody"), "no key with id 'nobody'"),
        (("key", "rotate", "nobody"), "no key with id 'nobody'"),
        (("key", "list", "--tenant", "nobody"), "no tenant 'nobody'"),
        (("key", "add", "--tenant", "nobody", "--expires", "99999999999w"), "100 years"),
        (("key", "add", "--tenant", "nobody", "--name", "two\nlines"), "control"),
        (("key", "add", "--tenant", "nobody", "--models"), "models"),
        (("alias", "set", "both", "chat=1", "nobody=1"), "no model 'nobody'"),
        (("alias", "set", "both", "chat"), "'chat' is no share"),
        (("alias", "set", "both", "chat=x"), "'chat=x' is no share"),
        (("alias", "set", "both", "chat=1", "chat=2"), "chat is given twice"),
        (("alias", "set", "both"), "a weight above 0"),
        (("alias", "set", "chat", "chat=1"), "configured model's name"),
        (("alias", "remove", "nobody"), "no alias 'nobody'"),
        (("check", "absent.toml"), "absent.toml"),
        (("tenant", "list", "--config", "absent.toml"), "absent.toml"),
        (("engine", "install", "bogus"), "bogus"),
        (("engine", "remove", "vllm", "1"), "vllm 1"),
    ],
    ids=lambda it: " ".join(it) if isinstance(it, tuple) else "",
)
def test_a_mistake_is_one_line_and_status_1(headrace: Headrace, arguments: tuple[str, ...], says: str) -> None:
    headrace("tenant", "add", "somebody")
    ended = headrace(*arguments, "--json")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("headrace: ")
    assert ended.err.count("\n") == 1
    assert says in ended.err


def test_a_state_folder_that_cannot_be_made_is_a_mistake_too(
    headrace: Headrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path / "file" / "state"))
    ended = headrace("tenant", "add", "acme")
    assert (ended.status, ended.err.count("\n")) == (1, 1)


@pytest.mark.parametrize("words", [("tenant", "list"), ("key", "list"), ("alias", "list"), ("usage",)], ids=" ".join)
def test_a_command_that_only_reads_makes_no_state(headrace: Headrace, state: Path, words: tuple[str, ...]) -> None:
    ended = headrace(*words, "--json")
    assert (ended.status, ended.out) == (1, "")
    assert f"no state folder {state}" in ended.err
    assert not state.exists()


def test_an_empty_pepper_is_a_mistake_and_named(headrace: Headrace, state: Path) -> None:
    headrace("tenant", "add", "acme")
    (state / "pepper").write_text("")
    ended = headrace("key", "add", "--tenant", "acme")
    assert (ended.status, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert str(state / "pepper") in ended.err


# ---- configuration


def test_check_says_what_is_served(headrace: Headrace, state: Path) -> None:
    assert headrace("check", "headrace.toml", "--json").json == {
        "ok": True,
        "state": str(state),
        "models": [{"name": "chat", "replicas": ["echo"]}],
    }
    assert "chat (echo)" in headrace("check").out


def test_check_names_the_field_that_is_wrong(headrace: Headrace, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('[[models]]\nname = "chat"\nreplicas = [{kind = "echo"}]\nwaiting_max = -1\n')
    ended = headrace("check", "bad.toml")
    assert ended.status == 1
    assert "bad.toml: models[0].waiting_max" in ended.err


def test_the_named_configuration_decides_where_the_state_lies(
    headrace: Headrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEADRACE_STATE")
    text = CONFIG.format(listen=0, admin=0) + f'[state]\npath = "{tmp_path}/elsewhere"\n'
    (tmp_path / "other.toml").write_text(text)
    headrace("tenant", "add", "acme", "--config", "other.toml")
    assert (tmp_path / "elsewhere" / "headrace.db").exists()


# ---- tenants and keys


def test_a_tenants_life(headrace: Headrace) -> None:
    added = headrace("tenant", "add", "acme", "--rpm", "10", "--tpm", "500", "--json").json
    no_budgets = {"budget_day_nano": None, "budget_month_nano": None}
    assert added["limits"] == {"rpm": 10, "tpm": 500, "concurrent": None} | no_budgets
    changed = headrace("tenant", "set", "acme", "--rpm", "none", "--concurrent", "2", "--json").json
    assert changed["limits"] == {"rpm": None, "tpm": 500, "concurrent": 2} | no_budgets
    assert headrace("tenant", "disable", "acme", "--json").json["disabled"]
    assert "disabled" in headrace("tenant", "list").out
    assert not headrace("tenant", "enable", "acme", "--json").json["disabled"]
    assert headrace("tenant", "list", "--json").json == [changed | {"spent_day_nano": 0, "spent_month_nano": 0}]
    assert headrace("tenant", "remove", "acme", "--json").json == {"removed": "acme"}
    assert headrace("tenant", "list", "--json").json == []


def test_a_keys_life(headrace: Headrace) -> None:
    headrace("tenant", "add", "acme")
    options = ("--models", "chat", "support-*", "--routes", "/v1/chat/*", "--expires", "30d", "--name", "laptop")
    issued = headrace("key", "add", "--tenant", "acme", *options, "--rpm", "5", "--json").json
    assert set(issued) == {"id", "key"}
    assert (parse(issued["key"]) or ("", "", ""))[:2] == ("live", issued["id"])
    (shown,) = headrace("key", "list", "--json").json
    assert shown["id"] == issued["id"]
    assert (shown["models"], shown["routes"], shown["name"]) == (["chat", "support-*"], ["/v1/chat/*"], "laptop")
    assert shown["expires_s"] - shown["created_s"] == 30 * 86_400
    assert shown["limits"]["rpm"] == 5
    rotated = headrace("key", "rotate", issued["id"], "--overlap", "1h", "--json").json
    assert rotated["id"] == issued["id"]
    assert rotated["key"] != issued["key"]
    assert headrace("key", "revoke", issued["id"], "--json").json == {"revoked": issued["id"]}
    listed = headrace("key", "list").out
    assert "revoked" in listed
    assert parse(issued["key"])[2] not in listed  # type: ignore[index]


def test_a_budgets_life(headrace: Headrace) -> None:
    added = headrace("tenant", "add", "acme", "--budget-day", "4.98", "--budget-month", "100", "--json").json
    assert (added["limits"]["budget_day_nano"], added["limits"]["budget_month_nano"]) == (4_980_000_000, 10**11)
    assert "budget_day=4.98 budget_month=100.00" in headrace("tenant", "list").out
    changed = headrace("tenant", "set", "acme", "--budget-day", "none", "--budget-month", "0.5", "--json").json
    assert (changed["limits"]["budget_day_nano"], changed["limits"]["budget_month_nano"]) == (None, 500_000_000)
    headrace("key", "add", "--tenant", "acme", "--budget-day", "0.000000001")
    (key,) = headrace("key", "list", "--json").json
    assert key["limits"]["budget_day_nano"] == 1


def test_an_alias_s_life(headrace: Headrace) -> None:
    set_first = headrace("alias", "set", "team/both", "chat=90", "--json").json
    assert (set_first["name"], set_first["weights"]) == ("team/both", {"chat": 90})
    assert headrace("alias", "set", "team/both", "chat=1").out == "alias team/both: chat=1\n"
    (shown,) = headrace("alias", "list", "--json").json
    assert shown["weights"] == {"chat": 1}
    assert "chat=1" in headrace("alias", "list").out
    assert headrace("alias", "remove", "team/both", "--json").json == {"removed": "team/both"}
    assert headrace("alias", "list", "--json").json == []


def test_a_key_is_shown_once_in_plain_words(headrace: Headrace) -> None:
    headrace("tenant", "add", "acme")
    lines = headrace("key", "add", "--tenant", "acme").out.splitlines()
    assert "once" in lines[0]
    assert parse(lines[1]) is not None


def test_a_saved_key_is_its_owners_alone(headrace: Headrace, tmp_path: Path) -> None:
    headrace("tenant", "add", "acme")
    saved = tmp_path / "demo.key"
    saved.write_text("an older one")
    saved.chmod(0o644)
    issued = headrace("key", "add", "--tenant", "acme", "--save", "demo.key", "--json").json
    assert saved.read_text() == issued["key"] + "\n"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert not list(tmp_path.glob(".demo.key*"))


def test_a_key_that_cannot_be_saved_is_not_issued(headrace: Headrace, tmp_path: Path) -> None:
    headrace("tenant", "add", "acme")
    ended = headrace("key", "add", "--tenant", "acme", "--save", "absent/demo.key")
    assert (ended.status, ended.out) == (1, "")
    assert "absent/demo.key: No such file or directory" in ended.err
    assert headrace("key", "list", "--json").json == []


@pytest.mark.parametrize("save", ["folder", "folder/", "/", "", "."])
def test_a_key_is_not_issued_into_a_folder(headrace: Headrace, tmp_path: Path, save: str) -> None:
    (tmp_path / "folder").mkdir()
    headrace("tenant", "add", "acme")
    ended = headrace("key", "add", "--tenant", "acme", "--save", save)
    assert (ended.status, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert "name a file" in ended.err
    assert headrace("key", "list", "--json").json == []


def test_a_date_beyond_the_calendar_breaks_no_list() -> None:
    assert date_text(1e300) == "unix 1e+300"
    assert date_text(-1e300) == "unix -1e+300"
    assert date_text(0.0) == "1970-01-01 00:00"


def test_a_key_that_cannot_be_issued_leaves_the_saved_one(headrace: Headrace, tmp_path: Path) -> None:
    (tmp_path / "demo.key").write_text("an older one")
    assert headrace("key", "add", "--tenant", "nobody", "--save", "demo.key").status == 1
    assert (tmp_path / "demo.key").read_text() == "an older one"
    assert not list(tmp_path.glob(".demo.key*"))


# ---- usage


def record(id: str, **fields: Any) -> Record:
    base = Record(
        id=id,
        at_s=1_000.0,
        tenant_id="t",
        tenant="acme",
        key_id="k",
        model="chat",
        route="/v1/chat/completions",
        stream=False,
        outcome=Outcome.served,
        status=200,
        tokens_in=10,
        tokens_out=5,
    )
    return msgspec.structs.replace(base, **fields)


@pytest.fixture
def journalled(state: Path) -> list[Record]:
    """Calls that a gateway has journalled and not folded."""
    records = [record("a"), record("b", model="relay"), record("c", tenant="zebra", at_s=2_000.0)]
    folder = state / "journal"
    folder.mkdir(parents=True)
    (folder / "1-1.jsonl").write_bytes(b"".join(msgspec.json.encode(it) + b"\n" for it in records))
    return records


def test_usage_counts_what_is_not_folded_yet_and_counts_it_once(
    headrace: Headrace, journalled: list[Record], state: Path
) -> None:
    for _ in range(2):
        totals = headrace("usage", "--json").json
        assert [(it["name"], it["calls"], it["tokens_in"]) for it in totals] == [("acme", 2, 20), ("zebra", 1, 10)]
    assert (state / "journal" / "1-1.jsonl").exists()  # the gateway's own, to fold and to remove


def test_what_was_spent_is_shown_wherever_there_is_use_for_it(headrace: Headrace, state: Path) -> None:
    headrace("tenant", "add", "acme")
    key = headrace("key", "add", "--tenant", "acme", "--json").json["id"]
    (tenant,) = headrace("tenant", "list", "--json").json
    now_s = time.time()
    whose = {"tenant_id": tenant["id"], "key_id": key, "at_s": now_s}
    records = [record("a", cost_nano=1_250_000_001, **whose), record("b", cost_nano=10**9, **whose), record("c")]
    folder = state / "journal"
    folder.mkdir(parents=True)
    (folder / "1-1.jsonl").write_bytes(b"".join(msgspec.json.encode(it) + b"\n" for it in records))
    for _ in range(2):
        (tenant,), (shown,) = headrace("tenant", "list", "--json").json, headrace("key", "list", "--json").json
        assert tenant["spent_month_nano"] == shown["spent_month_nano"] == 2_250_000_001
        assert tenant["spent_day_nano"] == shown["spent_day_nano"]
    for words in (("tenant", "list"), ("key", "list"), ("usage",), ("usage", "--by", "day")):
        assert "2.250000001" in headrace(*words).out
        assert "USD" in headrace(*words).out
    assert "1.250000001" in headrace("usage", "--records").out
    days = headrace("usage", "--by", "day", "--json").json
    assert [(it["name"], it["cost_nano"]) for it in days] == [
        ("1970-01-01", 0),
        (datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%d"), 2_250_000_001),
    ]


@pytest.mark.parametrize(
    ("filters", "calls"),
    [
        ((), 3),
        (("--tenant", "acme"), 2),
        (("--model", "relay"), 1),
        (("--key", "k"), 3),
        (("--since", "1500"), 1),
        (("--until", "1970-01-01T00:30:00Z"), 2),
        (("--since", "24h"), 0),
    ],
    ids=lambda it: " ".join(it) if isinstance(it, tuple) else "",
)
def test_usage_is_filtered(headrace: Headrace, journalled: list[Record], filters: tuple[str, ...], calls: int) -> None:
    (total,) = headrace("usage", "--by", "none", *filters, "--json").json
    assert total["calls"] == calls


def test_usage_shows_single_calls_newest_first(headrace: Headrace, journalled: list[Record]) -> None:
    listed = headrace("usage", "--records", "--limit", "2", "--json").out
    assert msgspec.json.decode(listed, type=list[Record]) == [journalled[2], journalled[0]]
    assert "zebra" in headrace("usage", "--records").out


@pytest.mark.parametrize(
    ("text", "expected"), [("45s", 45), ("90m", 5_400), ("12h", 43_200), ("30d", 2_592_000), ("1.5w", 907_200)]
)
def test_a_duration_is_a_number_and_a_unit(text: str, expected: float) -> None:
    assert duration_s(text) == expected


@pytest.mark.parametrize("text", ["", "5", "d", "-5d", "5y", "5 d", "infs"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        duration_s(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100", 100.0), ("1970-01-02", 86_400.0), ("1970-01-01T01:00", 3_600.0), ("1970-01-01T01:00+01:00", 0.0)],
)
def test_a_moment_is_utc_unless_it_says_otherwise(text: str, expected: float) -> None:
    assert moment_s(text) == expected


# ---- as its users call it


def test_help_waits_for_no_framework(state: Path) -> None:
    program = (
        "import sys\nsys.argv = ['headrace', '--help']\n"
        "from gateway.__main__ import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'sqlalchemy', 'alembic', 'litestar', 'uvicorn', 'httpx', 'prometheus_client'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stderr == "[]\n"


def test_serving_loads_neither_tables_nor_migrations_nor_engines(state: Path) -> None:
    program = (
        "import sys\nimport gateway.__main__, gateway.app\n"
        "heavy = {'rich', 'alembic', 'httpx', 'torch', 'vllm', 'onnxruntime', 'transformers', 'numpy'}\n"
        "heavy |= {'sqlalchemy.orm', 'sqlalchemy.ext.asyncio', 'opentelemetry', 'grpc'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_reader_that_has_seen_enough_is_no_fault(headrace: Headrace, tmp_path: Path) -> None:
    headrace("tenant", "add", "acme")
    read, write = os.pipe()
    os.close(read)
    try:
        ran = subprocess.run(
            command("tenant", "list"), cwd=tmp_path, env=environment(), stdout=write, stderr=subprocess.PIPE
        )
    finally:
        os.close(write)
    assert (ran.returncode, ran.stderr) == (1, b"")


@pytest.mark.parametrize("words", [("tenant", "list"), ("tenant", "list", "--json"), ("--help",)], ids=" ".join)
def test_a_full_disk_under_the_output_is_one_line(headrace: Headrace, tmp_path: Path, words: tuple[str, ...]) -> None:
    headrace("tenant", "add", "acme")
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            command(*words), cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ran.returncode == 1
    assert ran.stderr == "headrace: the output can't be written: No space left on device.\n"


def test_bytes_that_are_no_text_are_one_line(headrace: Headrace, tmp_path: Path) -> None:
    headrace("tenant", "add", "acme")
    words = [*command("key", "list", "--tenant"), b"\xff"]
    ran = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "UTF-8" in ran.stderr


def test_a_second_gateway_on_a_port_says_which_field_and_ends(headrace: Headrace, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "headrace.toml").write_text(CONFIG.format(listen=0, admin=port))
        ended = headrace("serve")
    assert ended.status == 1
    assert f"server.admin: can't listen on 127.0.0.1:{port}" in ended.err


def test_a_listener_holds_its_port_from_the_start() -> None:
    with (
        Listener("127.0.0.1:0", "listen") as first,
        pytest.raises(ConfigError, match=r"server\.admin: .*in use"),
    ):
        Listener(first.address, "admin")


def test_beside_a_running_gateway_the_commands_take_effect_and_tell_the_truth(
    headrace: Headrace, tmp_path: Path
) -> None:
    """From no tenant to a billed call, without a restart."""
    ports = {name: free_port() for name in ("listen", "admin")}
    (tmp_path / "headrace.toml").write_text(CONFIG.format(**ports))
    serving = subprocess.Popen(command("serve"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert serving.stderr is not None
        log = []
        while not any("ready in" in line for line in log):
            line = serving.stderr.readline()
            assert line, log
            log.append(line)
        (model,) = headrace("model", "list", "--json").json
        assert (model["name"], model["kinds"]) == ("chat", ["echo"])
        assert model["live"]["replicas"][0]["state"] == "ready"
        assert "ready" in headrace("model", "list").out

        headrace("tenant", "add", "acme")
        issued = headrace("key", "add", "--tenant", "acme", "--json").json
        answer = ask(ports["listen"], issued["key"], until=200)
        usage = answer.json()["usage"]
        (total,) = headrace("usage", "--json").json
        assert (total["name"], total["served"]) == ("acme", 1)
        assert (total["tokens_in"], total["tokens_out"]) == (usage["prompt_tokens"], usage["completion_tokens"])

        headrace("key", "revoke", issued["id"])
        ask(ports["listen"], issued["key"], until=401)
    finally:
        serving.terminate()
        serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert headrace("model", "list", "--json").json[0]["live"] is None
    assert headrace("usage", "--by", "none", "--json").json[0]["served"] >= 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(port: int, key: str, *, until: int) -> httpx.Response:
    """Chat until the answer has that status: the gateway follows other processes, it is not told by them."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        for _ in range(10_000):
            answer = client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            if answer.status_code == until:
                return answer
    raise AssertionError(f"still {answer.status_code}")
