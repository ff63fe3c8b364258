"""Quotas that all workers of a host count together, so that together they never let through more than one would.

The counters of every tenant and key lie in a table in shared memory. A call's reservation, and its settlement, load the
two it concerns, go by the rules of `gateway.quota` unchanged, and save them, all under the tenant's lock. Calls under
way, and the money reserved for them, are counted for each worker, so that those of a killed one can be struck out; the
tokens it had reserved are not given back, and become free with time. Whatever a kill leaves half done errs towards
letting through less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from hashlib import blake2b
from struct import Struct
from types import TracebackType

from gateway.call import Call, Limits
from gateway.errors import QuotaExceeded
from gateway.memory import Memory
from gateway.price import Price
from gateway.purse import SharedPurse, period_words, reserved_words
from gateway.quota import Gcra, Hold, Holder, Quota, purses_of
from gateway.store import Spent
from runtimes.clock import Clock


class Counters:
    """The table: ENTRIES of them, in buckets of BUCKET. An entry may lie anywhere in the bucket that its hash names,
    and stays there until it is idle and another needs the room: then it is as if it had never been.

    An entry is whose it is, by hash, 0 for nobody; when its requests are full again, at how many seconds a request;
    the same of its tokens; and the calls under way in each worker. Written in this order, so that a kill amid it leaves
    more taken than there is use for. Behind that is its purse (see gateway.purse), which only calls that cost something
    look into."""

    def __init__(self, memory: Memory, *, workers: int) -> None:
        self.memory = memory
        self.workers = workers
        self.entry = _entry(workers)
        self.size_bytes = _size_bytes(workers)
        words = self.size_bytes // 8
        self.words = memory.whole(0, ENTRIES * words, "Q")
        self._hashes = self.words[::words]

    @classmethod
    def make(cls, *, workers: int) -> Counters:
        return cls(Memory.make("headrace-counters", ENTRIES * _size_bytes(workers)), workers=workers)

    def find(self, hash: int) -> int:
        """The entry's place; -1 if there is none. To be asked under any of the memory's locks."""
        first = hash % BUCKETS * BUCKET
        bucket = self._hashes[first : first + BUCKET].tolist()
        return first + bucket.index(hash) if hash in bucket else -1

    def claim(self, hashes: Sequence[int], now_s: float, at_s: float) -> None:
        """Make those entries of these that are not there; to be asked with all locks. Raises QuotaExceeded if a bucket
        is full of others that are in use."""
        kept = {self.find(hash) for hash in hashes}
        for hash in hashes:
            if self.find(hash) < 0:
                place = self._room(hash % BUCKETS * BUCKET, kept, now_s, at_s)
                kept.add(place)
                self._hashes[place] = 0  # a kill from here on leaves nobody another's entry
                start = place * self.size_bytes
                self.entry.pack_into(self.memory.bytes, start, 0, *NO_LEVELS, *bytes(self.workers))
                purse = slice((start + self.entry.size) // 8, (start + self.size_bytes) // 8)
                self.words[purse] = memoryview(bytes(self.size_bytes - self.entry.size)).cast("Q")
                self._hashes[place] = hash

    def strike_out(self, worker: int) -> None:
        """The worker has gone, and its calls with it."""
        self.memory.lock_all()
        words, purse = self.size_bytes // 8, self.entry.size // 8
        for column in (WORDS + worker, *(purse + word for word in reserved_words(self.workers, worker))):
            self.words[column::words] = memoryview(bytes(8 * ENTRIES)).cast("Q")
        self.memory.unlock()

    def restore(self, spent: Iterable[Spent], now_s: float, at_s: float) -> None:
        """Know what the records of the day and the month of `at_s` say; before any call. Raises QuotaExceeded if they
        are of more tenants and keys than there is room for."""
        self.memory.lock_all()
        try:
            for (kind, id), purse in purses_of(spent, at_s).items():
                holder = SharedHolder(entry_hash(kind, id), self, 0, id, Limits())
                self.claim([holder.hash], now_s, at_s)
                holder.load(now_s, taking=True, priced=True)
                holder.purse.put(purse)
        finally:
            self.memory.unlock()

    def _room(self, first: int, kept: Set[int], now_s: float, at_s: float) -> int:
        """A place in the bucket for a new entry."""
        for place in range(first, first + BUCKET):
            if place not in kept and (not self._hashes[place] or self._idle(place, now_s, at_s)):
                return place
        raise QuotaExceeded(
            "More tenants and keys are calling at once than this gateway can count for; retry in a moment.",
            retry_after_s=1.0,
        )

    def _idle(self, place: int, now_s: float, at_s: float) -> bool:
        start = place * self.size_bytes
        _, requests_full_s, _, tokens_full_s, _, *running = self.entry.unpack_from(self.memory.bytes, start)
        after = (start + self.size_bytes) // 8
        month_spent_nano, month_ends_s = self.words[after - period_words(self.workers)], self.words[after - 1]
        rested = requests_full_s <= now_s and tokens_full_s <= now_s and not any(running)
        return rested and (at_s >= month_ends_s or not month_spent_nano)


def _entry(workers: int) -> Struct:
    """Of 8 bytes each, which processors write whole."""
    return Struct(f"@Q4d{workers}Q")


def _size_bytes(workers: int) -> int:
    """Of an entry and its purse."""
    return _entry(workers).size + 2 * 8 * period_words(workers)


#: 65,536 tenants and keys in use at once take 5.8 MB, and 1.6 for each worker. With half as many a bucket is full once
#: in a million tables.
BUCKET, BUCKETS = 64, 1024
ENTRIES = BUCKET * BUCKETS
NO_LEVELS = (0.0, 0.0, 0.0, 0.0)
#: Before the calls under way.
WORDS = 1 + len(NO_LEVELS)


def entry_hash(kind: str, id: str) -> int:
    """Two of ten thousand tenants are taken for one once in 4e11 gateways; they would then share their limits."""
    return int.from_bytes(blake2b(f"{kind}/{id}".encode(), digest_size=8).digest()) or 1


class SharedQuota(Quota):
    """A Quota whose counters are the table's; those in this process are where they are worked on. Only what is
    limited is counted: a call that began while there was no limit is not held against one that is set meanwhile."""

    def __init__(self, *, clock: Clock, counters: Counters, worker: int) -> None:
        super().__init__(clock=clock)
        self.counters = counters
        self.worker = worker
        self.under_way = 0

    def hold(self, call: Call, *, tokens_out_default: int, price: Price | None = None) -> Hold:
        return SharedHold(self, call, tokens_out_default, price)

    @property
    def holds(self) -> int:
        """Those of this worker."""
        return self.under_way

    def _new_holder(self, kind: str, id: str, name: str, limits: Limits) -> Holder:
        return SharedHolder(entry_hash(kind, id), self.counters, self.worker, name, limits)


class SharedHold(Hold):
    """See Quota.hold. From `_load` to `_save` the counters are those of all workers, and nobody else's to change."""

    __slots__ = ("_counted", "_lock", "_priced", "_shared")

    def __init__(self, quota: SharedQuota, call: Call, tokens_out_default: int, price: Price | None) -> None:
        super().__init__(quota, call, tokens_out_default, price)
        self._shared = quota
        self._priced = price is not None

    def __enter__(self) -> None:
        _, tenant, key = self._shared.pair(self._call.principal)
        assert isinstance(tenant, SharedHolder)
        assert isinstance(key, SharedHolder)
        self._counted = tuple([holder for holder in (tenant, key) if self._priced or not holder.free])
        # A key is only ever used with its tenant, so the tenant's lock is enough for both.
        self._lock = tenant.hash % ENTRIES
        if self._counted:
            self._load(taking=True)
            try:
                super().__enter__()
            finally:
                self._save()
        else:
            super().__enter__()
        self._shared.under_way += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shared.under_way -= 1
        if self._counted:
            self._load(taking=False)
            try:
                super().__exit__(kind, error, traceback)
            finally:
                self._save()
        else:
            super().__exit__(kind, error, traceback)

    def _load(self, *, taking: bool) -> None:
        counters, now_s = self._shared.counters, self._shared.clock.now_s()
        counters.memory.lock(self._lock)
        try:
            for holder in self._counted:
                if not holder.load(now_s, taking=taking, priced=self._priced):
                    self._claim(now_s)
                    for each in self._counted:
                        each.load(now_s, taking=taking, priced=self._priced)
                    return
        except BaseException:
            counters.memory.unlock()
            raise

    def _claim(self, now_s: float) -> None:
        counters = self._shared.counters
        counters.memory.unlock()
        counters.memory.lock_all()
        counters.claim([holder.hash for holder in self._counted], now_s, self._call.at_s)

    def _save(self) -> None:
        for holder in self._counted:
            holder.save()
        self._shared.counters.memory.unlock()


class SharedHolder(Holder):
    """One tenant's or key's counters, as they were when they were last loaded."""

    def __init__(self, hash: int, counters: Counters, worker: int, name: str, limits: Limits) -> None:
        super().__init__(name, limits)
        self.hash = hash
        self._counters = counters
        self._worker = worker
        self._units_s = self.requests.unit_s, self.tokens.unit_s
        self._start_bytes = 0
        self._unpack_from, self._pack_into = counters.entry.unpack_from, counters.entry.pack_into
        self.purse: SharedPurse = SharedPurse(counters.words, workers=counters.workers, worker=worker)

    def change(self, limits: Limits, now_s: float) -> None:
        super().change(limits, now_s)
        self._units_s = self.requests.unit_s, self.tokens.unit_s

    def load(self, now_s: float, *, taking: bool, priced: bool) -> bool:
        """False if there is no entry. Whoever takes does so at the limits it knows of. Whoever settles may know only of
        ones long changed, so it does so at those of whoever took last."""
        requests, tokens, table = self.requests, self.tokens, self._counters.memory.bytes
        found = self._unpack_from(table, self._start_bytes)
        if found[0] != self.hash:
            place = self._counters.find(self.hash)
            if place < 0:
                return False
            self._start_bytes = place * self._counters.size_bytes
            found = self._unpack_from(table, self._start_bytes)
        _, requests.full_at_s, requests_unit_s, tokens.full_at_s, tokens_unit_s, *running = found
        self._running = running
        self.running = self._loaded = sum(running)
        units = self._units_found_s = requests_unit_s, tokens_unit_s
        if taking:
            requests.unit_s, tokens.unit_s = self._units_s
            if units != self._units_s:
                _convert(requests, requests_unit_s, now_s)
                _convert(tokens, tokens_unit_s, now_s)
        else:
            requests.unit_s, tokens.unit_s = units
        if priced:
            self.purse.place((self._start_bytes + self._counters.entry.size) // 8)
        return True

    def save(self) -> None:
        requests, tokens, running = self.requests, self.tokens, self._running
        running[self._worker] += self.running - self._loaded
        # While there is no limit nothing is added, and what was used under one stays as it is.
        requests_unit_s = requests.unit_s or self._units_found_s[0]
        tokens_unit_s = tokens.unit_s or self._units_found_s[1]
        self._pack_into(
            self._counters.memory.bytes,
            self._start_bytes,
            self.hash,
            requests.full_at_s,
            requests_unit_s,
            tokens.full_at_s,
            tokens_unit_s,
            *running,
        )

    def idle(self, now_s: float, at_s: float) -> bool:
        return True  # the table remembers


def _convert(limit: Gcra, unit_s: float, now_s: float) -> None:
    """As many units as were used or owed at the rate of `unit_s` are so at the limit's own."""
    if unit_s and limit.unit_s:
        limit.full_at_s = now_s + (limit.full_at_s - now_s) / unit_s * limit.unit_s
