"""A GPU's profile made from an out-of-memory message that torch wrote there."""

from __future__ import annotations

from autobatch.devices.catalog import Gpu, catalog, find
from autobatch.devices.oom_message import read_oom_message
from autobatch.devices.target import SavedProfile
from autobatch.errors import InvalidInput
from autobatch.trial import DeviceInfo
from autobatch.units import format_bytes

DIFFERENT = 0.05
"""Totals that are further apart than this share are not of one kind of GPU."""


def profile_from_oom_message(text: str, gpu: str | None = None) -> SavedProfile:
    """What the message tells of its GPU: the memory that torch sees there, and what lies outside torch's allocator.

    Args:
        text: the message, or a log that has it in it.
        gpu: the GPU's name in the catalogue; None where the message's total tells it.

    Raises:
        InvalidInput: there is no such message, or it lacks a number, or several kinds of GPU have its total.
    """
    reading = read_oom_message(text)
    if reading.total_bytes is None:
        raise InvalidInput("the message does not say how much memory its GPU has in all, so there is nothing to learn.")
    card = find(gpu) if gpu is not None else _with(reading.total_bytes)
    if abs(card.visible_bytes - reading.total_bytes) > DIFFERENT * card.visible_bytes:
        raise InvalidInput(
            f"the message is of a GPU with {format_bytes(reading.total_bytes)}, but of a {card.name} torch sees "
            f"{format_bytes(card.visible_bytes)}. Name the GPU that the message is from."
        )
    return SavedProfile(
        schema_version=1,
        device=DeviceInfo(type="cuda", name=card.title, total_bytes=reading.total_bytes, capability=card.capability),
        context_bytes=reading.context_bytes,
    )


def _with(total_bytes: int) -> Gpu:
    """The card of which torch sees so much; messages round to a hundredth of a GiB."""
    near = sorted(catalog(), key=lambda card: (abs(card.visible_bytes - total_bytes), card.name))
    alike = [card for card in near if abs(card.visible_bytes - total_bytes) <= 0.01 * total_bytes]
    if alike and len({card.capability for card in alike}) == 1:
        return alike[0]
    names = ", ".join(card.name for card in alike or near[:3])
    raise InvalidInput(
        f"a total of {format_bytes(total_bytes)} may be that of {names}. Say which with --gpu, for example: "
        f"--gpu {(alike or near)[0].name}"
    )
