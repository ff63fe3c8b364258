"""EASE: each item's score is a weighted sum of the items that a user liked, with the weights that guess best what else
they liked, itself left out. https://arxiv.org/abs/1905.03375

The weights are a matrix of items by items, and there are more of those than users. With X users by items and
M = (XXᵀ + cI)⁻¹, the inverse that they are made of is P = (I − XᵀMX) / c, so one of users by users is all that has to
be inverted and kept; the scores are exactly EASE's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.contract import Examples, Rows
from training.errors import RecipeError
from training.models.recommender import Recommender
from training.spec.models import Ease

_USERS_MAX = 20_000
"""Whose matrix fits into memory, and whose inverse into an hour."""


class EaseModel(Recommender):
    """Solved as it is made; nothing is left to learn."""

    def __init__(self, spec: Ease, examples: Examples) -> None:
        super().__init__(examples, top=spec.top)
        if len(examples) > _USERS_MAX:
            raise RecipeError(f"'ease' inverts a matrix of users by users, at most {_USERS_MAX:,}; take 'two-tower'")
        given = self.liked.numpy().astype(np.float64)[1:]
        inverse = np.linalg.inv(given @ given.T + spec.penalty * np.eye(len(given)))
        diagonal = (1 - (given * (inverse @ given)).sum(0)) / spec.penalty
        weights = np.vstack([np.zeros(len(given)), given @ given.T @ inverse])
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float32)))
        """float32 [users + 1, users]: XXᵀM."""
        self.register_buffer("scale", torch.from_numpy((1 / (spec.penalty * diagonal)).astype(np.float32)))

    def scores(self, user: Tensor) -> Tensor:
        own = self.liked[user].float()
        return own - (own - self.weights[user] @ self.liked[1:].float()) * self.scale


def build(spec: Ease, rows: Rows) -> EaseModel:
    return EaseModel(spec, rows.train)
