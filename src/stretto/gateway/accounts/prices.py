"""What a model's tokens cost, in money and in energy. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct

from stretto.gateway.accounts.limits import Quantity

MILLION = 1e6
ANY = "*"
PriceAmount = Annotated[float, Meta(ge=0)]


class Price(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The price of a model: `input`, `cached` and `output` per million tokens, in any one currency.

    `cached`: for tokens of the prompt that were in the prefix cache; None: as `input`. `joules`: energy per
    token of the answer, for workers that do not report it. None: unknown.
    """

    input: PriceAmount | None = None
    cached: PriceAmount | None = None
    output: PriceAmount | None = None
    joules: PriceAmount | None = None

    def cost(self, prompt: float, cached: float, completion: float) -> float:
        """The cost of so many tokens; `cached` are part of `prompt`."""
        entry = self.input or 0.0
        again = entry if self.cached is None else self.cached
        return ((prompt - cached) * entry + cached * again + completion * (self.output or 0.0)) / MILLION

    def tells(self, quantity: Quantity) -> bool:
        """Whether it says how much of this quantity an answer takes."""
        if quantity == "cost":
            return self.input is not None or self.output is not None
        return quantity != "joules" or self.joules is not None


def price_of(prices: Mapping[str, Price], model: str) -> Price:
    """The price of a model: its own, or that of `*`, or an unknown one."""
    return prices.get(model) or prices.get(ANY) or Price()
