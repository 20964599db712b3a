"""What stands in the way of a trace, said so that the user can remove it."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from torch._subclasses.fake_tensor import UnsupportedOperatorException

from autobatch.errors import NotTraceable
from autobatch.prediction.values import DEPENDS_ON_VALUES


@dataclass(frozen=True)
class Obstacle:
    """An operator that could not be followed, and where it was called."""

    operator: str
    module: str
    line: str


def explained(error: Exception, where: Obstacle | None, samples: int = 0) -> NotTraceable:
    """The error for the user.

    Args:
        error: what was raised.
        where: the operator that raised it, or None if none did.
        samples: those of the micro-batch that was traced.
    """
    where = where or Obstacle("", "", "")
    raised = ""
    at = f"{where.operator} in {where.module or 'the step itself'} ({where.line})"
    needs_values = isinstance(error, DEPENDS_ON_VALUES)
    if needs_values:
        message = (
            f"the step cannot be traced without its GPU, as it depends on the values of tensors: {at}. Where only "
            "shapes matter, compute without reading values (torch.where instead of if), or probe on the device itself."
        )
    elif isinstance(error, UnsupportedOperatorException) or (
        isinstance(error, NotImplementedError) and where.operator and not where.operator.startswith("aten.")
    ):
        message = (
            f"the step cannot be traced without its GPU, as {at} does not say what it returns. Register a fake kernel "
            f'for it, @torch.library.register_fake("{_qualified(where.operator)}"), that gives empty tensors of the '
            "right shapes."
        )
    elif isinstance(error, AttributeError) and (unknown := _UNKNOWN_OPERATOR.search(str(error))):
        message = (
            f"the step cannot be traced: the operator {unknown[1]}::{unknown[2]} is not there in the process that "
            "traces it. What a script defines with torch.library.define is not sent there: use "
            "torch.library.custom_op, or define it in a module that the model's module imports."
        )
    else:
        raised = type(error).__name__
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        message = (
            f"the step cannot be traced without its GPU: {type(error).__name__}: {first}"
            + (f", raised by {at}" if where.operator else "")
            + ". If the same step runs on a GPU, this is a limit of tracing; probe on the device itself."
        )
    text = "".join(traceback.format_exception(error))
    return NotTraceable(message, where.operator, where.module, where.line, needs_values, text, raised, samples)


_UNKNOWN_OPERATOR = re.compile(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'")


def _qualified(operator: str) -> str:
    """`mylib.op.default` as torch.library spells it: `mylib::op`."""
    return "::".join(operator.split(".")[:2])
