"""The committed file that says what every case took."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autobatch.errors import InvalidInput
from autobatch.files import write_whole
from autobatch.regression.record import Record

SCHEMA_VERSION = 1
_TABLES = ("phases", "origins")


@dataclass(frozen=True)
class Baseline:
    """What every case took, by its name."""

    records: dict[str, Record] = field(default_factory=dict)
    problem: str = ""
    """Why nothing could be read, in a sentence, or ""."""

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """What is in the file; nothing where it is missing, or cannot be used."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(problem=f"there is no baseline {path}. Make one and commit it: autobatch check --update")
        except OSError as error:
            return cls(problem=f"the baseline {path} cannot be read: {error.strerror or error}.")
        except ValueError as error:
            return cls(problem=f"the baseline {path} is damaged: {error}. Take it from your version control again.")
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            told = f"is of schema version {version}" if version is not None else "names no schema_version"
            return cls(
                problem=f"the baseline {path} {told}, but this autobatch reads version {SCHEMA_VERSION}. Use the "
                "autobatch that wrote it, or make it anew: autobatch check --update"
            )
        try:
            cases = content["cases"]
            return cls({name: Record.model_validate_json(json.dumps(case)) for name, case in cases.items()})
        except (KeyError, AttributeError, ValidationError) as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else "cases"
            return cls(
                problem=f"the baseline {path} is damaged at {where}. Take it from your version control again, or make "
                "it anew: autobatch check --update"
            )

    def write(self, path: Path) -> None:
        """Replace the file, or make it with its folder.

        Raises:
            InvalidInput: it cannot be written.
        """
        cases = {
            name: record.model_dump(mode="json", exclude_defaults=True) for name, record in sorted(self.records.items())
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _pretty({"schema_version": SCHEMA_VERSION, "cases": cases}))
        except OSError as error:
            raise InvalidInput(f"the baseline {path} cannot be written: {error.strerror or error}.") from error


def _pretty(content: dict[str, Any]) -> str:
    """JSON with one fact to a line, so that a change in one shows as a change of one line."""
    cases = [
        f"  {json.dumps(name, ensure_ascii=False)}: {{\n{_lines(case, '   ')}\n  }}"
        for name, case in content["cases"].items()
    ]
    return f'{{\n "schema_version": {content["schema_version"]},\n "cases": {{\n' + ",\n".join(cases) + "\n }\n}\n"


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
