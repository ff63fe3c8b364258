"""The plainest things to do with ratings, also where models begin."""

from __future__ import annotations

import numpy as np

from training.contract import Array, Choices, Examples, Values
from training.errors import RecipeError
from training.spec.floors import Biases
from training.vocabulary import Vocabulary, values_of

_ROUNDS = 20
_TOP = 100


def biases(spec: Biases, train: Examples, test: Examples) -> dict[str, Array]:
    """`value` [n]; who or what is not in `train` is at the mean."""
    if not isinstance(train.targets, Values) or "item" not in train.inputs:
        raise RecipeError("the floor 'biases' is for ratings, and data.wanted = 'rating'")
    users, items = (Vocabulary(train.inputs[name]) for name in ("user", "item"))
    mean, by_user, by_item = fit_biases(
        users.numbers(train.inputs["user"]), items.numbers(train.inputs["item"]), train.targets.values, spec.shrink
    )
    numbers = users.numbers(test.inputs["user"]), items.numbers(test.inputs["item"])
    return {"value": mean + by_user[numbers[0]] + by_item[numbers[1]]}


def fit_biases(user: Array, item: Array, rating: Array, shrink: float) -> tuple[float, Array, Array]:
    """The mean, and how far above it each user and each item is, float64 by number; number 0, which is nobody, at 0.
    Ridge regression, in turns until nothing moves."""
    mean = float(rating.mean())
    by_user, by_item = np.zeros(user.max() + 1), np.zeros(item.max() + 1)
    users, items = (np.bincount(it) + shrink for it in (user, item))
    users[0] = items[0] = 1
    for _ in range(_ROUNDS):
        by_item = np.bincount(item, rating - mean - by_user[user]) / items
        by_user = np.bincount(user, rating - mean - by_item[item]) / users
    return mean, by_user, by_item


def popularity(train: Examples, test: Examples) -> dict[str, Array]:
    """`item` [n, 100 or all there are], `score`: how many liked it."""
    if not isinstance(train.targets, Choices):
        raise RecipeError("the floor 'popularity' is for ratings, and data.wanted = 'top'")
    items = Vocabulary(values_of(train.targets.items))
    counts = np.zeros(len(items) + 1)
    for liked in train.targets.liked():
        counts[items.numbers(values_of([liked]))] += 1
    order = 1 + np.argsort(-counts[1:], kind="stable")
    had = dict(zip(train.inputs["user"].tolist(), train.targets.items, strict=True))
    found = np.zeros((len(test), min(_TOP, len(items))), np.int64)
    for row, user in enumerate(test.inputs["user"].tolist()):
        stale = np.isin(order, items.numbers(values_of([had.get(user, ())])))
        # What somebody has had comes last, if there is not enough else.
        found[row] = order[np.argsort(stale, kind="stable")][: found.shape[1]]
    return {"item": items.of(found), "score": counts[found]}
