"""An encoder that knows when none of its labels fits: a linear layer over the labels inside, and one more for refusing.

How sure it is that a label fits is a weighted sum of signals, numbers that each row has. It is put against the best
label's logit, so that the label of refusing has the highest score exactly when the sum is below zero: whoever takes the
label with the highest score needs no threshold of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.contract import Array, Inputs, Rows, Scoped
from training.errors import RecipeError
from training.model import predict
from training.models import encoder
from training.models.encoder import Embedder, TextModel
from training.spec.models import ScopedEncoder

SIGNALS = ("energy", "cosine")


class ScopedClassifier(TextModel):
    """See the module."""

    task = "classify"
    names_out = ("scores", "logits", "known")

    def __init__(self, embedder: Embedder, targets: Scoped) -> None:
        super().__init__(embedder.tokenizer, tokens_max=embedder.tokens_max, truncate=embedder.truncate)
        self.embedder = embedder
        self.labels = targets.labels
        inside = len(self.labels) - 1
        self.linear = nn.Linear(embedder.width, inside)
        self.means = nn.Parameter(torch.zeros(inside, embedder.width))
        """Of each label's embeddings, of length one."""
        self.mix = nn.Linear(len(SIGNALS), 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Token ids and mask [n, tokens] → scores [n, labels] that sum to one, the logits behind them, and how likely
        it is that a label inside fits [n, 1], one half at the threshold."""
        return self.rest(self.embedder.named(self.embedder(input_ids, attention_mask)))

    def frozen(self, inputs: Inputs) -> dict[str, Array]:
        return predict(self.embedder, inputs)

    def rest(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        embedding = features["embedding"]
        logits = self.linear(embedding)
        sure = self.mix(self.signals(embedding))
        every = torch.cat([logits, logits.amax(1, keepdim=True) - sure], 1)
        return every.softmax(1), every, sure.sigmoid()

    def signals(self, embedding: Tensor) -> Tensor:
        """Of each row [n, signals]: the energy, as in https://arxiv.org/abs/2010.03759 but for its sign, and the cosine
        to the nearest label's mean."""
        return torch.stack([self.linear(embedding).logsumexp(1), (embedding @ self.means.T).amax(1)], 1)

    def card(self) -> dict[str, Any]:
        return super().card() | {"pooling": "mean"}


def build(spec: ScopedEncoder, rows: Rows) -> ScopedClassifier:
    """With layers that are new."""
    targets = rows.train.targets
    if not isinstance(targets, Scoped):
        raise RecipeError("the model 'scoped-encoder' needs to know which rows no label fits: set data.outside")
    model = ScopedClassifier(encoder.load(spec), targets)
    model.eval()
    return model
