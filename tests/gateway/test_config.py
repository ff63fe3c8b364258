"""What a configuration file may say, and how it is told when it may not."""

import itertools
import os
from decimal import Decimal
from pathlib import Path

import pytest

from gateway.config import Config, ConfigError, load
from gateway.price import Prices
from gateway.replica import replica_name
from runtimes.vllm import Vllm

MODEL = """
[[models]]
name = "chat"
[[models.replicas]]
kind = "echo"
"""


def read(folder: Path, text: str) -> Config:
    file = folder / "headrace.toml"
    file.write_text(text)
    return load(file)


def test_the_shortest_configuration_is_one_model(tmp_path: Path) -> None:
    assert [model.name for model in read(tmp_path, MODEL).models] == ["chat"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[server]\nlisten = "127.0.0.1:9"\nadmin = "127.0.0.1:9"', "server.admin: .*server.listen"),
        ('[server]\nlisten = "Localhost:09"\nadmin = "localhost:9"', "server.admin: .*server.listen"),
        ('[server]\nlisten = "127.0.0.1:8002"', "server.admin: .*server.listen"),
        ('[server]\nlisten = "127.0.0.1:8001"', "server.grpc: .*server.listen"),
        ('[server]\ngrpc = "127.0.0.1:8002"', "server.admin: .*server.grpc"),
        ('[server]\nlisten = "127.0.0.1:65536"', "server.listen: .*65535"),
        ('[server]\nadmin = "127.0.0.1:99999"', "server.admin: .*65535"),
        ('[server]\ngrpc = "127.0.0.1:99999"', "server.grpc: .*65535"),
        ('[server]\nlisten = "127.0.0.1:80\\n"', "server.listen: "),
        ('[state]\npath = ""', "state.path: "),
        ('[state]\npath = "a\\u0000b"', "state.path: "),
        ('[state]\npath = "~nobody-of-that-name/state"', "state.path: "),
        ("[server.bounds]\nconnections_max = 9223372036854775808", "server.bounds.connections_max: .* beyond 64 bits"),
        ("[server.bounds]\ncall_s_max = inf", "server.bounds.call_s_max: "),
        ('[trace]\notlp = ""', "trace.otlp: "),
        ('[trace]\notlp = "127.0.0.1:4318"', "trace.otlp: "),
        ('[trace]\notlp = "ftp://127.0.0.1/v1/traces"', "trace.otlp: "),
        ('[trace]\notlp = "http://"', "trace.otlp: "),
        ("[state]\npath = " + "[" * 20_000, "nested too deeply"),
    ],
)
def test_what_can_not_be_used_is_refused_by_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.delenv("HEADRACE_STATE", raising=False)
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text + MODEL)


def test_a_state_folder_that_nothing_could_be_said_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_STATE", os.fsdecode(b"/tmp/caf\xe9"))
    with pytest.raises(ConfigError, match=r"state.path: .*\\udce9' is not UTF-8"):
        read(tmp_path, MODEL)


@pytest.mark.parametrize(
    "text",
    [
        '[server]\nlisten = "127.0.0.1:0"\ngrpc = "127.0.0.1:0"\nadmin = "127.0.0.1:0"',
        '[server]\nlisten = "127.0.0.1:65535"',
        '[server]\nlisten = "127.0.0.2:8002"',
        '[trace]\notlp = "http://127.0.0.1:4318/v1/traces"',
        '[trace]\notlp = "https://collector.example"',
    ],
)
def test_what_can_be_used_is(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text + MODEL).models


@pytest.mark.parametrize(
    ("price", "says"),
    [
        ("{ million_tokens_in = -1 }", r"models\[0\]\.price: million_tokens_in can't be -1"),
        ("{ million_tokens_out = nan }", r"models\[0\]\.price: million_tokens_out can't be NaN"),
        ("{ thousand_items = 0.0000001 }", r"models\[0\]\.price: thousand_items can't be .* six decimals"),
        ("{ call = true }", r"models\[0\]\.price\.call: "),
        ("{ input = 1 }", r"models\[0\]\.price: .*`input`"),
        ("3", r"models\[0\]\.price: "),
    ],
)
def test_what_is_no_price_is_refused_by_its_field(tmp_path: Path, price: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, MODEL.replace('name = "chat"', f'name = "chat"\nprice = {price}'))


def test_prices_are_as_exact_as_they_are_written(tmp_path: Path) -> None:
    price = "{ million_tokens_in = 0.1, million_tokens_out = 0.0375, thousand_items = 3, call = '0.000001' }"
    read_price = read(tmp_path, MODEL.replace('name = "chat"', f'name = "chat"\nprice = {price}')).models[0].price
    assert read_price == Prices(Decimal("0.1"), Decimal("0.0375"), None, Decimal(3), Decimal("0.000001"))


@pytest.mark.parametrize("currency", ["usd", "EURO", ""])
def test_a_currency_is_its_code(tmp_path: Path, currency: str) -> None:
    with pytest.raises(ConfigError, match=r"money\.currency"):
        read(tmp_path, f'[money]\ncurrency = "{currency}"' + MODEL)


def test_a_name_that_ends_in_a_line_break_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\[0\]\.name: "):
        read(tmp_path, MODEL.replace('"chat"', '"chat\\n"'))


def test_no_two_models_share_a_replica_name(tmp_path: Path) -> None:
    names = ["a/b", "a-b", "a--b", "a//b", "a:b", "a_b", "a", "a-0", "a/0"]
    made = [replica_name(name, number) for name, number in itertools.product(names, range(2))]
    assert len(set(made)) == len(made)
    assert not any("/" in name for name in made)
    assert replica_name("smollm2", 0) == "smollm2-0"


ADAPTERS = """
[[models]]
name = "smollm2"
waiting_max = 7
[[models.replicas]]
kind = "vllm"
artifact = "smollm2@stable"
running_max = 3
adapters = { persona = "persona@stable", tools = "./tools" }
"""


def test_each_adapter_of_an_engine_is_a_model_that_shares_it(tmp_path: Path) -> None:
    config = read(tmp_path, f'{ADAPTERS}[state]\npath = "{tmp_path}"\n')
    assert [model.name for model in config.models] == ["smollm2", "persona", "tools"]
    [base], [persona], [tools] = [model.replicas for model in config.models]
    assert isinstance(base, Vllm)
    assert isinstance(persona, Vllm)
    assert isinstance(tools, Vllm)
    assert (persona.shares, persona.artifact, persona.slots) == ("smollm2-0", "smollm2@stable", 3)
    assert (persona.adapter, tools.adapter, base.adapter) == ("persona@stable", "./tools", None)
    assert config.models[1].waiting_max == 7


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2", r"models\[0\].replicas: the adapter 'smollm2' has another model's name"),
        ("a b", r"models\[0\].replicas: 'a b' can't be an adapter's name"),
    ],
)
def test_an_adapter_has_a_models_name_and_no_other_models(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, ADAPTERS.replace("persona =", f'"{name}" ='))
