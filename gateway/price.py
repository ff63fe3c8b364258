"""What a model's calls cost: prices as they are configured, and the whole numbers they are reckoned with.

Prices are kept as pico-units a token, an item or a call, which is what six decimals a million tokens come to. A call's
cost is their exact sum, rounded once, up to the next nano-unit; from then on costs are only added.
"""

from __future__ import annotations

from decimal import Decimal

import msgspec

from gateway.call import Call
from gateway.money import NANO_MAX
from runtimes.contract import GENERATING

PRICE_MAX = Decimal(10**9)
PICO_A_NANO = 1_000
NOTHING = Decimal(0)


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[models.price]`: in units of the configured currency, with at most six decimals."""

    million_tokens_in: Decimal = NOTHING
    """Of a million tokens read."""
    million_tokens_out: Decimal = NOTHING
    """Of a million tokens written."""
    million_tokens_cached: Decimal | None = None
    """Of a million of those tokens read that the engine had in its cache; without it they cost what the others do."""
    thousand_items: Decimal = NOTHING
    """Of a thousand texts, or other rows, that the model was given."""
    call: Decimal = NOTHING
    """Of each call that the model answered or worked on."""

    def __post_init__(self) -> None:
        given = {name: price for name, price in msgspec.structs.asdict(self).items() if price is not None}
        for name, price in given.items():
            if not price.is_finite() or not 0 <= price <= PRICE_MAX:
                raise ValueError(f"{name} can't be {price}; a price is from 0 to {PRICE_MAX}")
            if price != round(price, 6):
                raise ValueError(f"{name} can't be {price}; a price has at most six decimals")

    def reckoned(self, currency: str) -> Price | None:
        """None if all of it is nothing: such a model's calls are not reckoned at all."""
        cached = self.million_tokens_in if self.million_tokens_cached is None else self.million_tokens_cached
        price = Price(
            token_in_pico=int(self.million_tokens_in * 10**6),
            token_out_pico=int(self.million_tokens_out * 10**6),
            token_cached_pico=int(cached * 10**6),
            item_pico=int(self.thousand_items * 10**9),
            call_pico=int(self.call * 10**12),
            currency=currency,
        )
        return price if any(msgspec.structs.astuple(price)[:-1]) else None


class Price(msgspec.Struct, frozen=True, gc=False):
    """Of one model, in pico-units."""

    token_in_pico: int
    token_out_pico: int
    token_cached_pico: int
    item_pico: int
    call_pico: int
    currency: str

    def cost_nano(self, call: Call) -> int:
        """Of what the call has used."""
        tokens_in, cached = call.tokens_in, call.tokens_cached
        if cached > tokens_in:  # no engine means that
            cached = tokens_in
        pico = self.call_pico + tokens_in * self.token_in_pico + call.tokens_out * self.token_out_pico
        if cached:
            pico += cached * (self.token_cached_pico - self.token_in_pico)
        if call.items:
            pico += call.items * self.item_pico
        nano = -(-pico // PICO_A_NANO)
        return nano if nano < NANO_MAX else NANO_MAX

    def cost_nano_max(self, call: Call, tokens_in: int, tokens_out: int) -> int:
        """Of a call that may use so many tokens, and as many items as its body can hold; never nothing."""
        token_in_pico = self.token_in_pico
        if token_in_pico < self.token_cached_pico:
            token_in_pico = self.token_cached_pico
        pico = self.call_pico + tokens_in * token_in_pico + tokens_out * self.token_out_pico
        if self.item_pico and call.route not in GENERATING:
            pico += call.items_estimate * self.item_pico
        nano = -(-pico // PICO_A_NANO) or 1
        return nano if nano < NANO_MAX else NANO_MAX
