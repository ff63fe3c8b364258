"""What users thought of items: single ratings, or all of a user's together."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from training.contract import Array, Choices, Examples, Rows, Values, objects, strings
from training.data import split, tables
from training.errors import DataError
from training.spec.data import Ratings


def load(spec: Ratings) -> Rows:
    """Read the files that the recipe names. Users and items are int64 if every one of them is a whole number, else
    strings. Of an item that a user rated twice the later rating counts."""
    records = tables.read(spec.train)
    if spec.test is not None:
        others = tables.read(spec.test)
        wholes = [_whole(records, name) and _whole(others, name) for name in (spec.user, spec.item)]
        train, test = _read(records, wholes, spec, spec.train), _read(others, wholes, spec, spec.test)
        seen = {*zip(test.user.tolist(), test.item.tolist(), strict=True)}
        pairs = zip(train.user.tolist(), train.item.tolist(), strict=True)
        train = train.take(np.array([it not in seen for it in pairs]))
    else:
        every = _read(records, [_whole(records, name) for name in (spec.user, spec.item)], spec, spec.train)
        held = every.last(spec.test_share) if spec.split == "last" else every.drawn(spec.test_share)
        train, test = every.take(~held), every.take(held)
    for title, part in (("to learn from", train), ("to test with", test)):
        if not len(part.rating):
            raise DataError(f"there are no ratings {title}: set data.test_share, or give data.train more rows")
    note = f"{len(set(train.user.tolist())):,} users and {len(set(train.item.tolist())):,} items to learn from"
    fresh = len(set(test.user.tolist()) - set(train.user.tolist()))
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
        pairs = zip(self.user, self.item, strict=True)
        return np.array([split.held_out(f"{user}\0{item}", share) for user, item in pairs])

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

    def _rows_of_users(self) -> list[Array]:
        """Each user's, by time."""
        _, number = np.unique(self.user, return_inverse=True)
        order = np.lexsort((np.arange(len(number)), self.time, number))
        return np.split(order, np.nonzero(np.diff(number[order]))[0] + 1)


def _read(records: Sequence[tables.Record], wholes: Sequence[bool], spec: Ratings, file: str) -> _Part:
    timed = spec.time in records[0]
    if spec.split == "last" and not timed:
        raise DataError(f"{file} has no column {spec.time!r}: name the one with the time in data.time")
    tables.columns(records, (spec.user, spec.item, spec.rating), file=file)
    found: dict[str, Array] = {}
    for name, whole in zip((spec.user, spec.item), wholes, strict=True):
        texts = [tables.text(it, name, file=file, number=at) for at, it in enumerate(records, 1)]
        found[name] = np.array([int(it) for it in texts], np.int64) if whole else strings(texts)
    rating, time = (
        [tables.number(it, name, file=file, number=at) for at, it in enumerate(records, 1)] if name else []
        for name in (spec.rating, spec.time if timed else "")
    )
    part = _Part(
        found[spec.user],
        found[spec.item],
        np.array(rating, np.float32),
        np.array(time or np.arange(len(records)), np.float64),
    )
    latest: dict[object, int] = {}
    for at in np.argsort(part.time, kind="stable").tolist():
        latest[part.user[at], part.item[at]] = at
    return part.take(np.array(sorted(latest.values()), np.int64))


def _whole(records: Sequence[tables.Record], name: str) -> bool:
    """Whether each value is a whole number that fits into 64 bits."""
    return all(re.fullmatch(r"\d{1,18}", str(it.get(name)), re.ASCII) for it in records)
