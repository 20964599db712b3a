"""Devices and device profiles on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autobatch.profile import DeviceProfile
from autobatch.report import words
from autobatch.trial import DeviceInfo
from autobatch.units import format_bytes


def devices_table(devices: Sequence[DeviceInfo]) -> Table:
    """The devices that trials can run on."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("device", "name", "memory", "free", "more"):
        table.add_column(head, justify="right" if head in ("memory", "free") else "left")
    for device in devices:
        more = {"driver": device.driver, "compute capability": device.capability, "UUID": device.uuid}
        told = [f"{what} {value}" for what, value in more.items() if value] + (["a MIG slice"] if device.mig else [])
        free = format_bytes(device.free_bytes) if device.free_bytes is not None else "unknown"
        name = device.type if device.index is None else f"{device.type}:{device.index}"
        table.add_row(name, Text(device.name), format_bytes(device.total_bytes), free, Text(", ".join(told)))
    return table


def profile_view(profile: DeviceProfile) -> RenderableType:
    """What was found about a device: its memory, and a row for each reference workload."""
    limit = format_bytes(profile.limit_bytes)
    title = f"{words.device_in_words(profile.device)}; tried within {limit}, {profile.precision}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("reference", "parameters", "micro-batch", "peak", "samples/s"):
        table.add_column(head, justify="left" if head == "reference" else "right")
    for result in profile.results:
        cells = ("nothing fits", "", "")
        if result.plan is not None:
            speed = f"{result.samples_per_second:,.0f}" if result.samples_per_second is not None else "unknown"
            peak = format_bytes(result.peak_bytes) if result.peak_bytes is not None else "unknown"
            cells = (str(result.plan.max_micro_batch_size), peak, speed)
        table.add_row(result.name, f"{result.parameters / 1e6:.1f} M", *cells)
    notes = [Text(f"{result.name}: {result.description}", style="dim") for result in profile.results]
    notes.append(
        Text(
            f"micro-batch: the largest that fits, tried up to {profile.target_batch_size}; the rest is with that",
            style="dim",
        )
    )
    problems = [Text(f"{result.name}: {result.problem}", style="red") for result in profile.results if result.problem]
    return Group(Text(title), table, *notes, *problems)
