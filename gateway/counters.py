"""Quotas that all workers of a host count together, so that together they never let through more than one would.

The counters of every tenant and key lie in a table in shared memory. A call's reservation, and its settlement, load the
two it concerns, go by the rules of `gateway.quota` unchanged, and save them, all under the tenant's lock. Calls under
way are counted for each worker, so that those of a killed one can be struck out; what it had reserved is not given
back, and becomes free with time. Whatever a kill leaves half done errs towards letting through less.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from hashlib import blake2b
from types import TracebackType

from gateway.call import Call, Limits
from gateway.errors import QuotaExceeded
from gateway.memory import Memory
from gateway.quota import Hold, Holder, Pair, Quota
from runtimes.clock import Clock


class Counters:
    """The table: ENTRIES of them, in buckets of BUCKET. An entry may lie anywhere in the bucket that its hash names,
    and stays there until it is idle and another needs the room: then it is as if it had never been."""

    def __init__(self, memory: Memory, *, workers: int) -> None:
        self.memory = memory
        self.hashes = memory.whole(0, ENTRIES, "Q")
        """Whose the entry is; 0 is nobody's."""
        self.levels = memory.real(8 * ENTRIES, LEVELS * ENTRIES)
        """Of each entry: when its requests are full again, at how many seconds a request; the same of its tokens."""
        first_bytes = 8 * ENTRIES * (1 + LEVELS)
        self.running = [memory.whole(first_bytes + 4 * ENTRIES * it, ENTRIES, "I") for it in range(workers)]
        """Calls under way, by worker, of each entry."""

    @classmethod
    def make(cls, *, workers: int) -> Counters:
        return cls(Memory.make("headrace-counters", ENTRIES * (8 * (1 + LEVELS) + 4 * workers)), workers=workers)

    def find(self, hash: int) -> int:
        """The entry's place; -1 if there is none. To be asked under any of the memory's locks."""
        first = hash % BUCKETS * BUCKET
        bucket = self.hashes[first : first + BUCKET].tolist()
        return first + bucket.index(hash) if hash in bucket else -1

    def claim(self, hashes: Sequence[int], now_s: float) -> None:
        """Make those entries of these that are not there; to be asked with all locks. Raises QuotaExceeded if a bucket
        is full of others that are in use."""
        kept = {self.find(hash) for hash in hashes}
        for hash in hashes:
            if self.find(hash) < 0:
                place = self._room(hash % BUCKETS * BUCKET, kept, now_s)
                kept.add(place)
                # In this order, a kill in between leaves nobody another's entry.
                self.hashes[place] = 0
                self.levels[LEVELS * place : LEVELS * (place + 1)] = NO_LEVELS
                self.hashes[place] = hash

    def _room(self, first: int, kept: Set[int], now_s: float) -> int:
        """A place in the bucket for a new entry."""
        for place in range(first, first + BUCKET):
            if place not in kept and (not self.hashes[place] or self._idle(place, now_s)):
                return place
        raise QuotaExceeded(
            "More tenants and keys are calling at once than this gateway can count for; retry in a moment.",
            retry_after_s=1.0,
        )

    def strike_out(self, worker: int) -> None:
        """The worker has gone, and its calls with it."""
        self.memory.lock_all()
        running = self.running[worker]
        running.cast("B")[:] = bytes(running.nbytes)
        self.memory.unlock()

    def running_at(self, place: int) -> int:
        return sum([running[place] for running in self.running])

    def _idle(self, place: int, now_s: float) -> bool:
        requests_full_s, tokens_full_s = self.levels[LEVELS * place], self.levels[LEVELS * place + 2]
        return requests_full_s <= now_s and tokens_full_s <= now_s and not self.running_at(place)


#: 65,536 tenants and keys in use at once take 2.6 MB, and 0.26 for each worker. With half as many a bucket is full once
#: in a million tables.
BUCKET, BUCKETS = 64, 1024
ENTRIES = BUCKET * BUCKETS
LEVELS = 4
NO_LEVELS = memoryview(bytes(8 * LEVELS)).cast("d")


def entry_hash(kind: str, id: str) -> int:
    """Two of ten thousand tenants are taken for one once in 4e11 gateways; they would then share their limits."""
    return int.from_bytes(blake2b(f"{kind}/{id}".encode(), digest_size=8).digest()) or 1


class SharedQuota(Quota):
    """A Quota whose counters are the table's; those in this process are where they are worked on."""

    def __init__(self, *, clock: Clock, counters: Counters, worker: int) -> None:
        super().__init__(clock=clock)
        self.counters = counters
        self.worker = worker

    def hold(self, call: Call, *, tokens_out_default: int) -> Hold:
        return SharedHold(self, call, tokens_out_default)

    @property
    def holds(self) -> int:
        """Those of this worker."""
        tenants = [holder for (kind, _), holder in self.holders.items() if kind == "tenant"]
        return sum(holder.own for holder in tenants if isinstance(holder, SharedHolder))

    def _new_holder(self, kind: str, id: str, name: str, limits: Limits) -> Holder:
        return SharedHolder(entry_hash(kind, id), self.counters, self.worker, name, limits)


class SharedHold(Hold):
    """See Quota.hold."""

    __slots__ = ()

    def __enter__(self) -> None:
        with Loaded(self._quota, self._quota.pair(self._call.principal), taking=True):
            super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with Loaded(self._quota, self._pair, taking=False):
            super().__exit__(kind, error, traceback)


class Loaded:
    """Inside, the pair's counters are those of all workers, and nobody else's to change."""

    __slots__ = ("_key", "_now_s", "_taking", "_tenant")

    def __init__(self, quota: Quota, pair: Pair, *, taking: bool) -> None:
        assert isinstance(pair.tenant, SharedHolder)
        assert isinstance(pair.key, SharedHolder)
        self._tenant, self._key = pair.tenant, pair.key
        self._now_s = quota.clock.now_s()
        self._taking = taking

    def __enter__(self) -> None:
        tenant, key, memory = self._tenant, self._key, self._tenant.counters.memory
        # A key is only ever used with its tenant, so the tenant's lock is enough for both.
        memory.lock(tenant.hash % ENTRIES)
        try:
            if not (tenant.found() and key.found()):
                memory.unlock()
                memory.lock_all()
                tenant.counters.claim((tenant.hash, key.hash), self._now_s)
                assert tenant.found()
                assert key.found()
            tenant.load(self._now_s, taking=self._taking)
            key.load(self._now_s, taking=self._taking)
        except BaseException:
            memory.unlock()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tenant.save()
        self._key.save()
        self._tenant.counters.memory.unlock()


class SharedHolder(Holder):
    """One tenant's or key's counters, as they were when they were last loaded."""

    def __init__(self, hash: int, counters: Counters, worker: int, name: str, limits: Limits) -> None:
        super().__init__(name, limits)
        self.hash = hash
        self.counters = counters
        self._own = counters.running[worker]
        self._place = 0
        self._loaded = 0
        self._units_s = self.requests.unit_s, self.tokens.unit_s

    def change(self, limits: Limits, now_s: float) -> None:
        super().change(limits, now_s)
        self._units_s = self.requests.unit_s, self.tokens.unit_s

    def found(self) -> bool:
        """Whether there is an entry. It stays while it is in use, or a lock is held."""
        if self.counters.hashes[self._place] != self.hash:
            self._place = max(0, self.counters.find(self.hash))
        return self.counters.hashes[self._place] == self.hash

    def load(self, now_s: float, *, taking: bool) -> None:
        """Whoever takes does so at the limits it knows of. Whoever settles may know only of ones long changed, so it
        does so at those of whoever took last."""
        levels, level = self.counters.levels, LEVELS * self._place
        self.running = self._loaded = self.counters.running_at(self._place)
        for limit, own_unit_s in zip((self.requests, self.tokens), self._units_s, strict=True):
            limit.full_at_s, unit_s = levels[level], levels[level + 1]
            limit.unit_s = own_unit_s if taking else unit_s
            if unit_s and limit.unit_s and unit_s != limit.unit_s:
                limit.full_at_s = now_s + (limit.full_at_s - now_s) / unit_s * limit.unit_s
            level += 2

    def save(self) -> None:
        levels, level = self.counters.levels, LEVELS * self._place
        for limit in (self.requests, self.tokens):
            levels[level] = limit.full_at_s
            if limit.unit_s:  # without a limit nothing is added, and what was used under one stays
                levels[level + 1] = limit.unit_s
            level += 2
        # Last, so that a kill before it leaves more taken than there is use for.
        self._own[self._place] += self.running - self._loaded

    @property
    def own(self) -> int:
        """Calls under way in this worker."""
        return self._own[self._place] if self.found() else 0

    def idle(self, now_s: float) -> bool:
        return not self.own  # the rest of it the table remembers
