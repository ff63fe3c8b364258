"""A BERT encoder: mean over its tokens, length one; and a linear layer on top where there are labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn

from training.contract import Array, Classes, Flags, Inputs, Rows, strings
from training.errors import RecipeError
from training.model import Model, predict
from training.models import package
from training.models.noise import noisy
from training.spec.models import Encoder, Noise, Pretrained

LOG = logging.getLogger("training")

_ROWS_AT_ONCE = 1024


class TextModel(Model):
    """What reads `text` through a tokenizer."""

    names_in = ("input_ids", "attention_mask")

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, tokens_max: int, truncate: bool) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tokens_max = tokens_max
        self.truncate = truncate
        self.sample = {"text": strings(["one", "two or three"])}

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Ids and mask, int64 [n, longest]. Longer texts are cut, special tokens kept."""
        encoded = self._encode(inputs["text"])
        width = max(map(len, encoded))
        ids = np.zeros((len(encoded), width), np.int64)
        mask = np.zeros_like(ids)
        for row, found in enumerate(encoded):
            ids[row, : len(found)], mask[row, : len(found)] = found, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def costs(self, inputs: Inputs) -> Array:
        texts = inputs["text"]
        pieces = (texts[start : start + _ROWS_AT_ONCE] for start in range(0, len(texts), _ROWS_AT_ONCE))
        return np.array([len(it) for piece in pieces for it in self._encode(piece)], np.int64)

    def axes(self) -> dict[str, dict[int, str]]:
        return super().axes() | {name: {0: "n", 1: "tokens"} for name in self.names_in}

    def beside(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.tokenizer.to_str(pretty=True).encode()}

    def card(self) -> dict[str, Any]:
        return super().card() | {"tokens_max": self.tokens_max, "truncate": self.truncate}

    def _encode(self, texts: Array) -> list[list[int]]:
        self.tokenizer.enable_truncation(self.tokens_max)
        found = [it.ids for it in self.tokenizer.encode_batch(list(texts))]
        self.tokenizer.no_truncation()  # what is written beside the graph must not have it
        return found


class Embedder(TextModel):
    """Encoder, mean over the tokens that are there, length one."""

    task = "embed"
    names_out = ("embedding",)

    def __init__(self, encoder: nn.Module, tokenizer: tokenizers.Tokenizer, *, tokens_max: int, truncate: bool) -> None:
        super().__init__(tokenizer, tokens_max=tokens_max, truncate=truncate)
        self.encoder = encoder

    @property
    def width(self) -> int:
        return int(self.encoder.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Token ids and mask [n, tokens] → embedding [n, width] of L2 norm one."""
        there = attention_mask.float()
        # What the encoder would make of the mask itself, and the first type for all, in 66 nodes of the graph fewer.
        away = (1.0 - there)[:, None, None] * torch.finfo(there.dtype).min
        types = torch.zeros_like(input_ids)
        hidden = self.encoder(input_ids=input_ids, attention_mask=away, token_type_ids=types).last_hidden_state
        mask = there.unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return (nn.functional.normalize(mean, dim=-1),)

    def card(self) -> dict[str, Any]:
        return super().card() | {"pooling": "mean"}


class Classifier(TextModel):
    """An Embedder and a linear layer."""

    noise: Noise | None = None
    task = "classify"
    names_out = ("scores", "logits")

    def __init__(
        self, embedder: Embedder, labels: Sequence[str], *, exclusive: bool = True, noise: Noise | None = None
    ) -> None:
        super().__init__(embedder.tokenizer, tokens_max=embedder.tokens_max, truncate=embedder.truncate)
        self.embedder = embedder
        self.noise = noise
        self.augments = noise is not None
        self.labels = tuple(labels)
        self.exclusive = exclusive
        """A text has exactly one of the labels, so that the scores sum to one; else each is a question of its own."""
        self.linear = nn.Linear(embedder.width, len(labels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Token ids and mask [n, tokens] → scores [n, labels], and the logits behind them."""
        return self.rest(self.embedder.named(self.embedder(input_ids, attention_mask)))

    def augment(self, inputs: Inputs, chance: np.random.Generator) -> Inputs:
        return inputs if self.noise is None else {"text": noisy(self.noise, inputs["text"], chance)}

    def frozen(self, inputs: Inputs) -> dict[str, Array]:
        return predict(self.embedder, inputs)

    def rest(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        logits = self.linear(features["embedding"])
        return logits.softmax(-1) if self.exclusive else logits.sigmoid(), logits

    def head(self) -> Sequence[nn.Parameter]:
        return [*self.linear.parameters()]

    def relabel(self, labels: tuple[str, ...]) -> None:
        linear = nn.Linear(self.embedder.width, len(labels))
        known = len(self.labels)
        with torch.no_grad():
            linear.weight[:known], linear.bias[:known] = self.linear.weight, self.linear.bias
        self.linear, self.labels = linear, labels

    def card(self) -> dict[str, Any]:
        return super().card() | {"pooling": "mean"}


def build(spec: Encoder, rows: Rows) -> Embedder | Classifier:
    """On the CPU, in fp32; a head is new, and drawn from torch's random numbers."""
    embedder = load(spec)
    targets = rows.train.targets
    if isinstance(targets, Classes | Flags):
        exclusive = isinstance(targets, Classes)
        classifier = Classifier(embedder, targets.labels, exclusive=exclusive, noise=spec.noise)
        classifier.eval()
        return classifier
    if spec.noise is not None:
        raise RecipeError("model.noise is for texts with labels: an embedder does not learn here")
    return embedder


def load(spec: Pretrained) -> Embedder:
    """The encoder as it was published, with its tokenizer."""
    import transformers  # seconds, which a model that was loaded before need not wait

    transformers.utils.logging.disable_progress_bar()
    folder = package.find(spec.package)
    LOG.info("model: reading %s", package.describe(spec.package))
    encoder = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The file asks for padding to 128 and for truncation; both are the business of whoever makes a batch.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # All of it in evaluation mode: export restores the outermost mode, and would switch dropout on behind our back.
    embedder = Embedder(encoder, tokenizer, tokens_max=spec.tokens_max, truncate=spec.truncate)
    embedder.eval()
    return embedder
