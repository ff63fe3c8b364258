"""What calls cost: exact, rounded once, and never more than was reserved for what they were let in with."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.money import NANO_A_UNIT, NANO_MAX
from gateway.price import Price, Prices
from tests.fakes import a_call

AMOUNTS = st.decimals(0, 10**6, places=6)
COUNTS = st.integers(0, 10**6)


def price(**given: str) -> Price:
    reckoned = Prices(**{name: Decimal(text) for name, text in given.items()}).reckoned("USD")
    assert reckoned is not None
    return reckoned


def used(tokens_in: int = 0, tokens_out: int = 0, tokens_cached: int = 0, items: int = 0, **given: Any) -> Any:
    counts = {"tokens_in": tokens_in, "tokens_out": tokens_out, "tokens_cached": tokens_cached, "items": items}
    return a_call(**counts, **given)


@given(prices=st.tuples(*[AMOUNTS] * 5), counts=st.tuples(*[COUNTS] * 4))
def test_a_cost_is_the_exact_sum_rounded_up_once(prices: tuple[Decimal, ...], counts: tuple[int, ...]) -> None:
    tokens_in, tokens_out, cached, items = counts
    reckoned = Prices(*prices).reckoned("USD")
    if reckoned is None:
        return
    of_in, of_out, of_cached, of_items, of_call = map(Fraction, prices)
    cached = min(cached, tokens_in)
    units = ((tokens_in - cached) * of_in + tokens_out * of_out + cached * of_cached) / 10**6
    units += items * of_items / 1000 + of_call
    assert reckoned.cost_nano(used(*counts)) == min(math.ceil(units * NANO_A_UNIT), NANO_MAX)


@given(
    prices=st.tuples(*[AMOUNTS] * 5),
    words=st.lists(st.text(max_size=9), min_size=1, max_size=20),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_what_stays_within_the_estimate_costs_no_more_than_was_reserved(
    prices: tuple[Decimal, ...], words: list[str], shares: tuple[float, ...]
) -> None:
    body = b'{"model":"intent","input":[%b]}' % b",".join(b'"%b"' % word.encode().hex().encode() for word in words)
    call = used(route="/v1/classify", body=body)
    assert call.items_estimate >= len(words)
    reckoned = Prices(*prices).reckoned("USD")
    if reckoned is None:
        return
    most = reckoned.cost_nano_max(call, call.tokens_in_estimate, 100)
    call.tokens_in = int(call.tokens_in_estimate * shares[0])
    call.tokens_cached = int(call.tokens_in * shares[1])
    call.tokens_out = int(100 * shares[2])
    call.items = int(len(words) * shares[3])
    assert reckoned.cost_nano(call) <= most


def test_a_cost_is_reckoned_as_providers_do() -> None:
    of = price(million_tokens_in="0.15", million_tokens_out="0.60", million_tokens_cached="0.075")
    assert of.cost_nano(used(tokens_in=1_000, tokens_cached=400, tokens_out=500)) == 90_000 + 30_000 + 300_000


def test_cached_tokens_without_a_price_of_their_own_cost_what_the_others_do() -> None:
    assert price(million_tokens_in="1").cost_nano(used(tokens_in=10, tokens_cached=10)) == 10_000


def test_a_classifier_is_priced_by_what_it_is_given() -> None:
    assert price(thousand_items="0.02", call="0.0001").cost_nano(used(items=50)) == 1_000_000 + 100_000


def test_an_engine_that_counts_more_cached_than_read_earns_nothing_by_it() -> None:
    of = price(million_tokens_in="1", million_tokens_cached="0")
    assert of.cost_nano(used(tokens_in=10, tokens_cached=99)) == 0


def test_no_cost_is_more_than_can_be_kept() -> None:
    assert price(million_tokens_in="1000000000").cost_nano(used(tokens_in=10**9)) == NANO_MAX


def test_texts_are_reckoned_with_only_where_they_are_given() -> None:
    of = price(thousand_items="1")
    assert of.cost_nano_max(a_call(), 8, 100) == 1
    assert of.cost_nano_max(a_call(route="/v2/infer", body=b"", rows=7), 1, 0) == 7_000_000


def test_prices_of_nothing_are_no_price() -> None:
    assert Prices().reckoned("USD") is None
    assert Prices(million_tokens_cached=Decimal(0)).reckoned("USD") is None


@pytest.mark.parametrize("wrong", ["-1", "NaN", "Infinity", "1000000001", "0.0000001"])
@pytest.mark.parametrize("name", Prices.__struct_fields__)
def test_what_is_no_price_is_refused_by_name(name: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=name):
        Prices(**{name: Decimal(wrong)})
