"""The README's examples, run as they stand against the real engines; only the address and the key's file differ."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.servers import GatewayProcess, Key

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
FIRST_CALLS, OIP = "First calls", "The Open Inference Protocol"


def block(language: str, section: str = FIRST_CALLS) -> str:
    text = (ROOT / "README.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert len(found) == 1
    return found[0]


def ran(program: list[str], text: str, gateway: GatewayProcess, key: Key, folder: Path) -> str:
    (folder / "demo.key").write_text(f"{key.text}\n")
    text = text.replace("127.0.0.1:8000", gateway.address).replace(".headrace/demo.key", str(folder / "demo.key"))
    text = text.replace("127.0.0.1:8001", gateway.grpc)
    text = text.replace(".venv/bin/headrace", f"{sys.executable} -m gateway")
    known = {**os.environ, "HEADRACE_STATE": str(gateway.state), "HEADRACE_KEY": key.text}
    shown = subprocess.run([*program, text], cwd=ROOT, env=known, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_the_shell_examples_answer(engine_gateway: GatewayProcess, engine_key: Key, tmp_path: Path):
    # One command at a time, as a reader would paste them.
    commands = [it for it in re.split(r"\n\n", block("sh").strip()) if "export" not in it]
    chat, stream, classification, usage = (
        ran(["bash", "-euc"], it, engine_gateway, engine_key, tmp_path) for it in commands
    )
    assert "Paris" in json.loads(chat)["choices"][0]["message"]["content"]
    assert stream.rstrip().endswith("data: [DONE]")
    assert [row["label"] for row in json.loads(classification)["data"]] == ["order_status", "payment_problem"]
    assert re.search(r"^smollm2 ", usage, re.MULTILINE)


def test_the_key_is_read_as_shown(engine_gateway: GatewayProcess, engine_key: Key, tmp_path: Path):
    export = block("sh").strip().split("\n\n")[0]
    shown = ran(["bash", "-euc"], f"{export}\necho $HEADRACE_KEY", engine_gateway, engine_key, tmp_path)
    assert shown.strip() == engine_key.text


def test_the_python_example_answers(engine_gateway: GatewayProcess, engine_key: Key, tmp_path: Path):
    shown = ran([sys.executable, "-c"], block("python"), engine_gateway, engine_key, tmp_path)
    assert "Paris" in shown
    assert "2 vectors of 384" in shown
    assert "Returns are free for 30 days." in shown
    assert shown.rstrip().endswith("order_status")


def test_the_open_inference_protocol_s_shell_examples_answer(
    engine_gateway: GatewayProcess, engine_key: Key, tmp_path: Path
):
    classification, stream = (
        ran(["bash", "-euc"], it, engine_gateway, engine_key, tmp_path)
        for it in re.split(r"\n\n", block("sh", OIP).strip())
    )
    labels = [it["data"] for it in json.loads(classification)["outputs"] if it["name"] == "label"]
    assert labels == [["order_status"]]
    events = [json.loads(event.removeprefix("data: ")) for event in stream.strip().split("\n\n")]
    assert "Paris" in "".join(event["text_output"] for event in events)


def test_the_open_inference_protocol_s_python_example_answers(
    engine_gateway: GatewayProcess, engine_key: Key, tmp_path: Path
):
    shown = ran([sys.executable, "-c"], block("python", OIP), engine_gateway, engine_key, tmp_path)
    assert "order_status" in shown
    assert "(2, " in shown
