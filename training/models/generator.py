"""Causal language models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from training.contract import Beside, Weights
from training.errors import RecipeError
from training.models import package
from training.spec.models import CausalLM

LOG = logging.getLogger("training")

TEMPLATE = Path(__file__).parents[1] / "recipes" / "chatml.jinja"

Files = Mapping[str, bytes]
"""An adapter in peft's layout; see `training.llm.lora`."""


class Generator:
    """A causal language model in fp32 with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any, *, tokens_max: int, adapter: Files | None = None) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.tokens_max = tokens_max
        self.adapter = adapter
        """What it has learnt, beside the weights as they were."""

    @contextmanager
    def asked(self) -> Iterator[Any]:
        """The network to ask: what it has learnt is on it while the block lasts."""
        if self.adapter is None:
            yield self.network
            return
        from training.llm import lora

        with lora.worn(self.network, self.adapter) as adapted:
            yield adapted

    def wearing(self, adapter: Files | None) -> Generator:
        """The same weights with another adapter, or none."""
        return Generator(self.network, self.tokenizer, tokens_max=self.tokens_max, adapter=adapter)


def build(spec: CausalLM) -> Generator:
    """On the CPU, in fp32, with the chat template that it is served with."""
    import transformers  # seconds, which only whoever builds one waits

    transformers.utils.logging.disable_progress_bar()
    folder = package.find(spec.package)
    LOG.info("model: reading %s", package.describe(spec.package))
    options: dict[str, Any] = {"local_files_only": True}
    if not (folder / "config.json").is_file():
        options["gguf_file"] = _gguf(folder).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if "gguf_file" in options:
        # Without dequantize=True transformers keeps GGUF weights packed and refuses to save them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        tokenizer.chat_template = TEMPLATE.read_text()  # the file's own knows no tools
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    # A GGUF names no limit, and transformers then saves 10^30, which engines believe.
    tokenizer.model_max_length = spec.tokens_max
    return Generator(network.eval(), tokenizer, tokens_max=spec.tokens_max)


def product(model: Generator) -> Weights | Beside:
    """What is served of one that is not to be made small: its adapter, or else all of its weights in fp32."""
    if model.adapter is not None:
        return Beside(model.adapter)
    tied = model.network.config.tie_word_embeddings
    tensors = {name: it.contiguous() for name, it in model.network.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    return Weights(tensors, {"dtype": "float32"})


def to_compress(model: Any, kind: str) -> Any:
    """The network of a model whose weights hold all that it knows. Raises RecipeError for any other."""
    if not isinstance(model, Generator):
        raise RecipeError(f"compress = {kind!r} is for generators")
    if model.adapter is not None:
        raise RecipeError(
            f"compress = {kind!r} would leave out the adapter, which is served beside its base: set "
            "trainer.adapter.merge = true, or leave `compress` out"
        )
    return model.network


def _gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise RecipeError(f"{folder} holds no config.json and {len(files)} GGUF files; a generator starts from one")
    return files[0]
