"""Runs a piece of a test in a process of its own: what traces cannot be undone in the process that it happens in."""

import os
import subprocess
import sys
import textwrap

import warm

PRELUDE = """
import torch
from torch import nn
from autobatch.prediction import stand_in
from autobatch.prediction.affine import STEPS, AffineSteps
from autobatch.prediction.trace import Category, Phase
from autobatch.prediction.tracer import trace_steps
from autobatch.workload import Workload, resolve

MODE = stand_in.make()

def traced(model, *sizes, **workload):
    return trace_steps(resolve(Workload(model, **workload)), (sizes, sizes), MODE).trace

def bytes_of(trace, numbers):
    total = {}
    for i in numbers:
        total[trace.sites[i].category] = total.get(trace.sites[i].category, 0) + trace.sizes[i]
    return total

def peak_of(trace):
    alive = list(trace.allocated_bytes())
    return trace.alive_at(alive.index(max(alive)))

def operators(trace, *phases):
    return [s.operator.removeprefix("aten.").removesuffix(".default") for s in trace.sites if s.phase in phases]
"""


def in_its_own_process(code, **environment):
    """What it printed. It fails as the code fails. With a changed environment, it is a new interpreter."""
    program = PRELUDE + textwrap.dedent(code)
    if environment:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    else:
        done = warm.run(program)
    assert done.returncode == 0, done.stderr
    return done.stdout
