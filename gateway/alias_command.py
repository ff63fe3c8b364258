"""`headrace alias`: names that stand for models, each with its share of the calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cyclopts import App

from gateway.console import (
    COMMON,
    Common,
    date_text,
    print_json,
    print_table,
    tell,
)
from gateway.home import asked, config_of, require_state

if TYPE_CHECKING:
    from gateway.store import AliasRow
    from gateway.tenant import Issuer

EXAMPLES = """
Examples:

    headrace alias set intent intent-onnx=90 intent-triton=10
    headrace alias remove intent
"""
ALIAS = App(name="alias", help="Let names stand for models, each with its share of the calls.", help_epilogue=EXAMPLES)


@ALIAS.command(name="set")
def alias_set(name: str, /, *shares: str, common: Common = COMMON) -> None:
    """Let a name stand for these models, whatever it stood for before.

    Parameters
    ----------
    name
        What clients call: as models are named, and no model's.
    shares
        MODEL=WEIGHT, e.g. intent-onnx=90; with 0 the model gets no calls.
    """
    config = config_of(common)
    weights = _weights(shares)

    async def ask(issuer: Issuer) -> AliasRow:
        from gateway.alias import Aliases

        models = [model.name for model in config.models]
        return await Aliases(store=issuer.store, models=models, clock=issuer.clock).set(name, weights)

    row = asked(common, ask)
    tell(common, row, f"alias {row.name}: {_shares_text(row)}")


@ALIAS.command(name="list")
def alias_list(common: Common = COMMON) -> None:
    """Show all aliases."""
    require_state(common)
    rows = asked(common, lambda issuer: issuer.store.aliases())
    if common.json:
        print_json(rows)
        return
    print_table(["alias", "models", "since"], [(row.name, _shares_text(row), date_text(row.changed_s)) for row in rows])


@ALIAS.command(name="remove")
def alias_remove(name: str, /, *, common: Common = COMMON) -> None:
    """Remove an alias; its models stay."""
    asked(common, lambda issuer: issuer.store.remove_alias(name))
    tell(common, {"removed": name}, f"removed alias {name}; its models stay")


def _weights(shares: Sequence[str]) -> dict[str, int]:
    """Raises Unfit."""
    from gateway.key import Unfit

    weights: dict[str, int] = {}
    for share in shares:
        model, _, weight = share.rpartition("=")
        if not model or not re.fullmatch("[0-9]{1,9}", weight):
            raise Unfit(f"{share[:80]!r} is no share; write MODEL=WEIGHT, e.g. intent-onnx=90")
        if model in weights:
            raise Unfit(f"{model} is given twice; give each model one weight")
        weights[model] = int(weight)
    return weights


def _shares_text(row: AliasRow) -> str:
    return " ".join(f"{model}={weight}" for model, weight in row.weights.items())
