"""Amounts of memory, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import InvalidInput
from autobatch.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("amount", "count"),
    [
        (4096, 4096),
        (8e9, 8_000_000_000),
        ("4096", 4096),
        ("8GiB", 8 * 1024**3),
        ("8G", 8 * 1024**3),
        ("8GB", 8 * 1000**3),
        (" 1.5 gib ", 3 * 1024**3 // 2),
        (".5MB", 500_000),
        ("512m", 512 * 1024**2),
        ("2TB", 2 * 1000**4),
        ("1b", 1),
    ],
)
def test_amounts_that_people_write(amount: int | float | str, count: int) -> None:
    assert parse_bytes(amount) == count


@pytest.mark.parametrize(
    "amount",
    [
        *("", "GiB", "8 GiB GiB", "-8GiB", "eight", "8XB", "8iB", "1,5GB", "1e9", "nan", "inf", "0", "0.5"),
        *(0, -1, float("nan"), float("inf"), True, None, [8]),
    ],
)
def test_what_is_not_an_amount_is_refused_by_its_own_words(amount: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_bytes(amount)  # type: ignore[arg-type]
    assert repr(amount) in str(caught.value)


@given(st.integers(1, 2**49))
def test_what_is_written_can_be_read_again_closely(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.05)


@given(st.integers(0, 2**49))
def test_no_number_before_a_unit_reaches_the_next_unit(count: int) -> None:
    assert float(format_bytes(count).split()[0]) < 1024


def test_formats_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 327_000_000, 1024**3 - 1, 7_967_000_000, -(1024**3))] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "311.9 MiB",
        "1.00 GiB",
        "7.42 GiB",
        "-1.00 GiB",
    ]
