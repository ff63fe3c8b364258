"""User → the items that they would like most, none of which they have had. Scores are what the kinds differ in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.contract import Choices, Examples, Inputs
from training.errors import RecipeError
from training.model import Model
from training.vocabulary import Vocabulary, values_of

_NEVER = -1e9


class Recommender(Model):
    """Everything is in the graph. Whom it does not know gets what most like. Where a user has had almost everything,
    the last items are none: -1 or empty, with a score of -1e9."""

    names_in = ("user",)
    names_out = ("item", "score")
    seen: Tensor
    """bool [users + 1, items]: what each user has had."""
    liked: Tensor
    """bool [users + 1, items]: what of it they liked."""
    popularity: Tensor
    """float32 [items]: the share of users who liked it."""

    def __init__(self, examples: Examples, *, top: int) -> None:
        super().__init__()
        targets = examples.targets
        if not isinstance(targets, Choices):
            raise RecipeError("this model is for ratings, and data.wanted = 'top'")
        users, items = Vocabulary(examples.inputs["user"]), Vocabulary(values_of(targets.items))
        self.vocabularies = {"user": users, "item": items}
        self.top = min(top, len(items))
        self.sample = {"user": examples.inputs["user"][:2]}
        rows = users.numbers(examples.inputs["user"])
        seen, liked = np.zeros((2, len(users) + 1, len(items)), bool)
        for row, had, well in zip(rows, targets.items, targets.liked(), strict=True):
            seen[row, items.numbers(values_of([had])) - 1] = True
            liked[row, items.numbers(values_of([well])) - 1] = True
        self.register_buffer("seen", torch.from_numpy(seen))
        self.register_buffer("liked", torch.from_numpy(liked))
        self.register_buffer("popularity", torch.from_numpy(liked[1:].mean(0, dtype=np.float32)))

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return (torch.from_numpy(self.vocabularies["user"].numbers(inputs["user"])),)

    def scores(self, user: Tensor) -> Tensor:
        """Numbers of users [n] → [n, items]; number 0 is nobody, and may get anything."""
        raise NotImplementedError

    def forward(self, user: Tensor) -> tuple[Tensor, ...]:
        """Numbers of users [n] → those of items, the best first, and their scores [n, top]."""
        known = torch.where(user[:, None] == 0, self.popularity, self.scores(user))
        score, at = known.masked_fill(self.seen[user], _NEVER).topk(self.top)
        return torch.where(score > _NEVER, at + 1, 0), score
