"""What came of one tenant's calls: outcomes, latencies, and how much of it in each second."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from loadtests.client import Answer
from loadtests.report import Service, Spread
from loadtests.scenario import Objective


class Tally:
    """Filled while a trial runs. Latencies are those of served calls: a refusal is quick, and would flatter them."""

    def __init__(self, slo: Objective | None) -> None:
        self.slo = slo
        self.outcomes: Counter[str] = Counter()
        self.chunks = self.tokens = self.good = 0
        self.first_s, self.total_s, self.late_s, self.gaps_s = (array("d") for _ in range(4))
        self.served_in: Counter[int] = Counter()
        """By second since the start."""
        self.tokens_in: Counter[int] = Counter()

    def count(self, answer: Answer, *, since_s: float, start_s: float) -> None:
        """Latencies count from `since_s`."""
        outcome, second = answer.outcome, int(answer.end_s - start_s)
        self.outcomes[outcome] += 1
        self.chunks += answer.chunks
        self.tokens += answer.tokens
        self.tokens_in[second] += answer.tokens
        if outcome != "served":
            return
        self.served_in[second] += 1
        total_s = answer.end_s - since_s
        self.total_s.append(total_s)
        first_s = 0.0
        if answer.first_s is not None:
            first_s = answer.first_s - since_s
            self.first_s.append(first_s)
        if self.slo is None or _kept(self.slo, first_s=first_s, gap_s=answer.gap_s_max, total_s=total_s):
            self.good += 1

    def add(self, other: Tally) -> None:
        """Count everything of the other, too."""
        self.outcomes += other.outcomes
        self.served_in += other.served_in
        self.tokens_in += other.tokens_in
        self.chunks += other.chunks
        self.tokens += other.tokens
        self.good += other.good
        for mine, theirs in (
            (self.first_s, other.first_s),
            (self.total_s, other.total_s),
            (self.late_s, other.late_s),
            (self.gaps_s, other.gaps_s),
        ):
            mine.extend(theirs)

    def service(self, elapsed_s: float) -> Service:
        seconds = range(max([*self.tokens_in, -1]) + 1)
        return Service(
            calls=self.outcomes.total(),
            outcomes={outcome: count for outcome, count in sorted(self.outcomes.items()) if count},
            chunks=self.chunks,
            tokens=self.tokens,
            good_per_s=self.good / elapsed_s if self.slo is not None else None,
            first_token=Spread.of(self.first_s),
            gap=Spread.of(self.gaps_s),
            total=Spread.of(self.total_s),
            late=Spread.of(self.late_s),
            served_in=tuple(self.served_in[second] for second in seconds),
            tokens_in=tuple(self.tokens_in[second] for second in seconds),
        )


def _kept(slo: Objective, *, first_s: float, gap_s: float, total_s: float) -> bool:
    bounds = ((slo.first_token_s_max, first_s), (slo.gap_s_max, gap_s), (slo.total_s_max, total_s))
    return all(bound is None or value <= bound for bound, value in bounds)


def together(tallies: Iterable[Tally], slo: Objective | None) -> Tally:
    """All of them as one."""
    whole = Tally(slo)
    for tally in tallies:
        whole.add(tally)
    return whole
