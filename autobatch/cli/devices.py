"""`autobatch devices`: those that are here, and those that can be simulated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from autobatch.cli.common import DebugOption, check_output, explained
from autobatch.errors import InvalidInput
from autobatch.files import write_whole


def devices(
    catalog: Annotated[bool, typer.Option("--catalog", help="List the GPUs that can be simulated instead.")] = False,
    from_oom_message: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Make a profile of a GPU from an out-of-memory message of torch in this file (- for stdin), for "
            "--device of other commands.",
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPU of that message, where its size does not tell.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the profile here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    debug: DebugOption = False,
) -> None:
    """List the devices that trials can run on, and their memory; or the GPUs that can be simulated."""
    with explained(debug):
        if catalog:
            _show_catalog(as_json)
            return
        if from_oom_message is not None:
            _calibrate(from_oom_message, gpu, output)
            return
        from autobatch.devices import list_devices

        found = list_devices()
        if as_json:
            print(json.dumps([info.model_dump(mode="json") for info in found], indent=2))
            return
        from rich.console import Console

        from autobatch.report.tables import devices_table

        Console().print(devices_table(found))


def _show_catalog(as_json: bool) -> None:
    from autobatch.devices.catalog import catalog

    if as_json:
        print(json.dumps([gpu.model_dump(mode="json") for gpu in catalog()], indent=2))
        return
    from rich.console import Console

    from autobatch.report.catalog import catalog_table

    Console().print(catalog_table(catalog()))


def _calibrate(message: Path, gpu: str | None, output: Path | None) -> None:
    from autobatch.devices.calibration import profile_from_oom_message

    try:
        text = sys.stdin.read() if str(message) == "-" else message.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidInput(f"{message} cannot be read: {error.strerror}.") from error
    profile = profile_from_oom_message(text, gpu).model_dump_json(indent=2, exclude_none=True)
    if output is None:
        print(profile)
        return
    check_output(output)
    write_whole(output, profile + "\n")
    print(f"Saved to {output}", file=sys.stderr)
