"""What people look at: plans, estimates and searches in words, tables and pages."""

import random as _random

_before = _random.getstate()
import rich.style  # noqa: E402, F401  # it takes a random number as it is imported, and a plan that is printed must not

_random.setstate(_before)
