"""What the commands share: options, failures said in one line with an exit code, and files checked before the long
work."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from autobatch.errors import AutobatchError, InvalidInput, in_one_line
from autobatch.precision import Precision

MemoryLimitOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Behave as if the device had this much, such as 8GiB.")
]
PrecisionOption = Annotated[
    Precision | None, typer.Option("--precision", help="Autocast to it. Default: fp32, or the Workload's own.")
]
HeadroomOption = Annotated[float, typer.Option(help="The share of the memory to leave free.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

USER_CODE_FAILED = 3
INTERRUPTED = 130


def check_output(path: Path, option: str = "--output") -> None:
    """Find out before the long work, as far as that can be known, whether the result can be saved."""
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{option} {path} is not a file. Name a file to write.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InvalidInput(f"{option} {path}: there is no folder {folder}. Create it first: mkdir -p {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInput(
            f"{option} {path} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error


@contextmanager
def explained(debug: bool) -> Iterator[None]:
    """End the program with one line and an exit code for whatever goes wrong; with `debug`, a traceback above it."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _fail("interrupted; nothing was saved.", INTERRUPTED, debug)
    except AutobatchError as error:
        _fail(str(error), error.exit_code, debug)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's own code may raise anything: told here
        hint = "" if debug else " Run with --debug for the traceback."
        _fail(f"{in_one_line(error)}.{hint}", USER_CODE_FAILED, debug)


def _fail(message: str, exit_code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"autobatch: {message}", file=sys.stderr)
    raise typer.Exit(exit_code)
