"""User and item → rating: biases, and what is left as the product of a vector of each.

Both vectors are Gaussian beforehand and, approximately, afterwards; each is worked out in turn from the means *and*
variances of the others: Lim and Teh, Variational Bayesian Approach to Movie Rating Prediction, KDD Cup 2007.
Plain alternating least squares takes the vector of an item that two users rated as seriously as that of one with two
hundred; here what is not known counts less, so more rounds do no harm.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from training.contract import Array, Examples, Inputs, Rows, Values
from training.errors import RecipeError
from training.evaluation.baselines import fit_biases
from training.model import Model
from training.spec.models import Factors
from training.vocabulary import Vocabulary

LOG = logging.getLogger("training")


class FactorModel(Model):
    """A user or an item that it does not know is at the mean, with the other's bias."""

    names_in = ("user", "item")
    names_out = ("value",)

    def __init__(self, spec: Factors, examples: Examples) -> None:
        super().__init__()
        if not isinstance(examples.targets, Values) or set(examples.inputs) != {*self.names_in}:
            raise RecipeError("the model 'factors' is for ratings, and data.wanted = 'rating'")
        self.vocabularies = {name: Vocabulary(examples.inputs[name]) for name in self.names_in}
        self.sample = {name: examples.inputs[name][:2] for name in self.names_in}
        user, item = (self.vocabularies[name].numbers(examples.inputs[name]) for name in self.names_in)
        ratings = examples.targets.values
        self.mean, by_user, by_item = fit_biases(user, item, ratings, spec.shrink)
        self.least, self.most = float(ratings.min()), float(ratings.max())
        left = ratings - self.mean - by_user[user] - by_item[item]
        chance = np.random.default_rng(torch.randint(2**62, ()).item())
        users, items = factorize(user, item, left, spec, chance)
        # One table each, its bias last, so that a row is read once.
        for name, vectors, bias in (("users", users, by_user), ("items", items, by_item)):
            self.register_buffer(name, torch.from_numpy(np.column_stack([vectors, bias]).astype(np.float32)))

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(self.vocabularies[name].numbers(inputs[name])) for name in self.names_in)

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, ...]:
        """Numbers of users and items [n] → ratings [n], none beyond those that were ever given."""
        one, other = self.users[user], self.items[item]
        products = (one[:, :-1] * other[:, :-1]).sum(1)
        return ((self.mean + one[:, -1] + other[:, -1] + products).clamp(self.least, self.most),)


def build(spec: Factors, rows: Rows) -> FactorModel:
    """Solved; the first vectors are drawn from torch's random numbers."""
    return FactorModel(spec, rows.train)


def factorize(
    user: Array, item: Array, values: Array, spec: Factors, chance: np.random.Generator
) -> tuple[Array, Array]:
    """Vectors of users and of items by number, [users, width] and [items, width], whose products come near `values`."""
    given = sparse.csr_matrix((values.astype(np.float64), (user, item)))
    there = sparse.csr_matrix((np.ones(len(values)), (user, item)))
    means = chance.normal(0, np.sqrt(spec.spread), (there.shape[1], spec.width))
    squares = _squares(means) + spec.spread * np.eye(spec.width)
    for _ in range(spec.rounds):
        users, of_users = _solve(given, there, means, squares, spread=1.0, noise=spec.noise)
        means, squares = _solve(given.T, there.T, users, of_users, spread=spec.spread, noise=spec.noise)
    return users, means


def _solve(
    given: sparse.csr_matrix, there: sparse.csr_matrix, means: Array, squares: Array, *, spread: float, noise: float
) -> tuple[Array, Array]:
    """One side's means [n, width] and expected squares [n, width, width], from the other's."""
    width = means.shape[1]
    sums = (there @ squares.reshape(len(squares), -1)).reshape(-1, width, width)
    covariances = np.linalg.inv(sums / noise + np.eye(width) / spread)
    found = np.einsum("nij,nj->ni", covariances, given @ means / noise)
    return found, _squares(found) + covariances


def _squares(vectors: Array) -> Array:
    return vectors[:, :, None] * vectors[:, None, :]
