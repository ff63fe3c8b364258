"""An encoder and n-grams of its own tokens side by side, one linear layer on each, and the sum of both as the logits.

What is meant and how it is put: prompts that are made to break a model's rules are told by their turns of phrase, which
an encoder that was trained for meaning passes over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array, Flags, Inputs, Rows
from training.errors import RecipeError
from training.model import predict
from training.models import encoder
from training.models.encoder import Embedder, TextModel
from training.models.ngrams import PAD, TfIdf
from training.spec.models import BlendedEncoder


class Blended(TextModel):
    """See the module. One half is the threshold of every score."""

    task = "classify"
    names_out = ("scores", "logits")

    def __init__(self, embedder: Embedder, tfidf: TfIdf, labels: Sequence[str]) -> None:
        super().__init__(embedder.tokenizer, tokens_max=embedder.tokens_max, truncate=embedder.truncate)
        self.embedder = embedder
        self.tfidf = tfidf
        self.labels = tuple(labels)
        self.meaning = nn.Linear(embedder.width, len(labels))
        self.wording = nn.Parameter(torch.zeros(len(tfidf.pool), len(labels)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Token ids and mask [n, tokens] → scores [n, labels], each a question of its own, and the logits behind."""
        return self.rest(self.embedder.named(self.embedder(input_ids, attention_mask)) | {"ids": input_ids})

    def frozen(self, inputs: Inputs) -> dict[str, Array]:
        encoded = self._encode(inputs["text"])
        ids = np.full((len(encoded), self.tokens_max), PAD, np.int32)
        for row, found in enumerate(encoded):
            ids[row, : len(found)] = found
        return predict(self.embedder, inputs) | {"ids": ids}

    def rest(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        # Not a matrix product by name, so that it stays fp32: a few n-grams carry much of the weight.
        wording = torch.einsum("nf,fl->nl", self.tfidf(features["ids"]), self.wording)
        logits = self.meaning(features["embedding"]) + wording
        return logits.sigmoid(), logits

    def card(self) -> dict[str, Any]:
        return super().card() | {"pooling": "mean", "thresholds": dict.fromkeys(self.labels, 0.5)}


def build(spec: BlendedEncoder, rows: Rows) -> Blended:
    """With layers that are new, and the n-grams of the training rows."""
    targets = rows.train.targets
    if not isinstance(targets, Flags):
        raise RecipeError("the model 'blended-encoder' is for texts with flags: data.kind = 'flags'")
    embedder = encoder.load(spec)
    tfidf = TfIdf(embedder._encode(rows.train.inputs["text"]), longest=spec.ngram, most=spec.ngrams_max)
    model = Blended(embedder, tfidf, targets.labels)
    model.eval()
    return model
