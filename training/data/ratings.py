"""What users thought of items: single ratings, or all of a user's together.

A file is gone through twice: once to learn whether users and items are whole numbers, once to keep them, 28 bytes a
rating.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from training.contract import Array, Choices, Examples, Rows, Values, objects
from training.data import cleaning, split, tables
from training.data.categories import Categories
from training.errors import DataError
from training.spec.data import Ratings


def load(spec: Ratings) -> Rows:
    """Read the files that the recipe names. Users and items are int64 if every one of them is a whole number, else
    strings. Of an item that a user rated twice the later rating counts."""
    wholes = _wholes(spec)
    every = _read(spec, spec.train, wholes)
    if spec.test is not None:
        test = _read(spec, spec.test, wholes)
        train = every.take(~cleaning.among(every.hashes(), test.hashes()))
        if not len(train.rating):
            raise DataError(f"there are no ratings to train with: each of {spec.train} is also in the test part")
    else:
        held = every.last(spec.test_share) if spec.split == "last" else every.drawn(spec.test_share)
        train, test = every.take(~held), every.take(held)
    for title, part in (("to learn from", train), ("to test with", test)):
        if not len(part.rating):
            raise DataError(f"there are no ratings {title}: set data.test_share, or give data.train more rows")
    users, items = np.unique(train.user), np.unique(train.item)
    note = f"{len(users):,} users and {len(items):,} items to learn from"
    fresh = len(np.setdiff1d(test.user, users))
    notes = (note, f"{fresh} users are in the test part only") if fresh else (note,)
    if spec.wanted == "rating":
        return Rows(train.singly(), test.singly(), notes)
    return Rows(train.by_user(spec.liked_min), test.by_user(spec.liked_min), notes)


class _Part:
    """Ratings as columns, in the order of their files."""

    def __init__(self, user: Array, item: Array, rating: Array, time: Array) -> None:
        self.user, self.item, self.rating, self.time = user, item, rating, time

    def take(self, chosen: Array) -> _Part:
        return _Part(self.user[chosen], self.item[chosen], self.rating[chosen], self.time[chosen])

    def drawn(self, share: float) -> Array:
        """Which are tested with: by their hash."""
        return np.fromiter((split.held_out(it, share) for it in self._pairs()), np.bool_)

    def hashes(self) -> Array:
        """uint64, of each user and item."""
        return np.fromiter((cleaning.hashed(it) for it in self._pairs()), np.uint64)

    def last(self, share: float) -> Array:
        """Which are tested with: this share of each user's, the last ones."""
        held = np.zeros(len(self.user), bool)
        for rows in self._rows_of_users():
            count = round(share * len(rows))
            held[rows[len(rows) - count :]] = True
        return held

    def singly(self) -> Examples:
        return Examples({"user": self.user, "item": self.item}, Values(self.rating, "rating"))

    def by_user(self, liked_min: float) -> Examples:
        rows = self._rows_of_users()
        items = objects([tuple(self.item[it].tolist()) for it in rows])
        ratings = objects([tuple(self.rating[it].tolist()) for it in rows])
        users = np.array([self.user[it[0]] for it in rows], self.user.dtype)
        return Examples({"user": users}, Choices(items, ratings, liked_min))

    def latest(self) -> _Part:
        """Of each user and item the last rating, in the order of their file."""
        user, item = (np.unique(it, return_inverse=True)[1] for it in (self.user, self.item))
        order = np.lexsort((self.time, item, user))  # stable: of two at one time, the one behind
        last = np.ones(len(order), bool)
        last[:-1] = (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)
        return self.take(np.sort(order[last]))

    def _pairs(self) -> Iterator[str]:
        return (f"{user}\0{item}" for user, item in zip(self.user, self.item, strict=True))

    def _rows_of_users(self) -> list[Array]:
        """Each user's, by time."""
        _, number = np.unique(self.user, return_inverse=True)
        order = np.lexsort((np.arange(len(number)), self.time, number))
        return np.split(order, np.nonzero(np.diff(number[order]))[0] + 1)


def _wholes(spec: Ratings) -> tuple[bool, ...]:
    """Whether each user, and each item, is a whole number that fits into 64 bits, in every file."""
    names = (spec.user, spec.item)
    wholes = dict.fromkeys(names, True)
    for file in filter(None, (spec.train, spec.test)):
        for record in tables.stream(file):
            for name in names:
                wholes[name] = wholes[name] and bool(re.fullmatch(r"\d{1,18}", str(record.get(name)), re.ASCII))
    return tuple(wholes[it] for it in names)


def _read(spec: Ratings, file: str, wholes: Sequence[bool]) -> _Part:
    ids = [
        (name, array("q") if whole else Categories())
        for name, whole in zip((spec.user, spec.item), wholes, strict=True)
    ]
    ratings, times = array("f"), array("d")
    timed = False
    for number, record in enumerate(tables.stream(file), 1):
        if number == 1:
            timed = spec.time in record
            if spec.split == "last" and not timed:
                raise DataError(f"{file} has no column {spec.time!r}: name the one with the time in data.time")
            tables.columns([record], (spec.user, spec.item, spec.rating), file=file)
        for name, column in ids:
            text = tables.text(record, name, file=file, number=number)
            if isinstance(column, Categories):
                column.append(text)
            else:
                column.append(int(text))
        ratings.append(tables.number(record, spec.rating, file=file, number=number))
        times.append(tables.number(record, spec.time, file=file, number=number) if timed else number)
    users, items = (it.array() if isinstance(it, Categories) else np.frombuffer(it, np.int64) for _, it in ids)
    return _Part(users, items, np.frombuffer(ratings, np.float32), np.frombuffer(times, np.float64)).latest()
