"""Percentiles, and ratios between results."""

import random
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from loadtests.report import Report, ReportFault, Results, Side, Spread, compare, machine, percentile, read
from loadtests.scenario import load, shipped


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1_000])
@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(count: int, percent: int) -> None:
    chance = random.Random(count)
    values = [chance.choice([0.1, 0.2, chance.random()]) for _ in range(count)]
    naive = next(it for it in sorted(values) if sum(other <= it for other in values) * 100 >= percent * count)
    assert percentile(sorted(values), percent) == naive


def test_a_spread_takes_values_in_any_order() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(
        count=3, p50_s=2.0, p90_s=3.0, p99_s=3.0, max_s=3.0, curve_s=(1.0,) * 34 + (2.0,) * 33 + (3.0,) * 34
    )


def test_no_values_have_no_spread() -> None:
    assert Spread.of([]) is None


def test_ratios_are_taken_pair_by_pair() -> None:
    # Both drift by a factor of 4 from trial to trial; side by side B is always half as fast.
    ours = [report(elapsed_s=1.0), report(elapsed_s=4.0)]
    theirs = [report(elapsed_s=2.0), report(elapsed_s=8.0)]
    assert compare(ours, theirs)["served/s"] == [0.5, 0.5]


def test_a_figure_that_one_side_lacks_is_not_compared() -> None:
    with_latency = report(total=Spread.of([1.0]))
    assert "whole call p50 ms" not in compare([with_latency], [report()])
    assert compare([with_latency], [with_latency])["whole call p50 ms"] == [1.0]


def test_results_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ReportFault, match="there are 1 and 2"):
        compare([report()], [report(), report()])
    with pytest.raises(ReportFault, match="there are 0 and 0"):
        compare([], [])


@pytest.mark.parametrize("name", shipped())
def test_every_scenario_reads_as_it_was_written(name: str, tmp_path: Path) -> None:
    results = Results(sides=(Side("a", runs=(replace(report(), settings=load(name)),)),))
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(results))
    assert read(tmp_path / "a.json") == results


def test_results_read_as_they_were_written(tmp_path: Path) -> None:
    results = Results(sides=(Side("a", runs=(report(total=Spread.of([0.1, 0.2])),)), Side("b", runs=(report(),))))
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(results))
    assert read(tmp_path / "a.json") == results


def test_a_file_that_holds_no_results_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"sides": 1}')
    with pytest.raises(ReportFault, match=r"a\.json is not what `--json` makes"):
        read(tmp_path / "a.json")
    with pytest.raises(ReportFault, match=r"b\.json can't be read"):
        read(tmp_path / "b.json")


def report(*, elapsed_s: float = 1.0, total: Spread | None = None) -> Report:
    return Report(
        scenario="echo",
        settings=load("echo"),
        target="http://127.0.0.1:8000",
        at="2026-01-01T00:00:00+00:00",
        machine=machine(),
        load_average=0.5,
        elapsed_s=elapsed_s,
        client_cores=0.2,
        calls=10,
        outcomes={"served": 10},
        chunks=0,
        tokens=30,
        first_token=None,
        gap=None,
        total=total,
        late=None,
        good_per_s=None,
        served_in=(10,),
        tokens_in=(30,),
        tenants={},
        cost=None,
    )
