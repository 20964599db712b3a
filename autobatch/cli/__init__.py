"""The command line: parses, calls, prints.

Heavy modules are imported by the commands that use them, so that `--help` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from autobatch.cli.check import check
from autobatch.cli.devices import devices
from autobatch.cli.estimate import estimate
from autobatch.cli.probe import probe

app = typer.Typer(
    name="autobatch",
    help="Find the largest micro-batch that fits in memory, and plan how to hit the target batch with it.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(probe)
app.command()(estimate)
app.command()(check)
app.command()(devices)


def _show_version(wanted: bool) -> None:
    if wanted:
        from autobatch import __version__

        print(f"autobatch {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
