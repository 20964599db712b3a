"""How much more than before is still the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from autobatch.errors import InvalidInput
from autobatch.units import format_bytes, parse_bytes

_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%")


@dataclass(frozen=True)
class Tolerance:
    """A share of what was there before, or an amount: where both are given, whichever is more."""

    share: float = 0.0
    bytes: int = 0

    @classmethod
    def parse(cls, given: Any) -> Tolerance:
        """What people write: "2%", "64MiB", or both, as "2%, 64MiB" or ["2%", "64MiB"]. "0" allows nothing.

        Raises:
            InvalidInput: it is none of these.
        """
        parts = given.split(",") if isinstance(given, str) else given
        if not isinstance(parts, (list, tuple)) or not 1 <= len(parts) <= 2:
            raise InvalidInput(f'a tolerance is "2%", "64MiB", or both as ["2%", "64MiB"], but not {given!r}.')
        share, amount = None, None
        for part in parts:
            text = str(part).strip()
            if percent := _PERCENT.fullmatch(text):
                twice, share = share is not None, float(percent[1]) / 100
            else:
                if text.isdecimal() and text != "0":
                    raise InvalidInput(f"{text!r} in the tolerance {given!r} has no unit: write 2.5%, or 64MiB.")
                twice, amount = amount is not None, 0 if text == "0" else parse_bytes(text)
            if twice:
                raise InvalidInput(
                    f"a tolerance has at most one share and one amount, but {given!r} has two of a kind."
                )
        return cls(share or 0.0, amount or 0)

    def allowed(self, before: int) -> int:
        """Bytes of change that are tolerated where there were so many."""
        return max(int(before * self.share), self.bytes)

    def __str__(self) -> str:
        parts = [f"{self.share:.4%}".rstrip("0%").rstrip(".") + "%"] if self.share else []
        parts += [format_bytes(self.bytes)] if self.bytes else []
        return " or ".join(parts) or "none"


DEFAULT = Tolerance(share=0.02)
