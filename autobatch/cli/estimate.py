"""`autobatch estimate`: what a training step takes on a GPU that isn't here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autobatch import cache
from autobatch.cli.common import (
    DebugOption,
    HeadroomOption,
    JsonOption,
    MemoryLimitOption,
    PrecisionOption,
    check_output,
    explained,
)
from autobatch.errors import InvalidInput, NothingFits
from autobatch.precision import Precision

if TYPE_CHECKING:
    from autobatch.devices.target import Target
    from autobatch.estimates import Estimate
    from autobatch.estimator import Estimator, Question


def estimate(
    spec: Annotated[str, typer.Argument(help="What to train, as for probe.")],
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-n", help="Samples of the micro-batch. Default: as many as fit.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="GPU[,GPU...]",
            help="rtx-4090, 24GiB or a saved profile; several at once show which card is needed. "
            "`autobatch devices --catalog` lists them.",
        ),
    ] = "",
    memory_limit: MemoryLimitOption = None,
    precision: PrecisionOption = None,
    headroom: HeadroomOption = 0.05,
    accumulation: Annotated[
        bool, typer.Option("--accumulation", help="Hold the gradients of an earlier micro-batch meanwhile.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the step's memory over time into this file.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Predict what a training step takes on a GPU that isn't here, and which modules take it.

    Exit codes: 0 it fits (on any of several GPUs); 1 it does not; 2 bad usage; 3 the model's own code failed, or cannot
    be traced; 130 interrupted.
    """
    with explained(debug):
        names = [name.strip() for name in device.split(",") if name.strip()]
        if not names:
            raise InvalidInput(f"say which GPU: autobatch estimate {spec} --device rtx-4090")
        if html is not None:
            if len(names) > 1:
                raise InvalidInput(f"--html draws the step on one GPU, but {len(names)} are named. Choose one of them.")
            check_output(html, "--html")
        with redirect_stdout(sys.stderr):  # what the user's own code prints must not get into the result
            from autobatch.estimator import Question

            question = Question.checked(batch_size, names, memory_limit, headroom, accumulation)
            found = _kept(spec, precision, question) or _estimates(spec, precision, question)
        if html is not None:
            found[0].save_html(str(html))
        _show_estimates(found, as_json)
        if html is not None:
            print(f"Saved to {html}", file=sys.stderr)
        if not any(one.fits for one in found):
            raise typer.Exit(NothingFits.exit_code)


_PACKAGES = {"hf": "transformers", "timm": "timm", "torchvision": "torchvision"}


def _key(spec: str, precision: Precision | None, kind: int) -> str | None:
    """What the traces for a kind of attention kernels are kept under; None where they may depend on more than is named,
    as a factory's file may."""
    package = _PACKAGES.get(spec.partition(":")[0])
    if package is None:
        return None
    try:
        versions = [importlib.metadata.version(name) for name in ("torch", "torch-autobatch", package)]
    except importlib.metadata.PackageNotFoundError:
        return None
    return cache.key_of("step", repr((spec, precision, kind, versions, os.environ.get("TIMM_FUSED_ATTN"), sys.version)))


def _kept(spec: str, precision: Precision | None, question: Question) -> list[Estimate] | None:
    """The answers from traces that were made before. They need neither torch nor the model."""
    found: dict[Target, Estimate] = {}
    for kind, targets in question.kinds.items():
        key = _key(spec, precision, kind)
        content = cache.load(key) if key is not None else None
        if content is None:
            return None
        try:
            estimator = pickle.loads(content)
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError):  # damaged
            return None
        found |= {target: estimator.answer(question, target) for target in targets}
    return [found[target] for target in question.targets]


def _keep(spec: str, precision: Precision | None, kind: int, estimator: Estimator) -> None:
    key = _key(spec, precision, kind)
    if key is not None and estimator.steps.even is not None:  # else every size has to be traced by itself
        cache.save(key, pickle.dumps(estimator, protocol=pickle.HIGHEST_PROTOCOL))


def _estimates(spec: str, precision: Precision | None, question: Question) -> list[Estimate]:
    from dataclasses import replace

    from autobatch import Workload
    from autobatch.estimating import estimates
    from autobatch.prediction import tracing
    from autobatch.workload import specs

    subject = specs.load(spec, shapes_only=True)
    workload = subject if isinstance(subject, Workload) else Workload(subject)
    if precision is not None:
        workload = replace(workload, precision=precision)
    tracing.claim_this_process()
    return estimates(workload, question, partial(_keep, spec, precision))


def _show_estimates(found: list[Estimate], as_json: bool) -> None:
    if as_json:
        texts = [one.model_dump(mode="json") for one in found]
        print(json.dumps(texts[0] if len(texts) == 1 else texts, indent=2))
        return
    from rich.console import Console

    from autobatch.report.estimate import cards_table

    Console().print(found[0] if len(found) == 1 else cards_table(found))
