"""Every error that a user of autobatch can meet.

An error says what happened, with the numbers, and what to do next. A bug in the user's own model is none of these: it
is raised as it is. `exit_code` is what the command line returns for it: 1 nothing fits, 2 bad usage, 3 a workload that
fails.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

OWN_CODE_FAILED = "the model's own code failed"


class AutobatchError(Exception):
    """The base of all errors raised by autobatch itself."""

    exit_code = 2


class InvalidInput(AutobatchError, ValueError):
    """An argument, a file or a specification that cannot be used as it is."""


class InputsNotInferred(InvalidInput):
    """The inputs of a bare model could not be worked out; the message shows the call to make instead."""


class PlanFileError(AutobatchError):
    """A plan file that is damaged, or of a version this autobatch does not know."""


class DeviceUnavailable(AutobatchError):
    """The device asked for is not there, or cannot run trials."""


class WorkloadNotPortable(AutobatchError):
    """The workload cannot be sent to the process in which trials run."""


class NotTraceable(AutobatchError):
    """A step cannot be traced without its GPU, so nothing can be predicted about it."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        operator: str = "",
        module: str = "",
        line: str = "",
        needs_values: bool = False,
        details: str = "",
        raised: str = "",
        samples: int = 0,
    ) -> None:
        super().__init__(message)
        self.operator = operator
        """The operator that could not be followed, such as `aten.nonzero.default`; "" if it was none."""
        self.module = module
        """The path of the module that called it."""
        self.line = line
        """`file:line` of the code that did."""
        self.needs_values = needs_values
        """Whether it depends on the values of tensors."""
        self.details = details
        """The traceback where it was traced, which may have been another process. Tracebacks of this error show it."""
        self.raised = raised
        """The type of the exception that ended the trace, such as "ValueError"; "" for a known limit of tracing."""
        self.samples = samples
        """Those of the micro-batch that was traced then; 0 where it was none."""
        if details:
            self.__notes__ = [details]

    def __reduce__(self) -> tuple[object, ...]:
        place = (self.operator, self.module, self.line, self.needs_values, self.details, self.raised, self.samples)
        return type(self), (str(self), *place)


class NothingFits(AutobatchError):
    """Not even the smallest micro-batch fits in the budget."""

    exit_code = 1

    def __init__(self, message: str, *, needed_bytes: int | None, budget_bytes: int | None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        """Bytes that the smallest micro-batch took, or None where it could not be measured."""
        self.budget_bytes = budget_bytes
        """Bytes that a training step was allowed to use, or None where nothing limited it but the device."""


class TrialCrashed(AutobatchError):
    """A trial died of something that is not memory (a segmentation fault, `os._exit`)."""

    exit_code = 3


class RankFailed(AutobatchError):
    """Another rank of the group failed, so the ranks have no answer together."""

    exit_code = 3


class DevicePoisoned(AutobatchError):
    """The CUDA context is beyond use after an error in a kernel: nothing can run in this process any more."""

    exit_code = 3


def add_note(error: BaseException, note: str) -> None:
    """Add a line that the traceback will show under the error. Python 3.10 keeps it, without showing it."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]


def in_one_line(error: BaseException) -> str:
    """The exception, and the last place in the user's code that it came through.

    An exception from another process brings that process's traceback along as a note.
    """
    if isinstance(error, SyntaxError) and error.filename:  # raised while a file is read, so no frame is in that file
        return f"{OWN_CODE_FAILED}: {type(error).__name__}: {error.msg} ({error.filename} line {error.lineno})"
    text = "".join([*traceback.format_exception(error), *getattr(error, "__notes__", ())])
    places = re.findall(r'File "([^"<]+)", line (\d+), in (\S+)', text)
    libraries = (str(Path(__file__).parent), "site-packages", str(Path(traceback.__file__).parent))
    own = [place for place in places if not any(library in place[0] for library in libraries)]
    told = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":.")
    if not own:
        return f"failed outside of your own files: {told}"
    return "{}: {} ({} line {}, in {})".format(OWN_CODE_FAILED, told, *own[-1])
