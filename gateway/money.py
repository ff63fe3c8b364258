"""Amounts of money: whole nano-units of the one currency that is configured, so that no sum is ever rounded."""

from __future__ import annotations

import re
from decimal import Decimal

NANO_A_UNIT = 10**9
#: What every reader of JSON takes for a whole number: nine million units.
NANO_MAX = 2**53 - 1


def amount_nano(text: str) -> int:
    """`4.98` as it is kept. Raises ValueError for what is no amount of whole nano-units up to NANO_MAX."""
    if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text, re.ASCII):
        raise ValueError(f"{text[:40]!r} is no amount of money; write e.g. 20 or 4.98, with at most nine decimals")
    nano = int(Decimal(text) * NANO_A_UNIT)
    if nano > NANO_MAX:
        raise ValueError(f"{text} is more than can be counted, {amount_text(NANO_MAX)}")
    return nano


def amount_text(nano: int) -> str:
    """Exact, and with at least two decimals."""
    units, rest = divmod(nano, NANO_A_UNIT)
    decimals = f"{rest:09d}".rstrip("0")
    return f"{units}.{decimals:0<2}"
