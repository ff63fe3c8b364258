"""Two towers: what a user liked becomes a vector, each item is one, and their product says how well they match."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.contract import Choices, Examples, Rows, Targets
from training.model import weighted
from training.models.recommender import Recommender
from training.spec.models import TwoTower
from training.vocabulary import values_of


class TwoTowerModel(Recommender):
    """Both towers stand on one table of the items: a user is what they liked, bent and turned. Learns with a softmax
    over all items: there are too few of them to draw samples."""

    def __init__(self, spec: TwoTower, examples: Examples) -> None:
        super().__init__(examples, top=spec.top)
        items = len(self.vocabularies["item"])
        self.items = nn.Parameter(torch.empty(items, spec.width).normal_(std=0.05))
        self.turn = nn.Linear(spec.width, spec.width)
        self.base = nn.Parameter((self.popularity + 1e-4).log())
        self.hide, self.drop = nn.Dropout(spec.hidden), nn.Dropout(spec.dropout)
        nn.init.eye_(self.turn.weight)

    def scores(self, user: Tensor) -> Tensor:
        liked = self.liked[user].float()
        length = liked.square().sum(1, keepdim=True).sqrt().clamp(min=1)
        vector = self.turn(self.drop((self.hide(liked / length) @ self.items).tanh()))
        return vector @ self.items.T + self.base

    def forward(self, user: Tensor) -> tuple[Tensor, ...]:
        """As every Recommender; while learning, the scores of all items twice."""
        if self.training:
            return (self.scores(user),) * 2
        return super().forward(user)

    def loss(self, outputs: tuple[Tensor, ...], targets: Targets, weights: Tensor) -> Tensor:
        """Cross entropy with a user's liked items, each as likely as the others; of users who liked any."""
        assert isinstance(targets, Choices)
        wanted = torch.zeros_like(outputs[0])
        for row, liked in enumerate(targets.liked()):
            wanted[row, torch.from_numpy(self.vocabularies["item"].numbers(values_of([liked])) - 1)] = 1
        losses = -(wanted * outputs[0].log_softmax(-1)).sum(1) / wanted.sum(1).clamp(min=1)
        return weighted(losses, weights)


def build(spec: TwoTower, rows: Rows) -> TwoTowerModel:
    """New, drawn from torch's random numbers."""
    return TwoTowerModel(spec, rows.train)
