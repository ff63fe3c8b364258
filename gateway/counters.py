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
        self.running = memory.whole(8 * ENTRIES * (1 + LEVELS), workers * ENTRIES, "I")
        """Of each entry: calls under way in each worker."""
        self.workers = workers

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
        self.running[worker :: self.workers] = memoryview(bytes(4 * ENTRIES)).cast("I")
        self.memory.unlock()

    def _idle(self, place: int, now_s: float) -> bool:
        requests_full_s, _, tokens_full_s, _ = self.levels[LEVELS * place : LEVELS * (place + 1)]
        running = self.running[self.workers * place : self.workers * (place + 1)]
        return requests_full_s <= now_s and tokens_full_s <= now_s and not any(running)


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
    """A Quota whose counters are the table's; those in this process are where they are worked on. Only what is
    limited is counted: a call that began while there was no limit is not held against one that is set meanwhile."""

    def __init__(self, *, clock: Clock, counters: Counters, worker: int) -> None:
        super().__init__(clock=clock)
        self.counters = counters
        self.worker = worker
        self.under_way = 0

    def hold(self, call: Call, *, tokens_out_default: int) -> Hold:
        return SharedHold(self, call, tokens_out_default)

    @property
    def holds(self) -> int:
        """Those of this worker."""
        return self.under_way

    def _new_holder(self, kind: str, id: str, name: str, limits: Limits) -> Holder:
        return SharedHolder(entry_hash(kind, id), self.counters, self.worker, name, limits)


class SharedHold(Hold):
    """See Quota.hold."""

    __slots__ = ("_counted", "_shared")

    def __init__(self, quota: SharedQuota, call: Call, tokens_out_default: int) -> None:
        super().__init__(quota, call, tokens_out_default)
        self._shared = quota

    def __enter__(self) -> None:
        quota = self._shared
        self._counted = Counted(quota, quota.pair(self._call.principal))
        with self._counted.loaded(quota.clock.now_s(), taking=True):
            super().__enter__()
        quota.under_way += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shared.under_way -= 1
        with self._counted.loaded(self._shared.clock.now_s(), taking=False):
            super().__exit__(kind, error, traceback)


class Counted:
    """Those of a pair's holders that one call is counted for. Inside, their counters are those of all workers, and
    nobody else's to change."""

    __slots__ = ("_counters", "_holders", "_lock", "_now_s", "_taking")

    def __init__(self, quota: SharedQuota, pair: Pair) -> None:
        tenant, key = pair.tenant, pair.key
        assert isinstance(tenant, SharedHolder)
        assert isinstance(key, SharedHolder)
        self._counters = quota.counters
        # A key is only ever used with its tenant, so the tenant's lock is enough for both.
        self._lock = tenant.hash % ENTRIES
        self._holders = (
            () if tenant.free and key.free else (key,) if tenant.free else (tenant,) if key.free else (tenant, key)
        )

    def loaded(self, now_s: float, *, taking: bool) -> Counted:
        self._now_s, self._taking = now_s, taking
        return self

    def __enter__(self) -> None:
        if not self._holders:
            return
        memory = self._counters.memory
        memory.lock(self._lock)
        try:
            for holder in self._holders:
                if not holder.found():
                    self._claim()
            for holder in self._holders:
                holder.load(self._now_s, taking=self._taking)
        except BaseException:
            memory.unlock()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._holders:
            for holder in self._holders:
                holder.save()
            self._counters.memory.unlock()

    def _claim(self) -> None:
        memory, counters = self._counters.memory, self._counters
        memory.unlock()
        memory.lock_all()
        counters.claim([holder.hash for holder in self._holders], self._now_s)
        for holder in self._holders:
            assert holder.found()


class SharedHolder(Holder):
    """One tenant's or key's counters, as they were when they were last loaded."""

    def __init__(self, hash: int, counters: Counters, worker: int, name: str, limits: Limits) -> None:
        super().__init__(name, limits)
        self.hash = hash
        self._counters = counters
        self._worker = worker
        self._units_s = self.requests.unit_s, self.tokens.unit_s
        self._units_found_s = self._units_s
        self._loaded = 0
        self._lie_at(0)

    def change(self, limits: Limits, now_s: float) -> None:
        super().change(limits, now_s)
        self._units_s = self.requests.unit_s, self.tokens.unit_s

    def found(self) -> bool:
        """Whether there is an entry; asked with a lock, under which it stays where it is."""
        hashes = self._counters.hashes
        if hashes[self._place] == self.hash:
            return True
        self._lie_at(max(0, self._counters.find(self.hash)))
        return hashes[self._place] == self.hash

    def load(self, now_s: float, *, taking: bool) -> None:
        """Whoever takes does so at the limits it knows of. Whoever settles may know only of ones long changed, so it
        does so at those of whoever took last."""
        counters, requests, tokens = self._counters, self.requests, self.tokens
        self.running = self._loaded = sum(counters.running[self._calls])
        requests.full_at_s, requests_unit_s, tokens.full_at_s, tokens_unit_s = counters.levels[self._levels]
        found = self._units_found_s = requests_unit_s, tokens_unit_s
        requests.unit_s, tokens.unit_s = units = self._units_s if taking else found
        if found != units:
            for limit, unit_s in ((requests, requests_unit_s), (tokens, tokens_unit_s)):
                if unit_s and limit.unit_s:
                    limit.full_at_s = now_s + (limit.full_at_s - now_s) / unit_s * limit.unit_s

    def save(self) -> None:
        counters, requests, tokens, level = self._counters, self.requests, self.tokens, self._levels.start
        counters.levels[level] = requests.full_at_s
        counters.levels[level + 2] = tokens.full_at_s
        if (requests.unit_s, tokens.unit_s) != self._units_found_s:
            # Without a limit nothing is added, and what was used under one stays as it is.
            counters.levels[level + 1] = requests.unit_s or self._units_found_s[0]
            counters.levels[level + 3] = tokens.unit_s or self._units_found_s[1]
        # Last, so that a kill before it leaves more taken than there is use for.
        counters.running[self._calls.start + self._worker] += self.running - self._loaded

    def idle(self, now_s: float) -> bool:
        return True  # the table remembers

    def _lie_at(self, place: int) -> None:
        self._place = place
        self._levels = slice(LEVELS * place, LEVELS * (place + 1))
        self._calls = slice(self._counters.workers * place, self._counters.workers * (place + 1))
