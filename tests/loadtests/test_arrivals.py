"""Schedules of an open loop."""

import itertools
import statistics
from pathlib import Path

import pytest

from loadtests.arrivals import Bursty, Closed, Constant, Poisson, Trace


def test_a_constant_rate_is_evenly_spaced_and_ends_before_the_duration() -> None:
    assert list(Constant(rate_per_s=4).times_s(1.5)) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]


@pytest.mark.parametrize("rate_per_s", [0.5, 3.0, 1_000.0])
def test_a_constant_rate_does_not_drift(rate_per_s: float) -> None:
    times_s = list(itertools.islice(Constant(rate_per_s=rate_per_s).times_s(1e9), 100_000))
    assert times_s[-1] == pytest.approx(99_999 / rate_per_s, rel=1e-12)


def test_poisson_arrivals_are_the_same_for_the_same_seed_and_differ_for_another() -> None:
    first, again, other = (list(Poisson(rate_per_s=100, seed=seed).times_s(5)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_poisson_arrivals_have_the_rate_and_the_variance_of_independent_callers() -> None:
    times_s = list(Poisson(rate_per_s=200, seed=1).times_s(500))
    gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
    assert times_s == sorted(times_s)
    assert times_s[-1] < 500
    # 100,000 calls: their number's standard deviation is 316, the gaps' variation is 1 to within a hundredth.
    assert len(times_s) == pytest.approx(100_000, abs=5 * 316)
    assert statistics.stdev(gaps_s) / statistics.mean(gaps_s) == pytest.approx(1.0, abs=0.02)


def test_bursty_arrivals_keep_the_rate_and_come_together() -> None:
    times_s = list(Bursty(rate_per_s=200, burstiness=0.25, seed=1).times_s(500))
    gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
    # A Gamma of shape 1/4 varies twice as much as an exponential; the count's standard deviation is 632.
    assert len(times_s) == pytest.approx(100_000, abs=5 * 632)
    assert statistics.stdev(gaps_s) / statistics.mean(gaps_s) == pytest.approx(2.0, abs=0.1)


def test_a_trace_is_replayed_as_fast_as_it_is_told(tmp_path: Path) -> None:
    lines = [f'{{"timestamp": {ms}, "input_length": 5, "output_length": 2}}' for ms in (0, 3_000, 9_000)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    trace = Trace(path=str(tmp_path / "t.jsonl"), speed=10)
    assert list(trace.times_s(60)) == [0.0, 0.3, 0.9]
    assert list(trace.times_s(0.9)) == [0.0, 0.3]


def test_a_closed_loop_has_no_schedule() -> None:
    assert list(itertools.islice(Closed().times_s(1.0), 3)) == [None, None, None]
