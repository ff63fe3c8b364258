"""An adapter on a real vLLM: a model of its own beside its base, which follows its alias under load."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import openai
import pytest

from runtimes.artifact import Card, Lineage, Manifest, Shelf
from tests import lora
from tests.conftest import LISTEN, _running
from tests.e2e.servers import ENGINE_START_S_MAX, GatewayProcess

pytestmark = pytest.mark.engine

CONFIG = f"""{LISTEN}
[[models]]
name = "tiny"
[[models.replicas]]
kind = "vllm"
artifact = "tiny@stable"
tokens_max = 512
kv_cache_bytes = 33554432
adapters = {{ persona = "persona@stable" }}
"""


WIDTH, LAYERS, VOCABULARY = 128, 2, 49152
CONFIG_JSON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": WIDTH,
    "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "dtype": "float32",
}  # fmt: skip
"""A language model that has learnt nothing: what it says is chance's, and the same each time."""

SQUARE = {
    f"model.layers.{at}.{name}.weight": (WIDTH, WIDTH)
    for at in range(LAYERS)
    for name in (
        *(f"self_attn.{it}_proj" for it in "qkvo"),
        *(f"mlp.{it}_proj" for it in ("gate", "up", "down")),
    )
}
NORMS = (
    "model.norm",
    *(f"model.layers.{at}.{it}_layernorm" for at in range(LAYERS) for it in ("input", "post_attention")),
)


class Bench:
    """A gateway, and adapters for its model."""

    def __init__(self, gateway: GatewayProcess, folder: Path) -> None:
        self.gateway = gateway
        self.shelf = Shelf(gateway.state / "shelf")
        self.folder = folder

    def publish_base(self, words: Path) -> Manifest:
        """`words` is a folder with a tokenizer and a chat template."""
        folder = self.folder / "base"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_bytes((words / name).read_bytes())
        (folder / "config.json").write_text(json.dumps(CONFIG_JSON))
        shapes = (
            SQUARE | {f"{it}.weight": (WIDTH,) for it in NORMS} | {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
        )
        lora.safetensors(folder / "model.safetensors", shapes, chance=random.Random(0))
        return self.shelf.publish(folder, card("tiny", "safetensors"))

    def publish(self, seed: int) -> Manifest:
        """An adapter that makes it say something else."""
        folder = lora.adapter(self.folder / str(seed), SQUARE, rank=2, chance=random.Random(seed))
        return self.shelf.publish(folder, card("persona", "adapter"))


def card(name: str, form: Literal["safetensors", "adapter"]) -> Card:
    lineage = Lineage(
        recipe="tiny", recipe_hash="0" * 64, base="tiny 1.0", base_licence="none", data="none", rows_train=0,
        rows_test=0, seed=0, packages={},
    )  # fmt: skip
    fits = "tiny 1.0" if form == "adapter" else ""
    return Card(name=name, task="generate", format=form, fits=fits, tokens_max=512, lineage=lineage)


@pytest.fixture(scope="module")
def bench(engine_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("a")
    gateway = GatewayProcess(folder, CONFIG)
    gateway.state.mkdir(mode=0o700)
    for shared in ("engines", "cache"):
        (gateway.state / shared).symlink_to(engine_state / shared)
    bench = Bench(gateway, folder)
    made = bench.publish_base(Shelf(engine_state / "shelf").resolve("smollm2").path)
    bench.shelf.promote("tiny", made.version)
    bench.shelf.promote("persona", bench.publish(1).version)
    for _ in _running(gateway, start_s_max=ENGINE_START_S_MAX):
        yield bench


async def ask(client: openai.AsyncOpenAI, model: str) -> tuple[str, str]:
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=8,
        temperature=0,
    )
    return answer.model, answer.choices[0].message.content or ""


async def test_it_answers_beside_its_base_and_follows_its_alias_under_load(bench: Bench) -> None:
    key = bench.gateway.issue()
    async with openai.AsyncOpenAI(base_url=bench.gateway.url, api_key=key.text, max_retries=0) as client:
        assert {it.id async for it in client.models.list()} == {"tiny", "persona"}
        (_, plain), (first, changed) = await ask(client, "tiny"), await ask(client, "persona")
        assert plain != changed
        second = f"persona@{bench.publish(2).version}"
        answered: list[str] = []
        stop = asyncio.Event()

        async def go_on() -> None:
            while not stop.is_set():
                answered.append((await ask(client, "persona"))[0])

        async def until(name: str) -> None:
            async with asyncio.timeout(120):
                while answered[-1:] != [name]:
                    await asyncio.sleep(0.05)

        load = [asyncio.create_task(go_on()) for _ in range(3)]
        await until(first)
        bench.shelf.promote("persona", second.partition("@")[2])
        await until(second)
        bench.shelf.rollback("persona")
        await until(first)
        stop.set()
        await asyncio.gather(*load)  # raises if any call failed
        assert set(answered) == {first, second}
        assert await ask(client, "tiny") == ("tiny", plain)
        assert await ask(client, "persona") == (first, changed)
