"""Amounts of memory, as people write and read them."""

from __future__ import annotations

import math
import re

from autobatch.errors import InvalidInput

_BINARY = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_DECIMAL = {"K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_AMOUNT = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<prefix>[KMGT]?)(?P<suffix>IB|B|)", re.IGNORECASE)


def parse_bytes(amount: int | float | str) -> int:
    """An amount of memory in bytes.

    A string is a number with a unit: `KiB`, `MiB`, `GiB`, `TiB` are powers of 1024; `KB`, `MB`, `GB`, `TB` of 1000.
    A bare letter (`8G`) is binary, as it is to Docker, Slurm and the JVM. No unit means bytes. Case does not matter.

    >>> parse_bytes("8GiB"), parse_bytes("1.5 GB"), parse_bytes("512m"), parse_bytes(4096)
    (8589934592, 1500000000, 536870912, 4096)

    Raises:
        InvalidInput: it is not an amount, or less than one byte.
    """
    if isinstance(amount, str):
        match = _AMOUNT.fullmatch(amount.strip())
        if match is None:
            raise InvalidInput(f"{amount!r} is not an amount of memory. Write it like 8GiB, 1.5GB, 512M, or in bytes.")
        prefix, suffix = match["prefix"].upper(), match["suffix"].upper()
        if suffix == "IB" and not prefix:
            raise InvalidInput(f"{amount!r} has no unit that is known. Write it like 8GiB, 1.5GB, 512M, or in bytes.")
        scale = (_DECIMAL if suffix == "B" else _BINARY)[prefix] if prefix else 1
        value = float(match["number"]) * scale if "." in match["number"] else int(match["number"]) * scale
    elif isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise InvalidInput(f"{amount!r} is not an amount of memory. Pass bytes, or a string such as '8GiB'.")
    else:
        value = amount
    if isinstance(amount, float) and amount != int(amount if math.isfinite(amount) else 0):
        raise InvalidInput(f"{amount!r} is not a whole number of bytes. For a number of GiB, write {amount!r} GiB.")
    if not math.isfinite(value) or value < 1:
        raise InvalidInput(f"an amount of memory must be at least 1 byte and finite, but {amount!r} is not.")
    return int(value)


def format_bytes(count: int) -> str:
    """Bytes for people, in binary units.

    >>> format_bytes(7_967_000_000), format_bytes(327_000_000), format_bytes(1536), format_bytes(12)
    ('7.42 GiB', '311.9 MiB', '1.5 KiB', '12 B')
    """
    for unit, scale, decimals in (("TiB", 1024**4, 2), ("GiB", 1024**3, 2), ("MiB", 1024**2, 1), ("KiB", 1024, 1)):
        # Rounded first, so that one byte less than a GiB is "1.00 GiB" and never "1024.0 MiB".
        if round(abs(count) * 1024 / scale, 1) >= 1024:
            return f"{count / scale:.{decimals}f} {unit}"
    return f"{count} B"
