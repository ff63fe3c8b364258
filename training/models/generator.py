"""Causal language models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from training.errors import RecipeError
from training.models import package
from training.spec.models import CausalLM

LOG = logging.getLogger("training")


class Generator:
    """A causal language model in fp32 with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any, *, tokens_max: int) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.tokens_max = tokens_max


def build(spec: CausalLM) -> Generator:
    """On the CPU, in fp32."""
    import transformers  # seconds, which only whoever builds one waits

    transformers.utils.logging.disable_progress_bar()
    folder = package.find(spec.package)
    LOG.info("model: reading %s", package.describe(spec.package))
    file = _gguf(folder)
    # Without dequantize=True transformers keeps GGUF weights packed and refuses to save them.
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name, local_files_only=True)
    return Generator(network.eval(), tokenizer, tokens_max=spec.tokens_max)


def _gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise RecipeError(f"{folder} holds {len(files)} GGUF files; a generator starts from exactly one")
    return files[0]
