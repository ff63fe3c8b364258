"""Scenarios as files and settings, and whom they may be aimed at."""

from pathlib import Path

import msgspec
import pytest

from loadtests.arrivals import Poisson
from loadtests.scenario import Scenario, ScenarioFault, load, shipped
from loadtests.target import TargetFault, parse, require_loopback


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_scenario_loads(name: str) -> None:
    assert load(name).about


def test_a_setting_changes_a_field_also_in_a_table() -> None:
    settings = ["connections=3", "model=other", "arrivals.kind=poisson", "arrivals.rate_per_s=20", "body.top_p=0.5"]
    changed = load("echo", settings)
    assert (changed.connections, changed.model, changed.body) == (3, "other", {"top_p": 0.5})
    assert changed.arrivals == Poisson(rate_per_s=20)


def test_a_scenario_of_ones_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('about = "mine"\nmodel = "m"\n')
    assert load(str(tmp_path / "mine.toml")) == Scenario(about="mine", model="m")


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("nothing", "connections=1", "there is no scenario 'nothing'; name a .toml file, or one of: classify, echo, "),
        ("echo", "connections=0", "scenario echo: Expected `int` >= 1 - at `connections`"),
        ("echo", "conections=1", "unknown field `conections`"),
        ("echo", "connections", "--set 'connections': write field=value"),
        ("echo", "model.name=x", "model is a value, not a table"),
        ("echo", "arrivals.kind=sometimes", "Invalid value 'sometimes' - at `arrivals.kind`"),
    ],
)
def test_a_mistake_is_named(name: str, setting: str, said: str) -> None:
    with pytest.raises(ScenarioFault) as caught:
        load(name, [setting])
    assert said in str(caught.value)


def test_the_body_carries_every_setting_and_asks_for_the_exact_count() -> None:
    scenario = Scenario(about="", model="m", prompt="p", stream=True, tokens_max=9, body={"temperature": 0})
    assert msgspec.json.decode(scenario.content("p", 9)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0,
    }


def test_a_kind_of_call_has_the_scenarios_own_fields_where_it_sets_none(tmp_path: Path) -> None:
    text = 'about = "mine"\nmodel = "m"\ntokens_max = 5\n[[mix]]\nmodel = "other"\n[[mix]]\nstream = true\n'
    (tmp_path / "mine.toml").write_text(text)
    scenario = load(str(tmp_path / "mine.toml"))
    assert [(ask.model, ask.stream, ask.tokens_max) for ask in scenario.asks] == [("other", False, 5), ("m", True, 5)]
    assert (scenario.models, scenario.streams) == (("other", "m"), True)


def test_keys_come_from_files_the_environment_or_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = (
        '[[tenants]]\nname = "a"\nkey_file = "a.key"\n[[tenants]]\nname = "b"\nkey_env = "B"\n[[tenants]]\nname = "c"\n'
    )
    (tmp_path / "mine.toml").write_text('about = "mine"\nmodel = "m"\n' + tenants)
    scenario = load(str(tmp_path / "mine.toml"))
    with pytest.raises(ScenarioFault, match=r"the key of tenant a: .*a\.key: No such file"):
        scenario.keys(None)
    (tmp_path / "a.key").write_text("key-a\n")
    with pytest.raises(ScenarioFault, match=r"is to be in \$B, which is not set"):
        scenario.keys(None)
    monkeypatch.setenv("B", "key-b")
    assert scenario.keys("key-c") == {"a": "key-a", "b": "key-b", "c": "key-c"}
    assert scenario.keys(None) == {"a": "key-a", "b": "key-b"}


def test_rates_make_a_scenario_of_each() -> None:
    scenario = load("ladder", ["rates_per_s=[10, 20]"])
    steps = scenario.steps("ladder")
    assert {name: step.arrivals for name, step in steps.items()} == {
        "ladder at 10/s": Poisson(rate_per_s=10),
        "ladder at 20/s": Poisson(rate_per_s=20),
    }
    with pytest.raises(ScenarioFault, match="rates_per_s needs arrivals with a rate"):
        load("echo", ["rates_per_s=[10]"]).steps("echo")


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "can't be read: No such file"), ('{"timestamp": 1}\n', "line 1: "), ("{}", "line 1: ")],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    (tmp_path / "mine.toml").write_text('about = ""\nmodel = "m"\narrivals = { kind = "trace", path = "t.jsonl" }\n')
    if text is not None:
        (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ScenarioFault, match=said):
        load(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:8000", "http://127.9.9.9/v1", "http://[::1]:8000/v1/", "http://localhost:1", "unix:/tmp/a.sock"],
)
def test_loopback_is_loaded(text: str) -> None:
    require_loopback(parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "http://192.0.2.1:8000",
        "http://0.0.0.0:8000",
        "http://gateway.example",
        "http://127.0.0.1.example",
        "http://[::]:1",
    ],
)
def test_a_foreign_address_is_refused(text: str) -> None:
    with pytest.raises(TargetFault, match="--yes-not-loopback"):
        require_loopback(parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:8000",
        "https://localhost",
        "http://",
        "http://localhost:x",
        "http://me@localhost",
        "http://localhost/x",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(TargetFault, match="write http://host:port, unix:/path"):
        parse(text)
