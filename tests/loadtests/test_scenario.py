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
        (
            "nothing",
            "connections=1",
            "there is no scenario 'nothing'; name a .toml file, or one of: echo, plain, stream",
        ),
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
    assert msgspec.json.decode(scenario.content()) == {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0,
    }


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
    with pytest.raises(TargetFault, match="write http://host:port or unix:/path"):
        parse(text)
