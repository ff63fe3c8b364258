"""Amounts of money, as they are written and kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.money import NANO_MAX, amount_nano, amount_text


@given(st.integers(0, NANO_MAX))
def test_an_amount_is_read_as_it_was_written(nano: int) -> None:
    assert amount_nano(amount_text(nano)) == nano


@pytest.mark.parametrize(
    ("nano", "text"), [(0, "0.00"), (1, "0.000000001"), (4_980_000_000, "4.98"), (20_500_000_000, "20.50")]
)
def test_amounts_are_told_exactly_and_as_people_write_them(nano: int, text: str) -> None:
    assert amount_text(nano) == text


@pytest.mark.parametrize("text", ["", "-1", "1,5", "1e3", "nan", "0.0000000001", "1.", ".5", "٣", "9007199.254740992"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"amount|counted"):
        amount_nano(text)
