"""Growth over time."""

import pytest

from loadtests.slope import slope_per_s


def test_what_grows_evenly_has_that_slope() -> None:
    assert slope_per_s([(second, 5.0 + 3 * second) for second in range(5_000)]) == pytest.approx(3.0)


def test_odd_samples_do_not_move_it() -> None:
    samples = [(float(second), 1e9 if second in (10, 50, 90) else 2.0 * second) for second in range(100)]
    assert slope_per_s(samples) == pytest.approx(2.0)


@pytest.mark.parametrize("samples", [[], [(1.0, 5.0)], [(1.0, 5.0), (1.0, 6.0)]])
def test_fewer_than_two_times_have_none(samples: list[tuple[float, float]]) -> None:
    assert slope_per_s(samples) is None
