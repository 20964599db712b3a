"""Which steps a project checks: `[tool.autobatch.check]` in its pyproject.toml."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from autobatch.errors import AutobatchError, InvalidInput
from autobatch.precision import Precision
from autobatch.regression import tolerance
from autobatch.regression.tolerance import Tolerance
from autobatch.units import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = "[tool.autobatch.check]"
BASELINE = ".autobatch/baseline.json"
EXAMPLE = '{ name = "gpt2", spec = "train.py:make", batch_size = 16, device = "rtx-4090", tolerance = "2%" }'


@dataclass(frozen=True)
class Case:
    """A training step on a GPU, whose memory is compared with what it was."""

    name: str
    spec: str
    """What to train, as for `autobatch probe`."""
    batch_size: int
    """Samples of the micro-batch."""
    device: str
    """A GPU to predict for, such as "rtx-4090"; "cuda" or "cuda:1" measures on one that is there."""
    precision: Precision | None = None
    """None: fp32, or the Workload's own."""
    checkpointing: bool | None = None
    """Whether the model's own activation checkpointing is switched on or off; None leaves it as it is."""
    accumulation: bool = False
    """Whether the gradients of an earlier micro-batch are held meanwhile."""
    tolerance: Tolerance = tolerance.DEFAULT
    """How far the peak may be from the baseline's."""
    limit: int | None = None
    """Bytes that the step may take on the device in all, context included."""

    @property
    def measured(self) -> bool:
        """Whether it runs on a GPU that is there."""
        return is_here(self.device)


def is_here(device: str) -> bool:
    """Whether a name is that of a GPU in this machine, on which steps are measured."""
    return device.partition(":")[0] == "cuda"


@dataclass(frozen=True)
class Config:
    """What a project checks."""

    root: Path
    """The folder that SPECs and the baseline are relative to."""
    baseline: Path
    cases: tuple[Case, ...]
    wrong: dict[str, str] = field(default_factory=dict)
    """Why cases cannot be used, by their names."""


def find(start: Path) -> Path:
    """The nearest pyproject.toml with such a table, in a folder or above it.

    Raises:
        InvalidInput: there is none.
    """
    above = [folder / "pyproject.toml" for folder in (start.absolute(), *start.absolute().parents)]
    files = [path for path in above if path.is_file()]
    for path in files:
        try:
            if _table(path) is not None:
                return path
        except InvalidInput:  # what is wrong with it is said when it is read
            return path
    where = f"{files[0]} has no {TABLE}" if files else f"there is no pyproject.toml in {start.absolute()} or above it"
    raise InvalidInput(f"{where}. Say what to check:\n{TABLE}\ncases = [\n  {EXAMPLE},\n]")


def read(path: Path) -> Config:
    """The cases of a pyproject.toml. Keys of the table itself hold for all cases that do not say otherwise.

    Raises:
        InvalidInput: the file cannot be read, or the table is none.
    """
    table = _table(path)
    if not isinstance(table, dict) or not isinstance(table.get("cases"), list) or not table["cases"]:
        raise InvalidInput(f"{path} has no cases to check. Write\n{TABLE}\ncases = [\n  {EXAMPLE},\n]")
    common = {key: value for key, value in table.items() if key not in ("cases", "baseline")}
    if unknown := sorted(set(common) - set(_READ) | {"name"} & set(common)):
        raise InvalidInput(f"{TABLE} in {path} has {unknown[0]!r}; it knows baseline, cases, {', '.join(_READ)}.")
    cases: dict[str, Case] = {}
    wrong: dict[str, str] = {}
    for number, entry in enumerate(table["cases"], 1):
        name = " ".join(str(entry.get("name") or "").split()) if isinstance(entry, dict) else ""
        label = name if name and name not in cases and name not in wrong else f"(number {number})"
        try:
            if label != name and name:
                raise InvalidInput(f"there are two cases with the name {name!r}. Each needs its own.")
            cases[label] = _case(entry, common)
        except AutobatchError as error:
            wrong[label] = str(error)
    root = path.resolve().parent
    return Config(root, root / _baseline(table, path), tuple(cases.values()), wrong)


def _table(path: Path) -> Any:
    """What a file has at `tool.autobatch.check`, or None."""
    try:
        found: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is no valid TOML: {error}.") from error
    for key in ("tool", "autobatch", "check"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _baseline(table: dict[str, Any], path: Path) -> str:
    name = table.get("baseline", BASELINE)
    if not isinstance(name, str) or not name:
        raise InvalidInput(f'baseline in {path} must be a path, such as "{BASELINE}", but is {name!r}.')
    return name


def _case(entry: Any, common: dict[str, Any]) -> Case:
    if not isinstance(entry, dict):
        raise InvalidInput(f"a case is a table such as {EXAMPLE}, but this is {entry!r}.")
    if unknown := sorted(set(entry) - set(_READ)):
        raise InvalidInput(f"{unknown[0]!r} is no key of a case; these are: {', '.join(_READ)}.")
    given = {**common, **entry}
    if missing := [key for key in ("name", "spec", "batch_size", "device") if key not in given]:
        raise InvalidInput(f"{' and '.join(missing)} missing. A case is a table such as {EXAMPLE}.")
    return Case(**{key: _READ[key](key, value) for key, value in given.items()})


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise InvalidInput(f"{key} must be a text of one line, but is {value!r}.")
    return value.strip()


def _device(key: str, value: Any) -> str:
    name = _text(key, value)
    if name.partition(":")[0] == "cpu":
        raise InvalidInput(
            'a CPU\'s memory differs from run to run, so it is not checked. Name a GPU, such as "rtx-4090": none is '
            "needed for it."
        )
    return name


def _count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(f"{key} must be a whole number of at least 1, but is {value!r}.")
    return value


def _choice(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(f"{key} must be true or false, but is {value!r}.")
    return value


def _precision(key: str, value: Any) -> str:
    if value not in get_args(Precision):
        raise InvalidInput(f"{key} must be one of {', '.join(get_args(Precision))}, but is {value!r}.")
    return str(value)


_READ: dict[str, Callable[[str, Any], Any]] = {
    "name": _text,
    "spec": _text,
    "batch_size": _count,
    "device": _device,
    "precision": _precision,
    "checkpointing": _choice,
    "accumulation": _choice,
    "tolerance": lambda key, value: Tolerance.parse(value),
    "limit": lambda key, value: parse_bytes(value),
}
"""What a case may say, and how it is read."""
