"""The report for people: whole in itself, well-formed, and with everybody in it."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from loadtests import plot
from loadtests.page import page
from loadtests.report import Cost, Report, Results, Service, Side, Spread, machine
from loadtests.scenario import load


def test_the_page_needs_no_network() -> None:
    drawn = page(results())
    assert re.findall(r"https?://|//[a-z]|@import|url\(|<script|<link|<img", drawn) == []


def test_every_plot_is_well_formed() -> None:
    plots = re.findall(r"<svg.*?</svg>", page(results()), re.DOTALL)
    # CPU and latency of both scenarios, fairness of each side in one of them, and the ladder.
    assert len(plots) == 2 * 2 + 3 + 1
    for text in plots:
        ElementTree.fromstring(text)


def test_everybody_is_on_it_with_version_and_fault_and_nothing_is_taken_for_markup() -> None:
    drawn = Text(page(results()))
    for said in ("9.9.9", "it <fell> over", "told to do nothing", "5.0% 503", "seed"):
        assert said in drawn.text


def test_a_page_is_drawn_of_one_server_too() -> None:
    assert "http://127.0.0.1" in Text(page(Results(sides=(Side("http://127.0.0.1:1", runs=(report("plain"),)),)))).text


def test_a_bar_far_longer_than_ours_is_cut_off_and_keeps_its_figure() -> None:
    rows = [plot.Bar("slow", 9_000.0, 9_000.0, 9_000.0, "c1"), plot.Bar("ours", 50.0, 40.0, 60.0, "c2")]
    drawn = plot.bars(rows, format="{:,.0f}", limit=100.0)
    widths = [float(it) for it in re.findall(r'<rect class="c\d" .*? width="([\d.]+)"', drawn)]
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1)
    assert "9,000" in drawn and 'class="tear"' in drawn


@pytest.mark.parametrize("points", [(), ((0.0, 0.0),), ((1.0, 5.0), (1.0, 5.0)), ((0.001, 1.0), (90_000.0, 100.0))])
@pytest.mark.parametrize("log_x", [False, True])
def test_lines_are_drawn_of_whatever_was_measured(points: tuple[tuple[float, float], ...], log_x: bool) -> None:
    drawn = plot.lines([plot.Line("a", points, "c0")], x="x", y="y", log_x=log_x)
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn and "inf" not in drawn


class Text(HTMLParser):
    """What a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data


def results() -> Results:
    names = ("plain", "tenants", "ladder at 10/s", "ladder at 20/s")
    runs = tuple(report(name, scale) for name in names for scale in (1.0, 1.1))
    slow = tuple(replace(run, outcomes={"served": 95, "503": 5}) for run in runs)
    return Results(
        sides=(
            Side("direct", version="1", runs=runs),
            Side("other", version="9.9.9", about="told to do nothing", fault="it <fell> over", runs=slow),
            Side("headrace", version="1", runs=runs),
        )
    )


def report(name: str, scale: float = 1.0) -> Report:
    rate = re.search(r" at (\d+)/s", name)
    scenario = load("ladder", [f"arrivals.rate_per_s={rate[1]}"]) if rate else load(name)
    spread = Spread.of([scale * 0.001 * number for number in range(1, 100)])
    service = Service(
        calls=100,
        outcomes={"served": 100},
        chunks=500,
        tokens=400,
        good_per_s=None,
        first_token=spread if scenario.streams else None,
        gap=None,
        total=spread,
        late=None,
        served_in=(40, 60),
        tokens_in=(160, 240),
    )
    return Report(
        **{field: getattr(service, field) for field in Service.__struct_fields__},
        scenario=name,
        settings=scenario,
        target="http://127.0.0.1:8000",
        at="2026-01-01T00:00:00+00:00",
        machine=machine(),
        load_average=0.5,
        elapsed_s=2.0,
        client_cores=0.2,
        tenants={tenant.name: service for tenant in scenario.callers},
        cost=Cost(cpu_us_per_call=scale * 100, cpu_us_per_chunk=scale * 20, cores=0.5, rss_bytes_max=50_000_000),
    )
