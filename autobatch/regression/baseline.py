"""The committed file that says what every case took."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from autobatch.errors import InvalidInput
from autobatch.files import write_whole
from autobatch.regression.record import Record

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

SCHEMA_VERSION = 1
_INSTEAD = "Take it from your version control again, or remove it and make it anew."
_TABLES = ("phases", "origins")


@dataclass(frozen=True)
class Baseline:
    """What every case took, by its name."""

    records: dict[str, Record] = field(default_factory=dict)
    problem: str = ""
    """Why nothing could be read, in a sentence, or ""."""
    is_there: bool = True
    """Whether there is a file, readable or not."""

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """What is in the file; nothing where it is missing, or cannot be used."""
        if path.exists() and not path.is_file():
            return cls(problem=f"the baseline {path} is no file.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(problem=f"there is no baseline {path}.", is_there=False)
        except OSError as error:
            return cls(problem=f"the baseline {path} cannot be read: {error.strerror or error}.")
        except (ValueError, RecursionError) as error:
            return cls(problem=f"the baseline {path} is damaged: {error}. {_INSTEAD}")
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            told = "names no schema_version" if version is None else f"is of schema version {repr(version)[:20]}"
            return cls(
                problem=f"the baseline {path} {told}, but this autobatch reads version {SCHEMA_VERSION}. Use the "
                "autobatch that wrote it, or remove the file and make it anew."
            )
        cases = content.get("cases")
        if not isinstance(cases, dict):
            return cls(problem=f"the baseline {path} has no cases. {_INSTEAD}")
        records = {}
        for name, case in cases.items():
            try:
                records[name] = Record.model_validate_json(json.dumps(case))
            except ValidationError as error:
                where = ".".join(map(str, (name, *error.errors()[0]["loc"])))
                return cls(problem=f"the baseline {path} is damaged at {where}. {_INSTEAD}")
        return cls(records)

    @classmethod
    def update(
        cls, path: Path, records: Mapping[str, Record], keeps: Callable[[str], bool] = lambda name: True
    ) -> None:
        """Put records into the file, or make it with its folder. What other processes put there meanwhile stays.

        Args:
            path: the file.
            records: by name.
            keeps: whether a record of that name, of which there is no new one, stays.

        Raises:
            InvalidInput: it cannot be written, or is there and cannot be read: it is left alone then.
        """
        try:
            path = path.resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(path.parent):
                before = cls.read(path)
                if before.problem and before.is_there:
                    raise InvalidInput(f"nothing was written: {before.problem}")
                kept = {name: record for name, record in before.records.items() if keeps(name)}
                write_whole(path, _pretty(kept | dict(records)))
        except OSError as error:
            raise InvalidInput(f"the baseline {path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process is in here at the same time, where the system can say so."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _pretty(records: Mapping[str, Record]) -> str:
    """JSON with one fact to a line, so that a change in one shows as a change of one line."""
    cases = [
        f"  {json.dumps(name, ensure_ascii=False)}: {{\n{_lines(_plain(record), '   ')}\n  }}"
        for name, record in sorted(records.items())
    ]
    return f'{{\n "schema_version": {SCHEMA_VERSION},\n "cases": {{\n' + ",\n".join(cases) + "\n }\n}\n"


def _plain(record: Record) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude_defaults=True)


def _lines(record: dict[str, Any], indent: str) -> str:
    """Each entry on a line of its own, and those of tables on one each."""
    told = []
    for key, value in record.items():
        if key in _TABLES:
            value = f"{{\n{_lines(value, indent + ' ')}\n{indent}}}"
        else:
            value = json.dumps(value, ensure_ascii=False)
        told.append(f"{indent}{json.dumps(key, ensure_ascii=False)}: {value}")
    return ",\n".join(told)
