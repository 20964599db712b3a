"""Training with a plan: optimizer steps whose gradient is that of the whole batch."""

from autobatch.training.passes import MicroBatch
from autobatch.training.results import Shrunk, StepResult
from autobatch.training.stepper import Stepper

__all__ = ["MicroBatch", "Shrunk", "StepResult", "Stepper"]
