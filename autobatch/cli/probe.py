"""`autobatch probe`: a training plan from real or predicted trials, or a profile of the device."""

from __future__ import annotations

import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autobatch.cli.common import (
    DebugOption,
    HeadroomOption,
    JsonOption,
    MemoryLimitOption,
    PrecisionOption,
    check_output,
    explained,
)
from autobatch.errors import InvalidInput, NothingFits, PlanFileError
from autobatch.files import write_whole
from autobatch.precision import Precision

if TYPE_CHECKING:
    from autobatch.plan import TrainingPlan
    from autobatch.profile import DeviceProfile
    from autobatch.report.live import LiveProgress

GPU_REFERENCE_TARGET, CPU_REFERENCE_TARGET = 4096, 32
CPU_REFERENCE_ROOM = 384 * 1024**2
"""Without a SPEC: all of a GPU's memory is quickly filled, but a CPU would take minutes for all of its own. The room is
what trials get beyond what Python and torch hold, which is some 200 MiB or, for a CUDA build of torch, 900."""


def probe(
    spec: Annotated[
        str | None,
        typer.Argument(
            help="What to train: path/to/file.py:factory, package.module:factory (it returns a model or a Workload), "
            "hf:gpt2, timm:resnet50 or torchvision:resnet50. Without it, this device is characterised on small "
            "reference models, and the result saved as autobatch-profile-DEVICE.json here, or as --output says."
        ),
    ] = None,
    target: Annotated[
        int | None, typer.Option(help="Samples per optimizer step, over all ranks. Needed with SPEC.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:1. Default: the first GPU, else the CPU. Or a GPU that isn't here, simulated: "
            "rtx-4090, 24GiB, or a saved profile."
        ),
    ] = None,
    memory_limit: MemoryLimitOption = None,
    precision: PrecisionOption = None,
    headroom: HeadroomOption = 0.05,
    world_size: Annotated[int | None, typer.Option(help="Ranks that share the target. Default: 1.")] = None,
    max_micro_batch: Annotated[int | None, typer.Option(help="Never try more samples than this.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Prove that one more sample does not fit.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the result as JSON.")
    ] = None,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    debug: DebugOption = False,
) -> None:
    """Make a training plan by running real training steps; for a GPU that isn't here, by predicting them.

    Exit codes: 0 a plan; 1 nothing fits; 2 bad usage; 3 the model's own code failed, or cannot be traced; 130
    interrupted.
    """
    with explained(debug):
        from autobatch.units import parse_bytes

        limit = parse_bytes(memory_limit) if memory_limit is not None else None
        if output is not None:
            check_output(output)
        if spec is None and world_size is not None:
            raise InvalidInput("--world-size has no meaning without a SPEC: reference models run on one rank.")
        if spec is not None and target is None:
            raise InvalidInput(f"say how many samples one optimizer step takes: autobatch probe {spec} --target 256")
        from rich.console import Console

        from autobatch.report.live import LiveProgress

        shared: dict[str, Any] = {
            "device": device,
            "headroom": headroom,
            "max_micro_batch": max_micro_batch,
            "exact": exact,
        }
        # What the user's own code prints must not get between the lines of the result.
        with redirect_stdout(sys.stderr), LiveProgress(Console(stderr=True), quiet) as live:
            if spec is None:
                result: TrainingPlan | DeviceProfile = _characterise(target, limit, precision, live, shared)
            else:
                result = _plan(spec, target, limit, precision, live, {**shared, "world_size": world_size})
        _hand_over(result, output, as_json, quiet)


def _plan(
    spec: str,
    target: int | None,
    limit: int | None,
    precision: Precision | None,
    live: LiveProgress,
    options: dict[str, Any],
) -> TrainingPlan:
    from dataclasses import replace

    from autobatch import Workload, fit
    from autobatch.devices import get_device
    from autobatch.prediction import tracing
    from autobatch.workload import specs

    spot = get_device(options["device"], limit)
    simulated = spot.info.type == "simulated"
    if simulated:
        tracing.claim_this_process()
    # A model is built in CPU memory whatever it then trains on, so its weights have to fit in both; unless they need no
    # values.
    room = spot.limit_bytes if simulated else min(spot.limit_bytes, get_device("cpu", None).limit_bytes)
    subject = specs.load(spec, room, shapes_only=simulated)
    if precision is not None:
        workload = subject if isinstance(subject, Workload) else Workload(subject)
        subject = replace(workload, precision=precision)
    return fit(subject, target, memory_limit=limit, progress=live, **options)  # type: ignore[arg-type]


def _characterise(
    target: int | None,
    limit: int | None,
    precision: Precision | None,
    live: LiveProgress,
    options: dict[str, Any],
) -> DeviceProfile:
    from autobatch.devices import get_device
    from autobatch.devices.process_memory import data_bytes
    from autobatch.profile import profile_device
    from autobatch.units import format_bytes

    is_cpu = get_device(options["device"], limit).info.type == "cpu"
    if target is None:
        target = CPU_REFERENCE_TARGET if is_cpu else GPU_REFERENCE_TARGET
    if limit is None and is_cpu:
        limit = data_bytes() + CPU_REFERENCE_ROOM
        live.say(
            f"Trying within {format_bytes(limit)} ({format_bytes(CPU_REFERENCE_ROOM)} more than Python and torch), "
            "to be quick; choose another with --memory-limit."
        )
    return profile_device(
        target,
        memory_limit=limit,
        precision=precision or "fp32",
        progress=live,
        on_reference=lambda reference: live.say(f"\n{reference.name}: {reference.description}"),
        **options,
    )


def _hand_over(result: TrainingPlan | DeviceProfile, output: Path | None, as_json: bool, quiet: bool) -> None:
    """Print first, then save: a disk that is full by now loses nothing."""
    from rich.console import Console

    from autobatch.plan import TrainingPlan

    text = result.model_dump_json(indent=2)
    fits = True
    if isinstance(result, TrainingPlan):
        view: Any = result
    else:
        from autobatch.report.tables import profile_view

        view = profile_view(result)
        fits = any(reference.plan for reference in result.results)
        output = output or Path(f"autobatch-profile-{_file_name(result.device.name)}.json")
    try:
        if as_json:
            print(text)
        else:
            Console().print(view)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read this has seen enough; Python flushes once more
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if output is None:
            text = f"the result cannot be written to stdout: {error.strerror}."
            raise InvalidInput(f"{text} Use --output to save it to a file.") from error
    if output is not None:
        try:
            if isinstance(result, TrainingPlan):
                result.save(output)
            else:
                write_whole(output, text + "\n")
        except (PlanFileError, OSError) as error:
            if not as_json:
                print(text)
            reason = f"{output} cannot be written: {error}." if isinstance(error, OSError) else error
            raise InvalidInput(f"{reason} The result is printed above as JSON.") from error
        if not quiet:
            print(f"Saved to {output}", file=sys.stderr)
    if not fits:
        raise typer.Exit(NothingFits.exit_code)


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
