"""The gate against growing dearer."""

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from loadtests import gate
from loadtests.__main__ import gate_
from loadtests.gate import Baseline, Ratio, judge, measured
from loadtests.report import Cost, Report, ReportFault, Results, Side, machine
from loadtests.scenario import load

HELD = Baseline(tolerance=0.25, ratios=(Ratio(scenario="plain", figure="CPU µs/call", to="sglang", ratio=2.0),))


@pytest.mark.parametrize(("ours_us", "passes"), [(100.0, True), (200.0, True), (249.0, True), (251.0, False)])
def test_a_multiple_may_grow_by_the_tolerance_and_no_more(ours_us: float, passes: bool) -> None:
    assert [it.passed for it in judge(results(ours_us=ours_us), HELD)] == [passes]


def test_a_slower_machine_changes_nothing() -> None:
    assert list(measured(results(ours_us=200.0))) == list(measured(results(ours_us=2_000.0, theirs_us=1_000.0)))


def test_what_was_not_measured_does_not_pass() -> None:
    verdict = judge(Results(sides=results(ours_us=100.0).sides[:2]), HELD)[0]
    assert not verdict.passed
    assert "was not measured; run plain with --only sglang,headrace" in str(verdict)


def test_saved_results_are_held_from_then_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, dear = tmp_path / "cheap.json", tmp_path / "dear.json"
    cheap.write_bytes(msgspec.json.encode(results(ours_us=100.0)))
    dear.write_bytes(msgspec.json.encode(results(ours_us=130.0)))
    baseline = tmp_path / "baseline.toml"
    gate_(cheap, baseline=baseline, save=True)
    gate_(cheap, baseline=baseline)
    with pytest.raises(SystemExit) as left:
        gate_(dear, baseline=baseline)
    assert left.value.code == 1
    assert "plain: CPU µs/call of sglang's: 1.3 times, was 1, at most 1.25; it is worse than" in capsys.readouterr().out


def test_the_shipped_baseline_holds_calls_and_chunks_beside_both_neighbours() -> None:
    held = {(it.scenario, it.to) for it in gate.load(gate.BASELINE).ratios}
    assert held == {(scenario, to) for scenario in ("plain", "stream") for to in ("sglang", "nginx")}


def test_a_baseline_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text("tolerance = 0\nratios = []\n")
    with pytest.raises(ReportFault, match=r"b\.toml can't be used"):
        gate.load(tmp_path / "b.toml")


def results(*, ours_us: float, theirs_us: float = 100.0) -> Results:
    direct, theirs, ours = (report(it) for it in (10.0, theirs_us, ours_us))
    worse = replace(ours, cost=cost(ours_us * 5))
    return Results(
        sides=(
            Side("direct", runs=(direct,) * 3),
            Side("sglang", runs=(theirs,) * 3),
            Side("headrace", runs=(ours, worse, ours)),
        )
    )


def cost(us: float) -> Cost:
    return Cost(cpu_us_per_call=us, cpu_us_per_chunk=None, cores=1.0, rss_bytes_max=1)


def report(us: float) -> Report:
    return Report(
        calls=10,
        outcomes={"served": 10},
        chunks=0,
        tokens=30,
        good_per_s=None,
        first_token=None,
        gap=None,
        total=None,
        late=None,
        served_in=(10,),
        tokens_in=(30,),
        scenario="plain",
        settings=load("plain"),
        target="http://127.0.0.1:8000",
        at="2026-01-01T00:00:00+00:00",
        machine=machine(),
        load_average=0.5,
        elapsed_s=1.0,
        client_cores=0.2,
        tenants={},
        cost=cost(us),
    )
