"""The pytest plugin: what a training step takes, in a test, with limits and baselines.

pytest imports this in every project where autobatch is installed, so nothing heavy is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from autobatch.estimates import Estimate
    from autobatch.precision import Precision
    from autobatch.regression.baseline import Baseline
    from autobatch.regression.record import Record

MARKER = "limit_step_memory"
FILE = ".autobatch/pytest.json"
_PROPERTY = "autobatch"
"""Under which a test's report carries what the summary should say."""
_FROM_WORKERS = "autobatch_records"
_UPDATE = "pytest --autobatch-update"
_records = pytest.StashKey[dict[str, str]]()
"""What is to be the baseline, as JSON, by the name of the check."""
_read = pytest.StashKey["Baseline"]()
"""The baseline as it was when it was first needed."""
_asked = pytest.StashKey[bool]()
"""Whether a test asked `step_memory`."""
_seen = pytest.StashKey[dict[str, str]]()
"""What a test's checks found, as JSON, by their names."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("autobatch", "memory of training steps")
    group.addoption("--autobatch-update", action="store_true", help="Make what steps take now the baseline.")
    group.addoption(
        "--autobatch-tolerance",
        default="2%",
        metavar="SHARE",
        help="How far a peak may be from its baseline, such as 2%% or 64MiB, where a check does not say. Default: 2%%.",
    )
    group.addoption(
        "--autobatch-baseline", default=FILE, metavar="FILE", help=f"The file of baselines. Default: {FILE} in rootdir."
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(limit, device=None): what steps that the test gives to step_memory may take on the device in all, "
        'such as "12 GiB", context included',
    )
    config.stash[_records] = {}
    if (tolerance := config.getoption("--autobatch-tolerance")) != "2%":
        from autobatch.errors import InvalidInput
        from autobatch.regression.tolerance import Tolerance

        try:
            Tolerance.parse(tolerance)
        except InvalidInput as error:
            raise pytest.UsageError(f"--autobatch-tolerance: {error}") from error


class StepMemory:
    """What the fixture `step_memory` is: call it for an estimate, or have it compared with a baseline by `check`."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._config = request.config
        self._node: pytest.Item = request.node
        self._checks = 0

    def __call__(
        self,
        model: Any,
        batch_size: int,
        *,
        device: str | None = None,
        data: Any = None,
        loss: Callable[..., Any] | None = None,
        training_step: Callable[..., Any] | None = None,
        optimizer: Any = None,
        precision: Precision = "fp32",
        accumulation: bool = False,
    ) -> Estimate:
        """What a training step takes on a GPU.

        Args:
            model: a module, or a `Workload`.
            batch_size: samples of the micro-batch.
            device: a GPU to predict for, such as "rtx-4090"; "cuda" measures on the one that is there. None: that of
                the marker.
            data, loss, training_step, optimizer, precision, accumulation: as for `autobatch.estimate`.

        Returns:
            The estimate: `.peak` in bytes of live tensors, `.device_total`, `.by_category`, `.by_module` and so on. The
            test fails here if it is over the limit of the marker.

        Raises:
            InvalidInput, NotTraceable, DeviceUnavailable, Exception: as `autobatch.estimate` does.
        """
        from autobatch.errors import InvalidInput
        from autobatch.regression.measuring import step_on
        from autobatch.workload.workload import as_workload

        self._node.stash[_asked] = True
        limit, marked = _limit_of(self._node)
        device = device or marked
        if device is None:
            raise InvalidInput('say for which GPU: step_memory(..., device="rtx-4090")')
        workload = as_workload(model, data, loss, training_step, optimizer, precision)
        estimate = step_on(device, workload, batch_size, accumulation)
        if limit is not None:
            self._hold_to(limit, estimate, device)
        return estimate

    def check(
        self, model: Any, batch_size: int, *, name: str | None = None, tolerance: Any = None, **arguments: Any
    ) -> Estimate:
        """The same, and the test fails if the peak is more than in the committed baseline, saying which modules and
        lines make the difference. `pytest --autobatch-update` writes the baseline.

        Args:
            name: what the baseline calls it. None: the test's own name, with a number from its second check on.
            tolerance: how far it may be from there: "2%", "64MiB", or both. None: `--autobatch-tolerance`.
            model, batch_size, arguments: as for calling it.

        Raises: as calling it.
        """
        from autobatch.errors import InvalidInput
        from autobatch.regression.tolerance import Tolerance

        self._checks += 1
        numbered = f"{self._node.nodeid} #{self._checks}" if self._checks > 1 else self._node.nodeid
        name = f"{self._node.nodeid} {name}" if name else numbered
        if name in self._node.stash.setdefault(_seen, {}):
            raise InvalidInput(f"two checks are called {name!r}. Give each a name= of its own.")
        allowed = Tolerance.parse(self._config.getoption("--autobatch-tolerance") if tolerance is None else tolerance)
        estimate = self(model, batch_size, **arguments)
        self._compare(name, _record(estimate, name, arguments.get("device") or _limit_of(self._node)[1] or ""), allowed)
        return estimate

    def _compare(self, name: str, now: Record, tolerance: Any) -> None:
        from autobatch.regression.verdict import Verdict, judged

        self._node.stash[_seen][name] = now.model_dump_json(exclude_defaults=True)
        if self._config.getoption("--autobatch-update"):
            return
        baseline = _baseline(self._config)
        outcome = judged(name, now, baseline.records.get(name), tolerance)
        told = self._in_words(outcome)
        if outcome.verdict is Verdict.NOT_COMPARED:
            why = baseline.problem or f"{name} is not in the baseline {_file(self._config)}."
            pytest.fail(f"{why} Write it with: {_UPDATE}", pytrace=False)
        if outcome.verdict is Verdict.WORSE:
            pytest.fail(told, pytrace=False)
        if outcome.verdict is Verdict.BETTER or outcome.warnings:
            self._node.user_properties.append((_PROPERTY, told))

    def _hold_to(self, limit: int, estimate: Estimate, device: str) -> None:
        from autobatch.regression.verdict import Verdict, judged

        outcome = judged(self._node.name, _record(estimate, self._node.nodeid, device), None, limit=limit)
        if outcome.verdict is Verdict.OVER_LIMIT:
            pytest.fail(self._in_words(outcome), pytrace=False)

    def _in_words(self, outcome: Any) -> str:
        from autobatch.report.check import text_lines

        return "\n".join(text_lines(outcome, self._config.rootpath, _UPDATE))


@pytest.fixture
def step_memory(request: pytest.FixtureRequest) -> StepMemory:
    """What a training step takes on a GPU that need not be there: step_memory(model, batch_size=32,
    device="rtx-4090")."""
    return StepMemory(request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test that passes has checked something, if it is marked to; and what its checks found may be remembered."""
    _limit_of(item)
    result = yield
    if item.get_closest_marker(MARKER) and not item.stash.get(_asked, False):
        pytest.fail(f"the test is marked with {MARKER}, but never asks step_memory: nothing was checked", pytrace=False)
    if item.config.getoption("--autobatch-update"):
        found = item.stash.get(_seen, None)
        item.config.stash[_records].update(found or {})
    return result


def _limit_of(item: pytest.Item) -> tuple[int | None, str | None]:
    """Bytes and device of the marker."""
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return None, None
    from autobatch.errors import InvalidInput
    from autobatch.units import parse_bytes

    def arguments(limit: Any, device: str | None = None) -> tuple[Any, str | None]:
        return limit, device

    try:
        limit, device = arguments(*marker.args, **marker.kwargs)
        return parse_bytes(limit), device
    except (TypeError, InvalidInput) as error:
        pytest.fail(f'write @pytest.mark.{MARKER}("12 GiB", device="rtx-4090"): {error}', pytrace=False)


def _record(estimate: Estimate, name: str, device: str) -> Record:
    from autobatch.regression.record import Settings, record_of

    settings = Settings(
        spec=name.partition(" ")[0],
        batch_size=estimate.batch_size,
        precision=estimate.precision,
        accumulation=estimate.accumulation,
        device=device,
    )
    return record_of(estimate, settings)


def _file(config: pytest.Config) -> Path:
    return config.rootpath / str(config.getoption("--autobatch-baseline"))


def _baseline(config: pytest.Config) -> Baseline:
    if _read not in config.stash:
        from autobatch.regression.baseline import Baseline

        config.stash[_read] = Baseline.read(_file(config))
    return config.stash[_read]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand records to the process that started this worker; or write them, where there is none."""
    records = session.config.stash[_records]
    if not records:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_FROM_WORKERS] = records
        return
    from autobatch.errors import InvalidInput
    from autobatch.regression.baseline import Baseline
    from autobatch.regression.record import Record

    new = {name: Record.model_validate_json(text) for name, text in records.items()}
    try:
        Baseline.update(_file(session.config), new)
    except InvalidInput as error:
        records.clear()
        pytest.exit(f"autobatch: {error}", returncode=int(pytest.ExitCode.USAGE_ERROR))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take the records of a worker of pytest-xdist that has ended."""
    node.config.stash[_records].update(getattr(node, "workeroutput", {}).get(_FROM_WORKERS, {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    told = [
        text for report in reports if report.when == "call" for key, text in report.user_properties if key == _PROPERTY
    ]
    records = config.stash[_records]
    if not (told or records):
        return
    terminalreporter.section("memory of training steps")
    for text in told:
        terminalreporter.write_line(text)
    if records:
        checks = f"{len(records)} check{'s' if len(records) != 1 else ''}"
        terminalreporter.write_line(f"Wrote what {checks} took to {_file(config)}.")
