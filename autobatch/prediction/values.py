"""Real values beside fake tensors, for steps that look at values: what `.item()` says, which rows a mask takes.

Every operator that runs on fakes runs on real tensors on the CPU too, as far as the CPU has it and its inputs are
known. So the trace goes the way that the step goes with the batches it was given. Often the lengths of sequences are
enough: they are known at no cost for batches of any size, all values only for small ones.
"""

from __future__ import annotations

from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEPENDS_ON_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


class Known(str, Enum):
    """What a trace knows beside shapes."""

    NOTHING = "nothing"
    LENGTHS = "lengths"
    """The vectors of whole numbers in a batch, such as lengths, and the vectors and numbers computed from them."""
    ALL = "all"


class Unknown(Exception):
    """A value that no operator on the CPU has computed."""


class Values:
    """The real tensors of fake ones, as long as these live.

    Args:
        mode: what makes fakes.
        device: where they are.
        known: whether all values are to be known, or only lengths.
    """

    def __init__(self, mode: FakeTensorMode, device: str, known: Known = Known.ALL) -> None:
        self._mode = mode
        self._known = known
        self._device = torch.device(device)
        self._real: WeakKeyDictionary[_Key, Tensor] = WeakKeyDictionary()

    def know_input(self, fake: Tensor, real: Tensor) -> None:
        """The same for a tensor that is there before the step, if it is of the kind that is known."""
        if self._known is Known.ALL or (_is_vector(real) and not real.is_floating_point()):
            self.know(fake, real)

    def know(self, fake: Tensor, real: Tensor) -> None:
        """Remember what a fake tensor stands for. The real one is changed as the fake one is."""
        key = _Key()
        fake._autobatch_key = key  # type: ignore[attr-defined]  # held by the tensor, so that both end together
        self._real[key] = real

    def of(self, leaf: Any) -> Any:
        """A fake tensor's real one; other tensors as they are, devices as the CPU.

        Raises:
            Unknown: it has none.
        """
        if isinstance(leaf, torch.device):
            return torch.device("cpu") if leaf.type == self._device.type else leaf
        if not isinstance(leaf, Tensor):
            return leaf
        key: _Key | None = getattr(leaf, "_autobatch_key", None)
        if key is not None and key in self._real:
            return self._real[key]
        if type(leaf) is Tensor and leaf.device.type == "cpu":
            return leaf
        raise Unknown

    def run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """The operator on real tensors, or None where a value is not known or the CPU cannot compute it."""
        try:
            with _disable_current_modes(), torch.no_grad():
                args, kwargs = tree_map(self.of, (args, kwargs))
                return operator(*args, **kwargs)
        except (Unknown, NotImplementedError, RuntimeError):
            return None  # without a value here, an error only where one is asked for

    def worth_computing(self, result: Any) -> bool:
        """Whether an operator with this result, in fakes, is to run on real tensors too."""
        return self._known is Known.ALL or all(_is_vector(leaf) for leaf in tree_flatten(result)[0])

    def fakes_of(self, real: Any, device: torch.device) -> Any:
        """Fakes on that device of results whose shapes depend on values; plain numbers are themselves."""
        leaves, spec = tree_flatten(real)
        fakes = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                with self._mode:
                    fake = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
                self.know(fake, leaf)
                fakes.append(fake)
            else:
                fakes.append(leaf)
        return tree_unflatten(fakes, spec)

    def match(self, fake: Any, real: Any) -> None:
        """Remember the results of an operator."""
        for one, other in zip(tree_flatten(fake)[0], tree_flatten(real)[0], strict=False):
            if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
                self.know(one, other)


def _is_vector(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim <= 1


class _Key:
    """Stands for a tensor and is held by it: tensors themselves compare elementwise."""
