"""What the tests need before they start."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
import warm

from autobatch import child

START = child._start

# A shell that starts a job in the background has it ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if torch.version.cuda is None:
    # torchvision's wheels have no compiled operators for a CPU build of torch, and it cannot be imported without these
    # two.
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that an earlier run worked out is used, and nothing is left in the user's cache."""
    before = os.environ.get("AUTOBATCH_CACHE")
    os.environ["AUTOBATCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["AUTOBATCH_CACHE"]
    else:
        os.environ["AUTOBATCH_CACHE"] = before


@pytest.fixture(autouse=True, scope="session")
def _imports_are_here_to_stay() -> None:
    """Trials collect garbage between them, and need not look through all modules for it each time."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _children_that_have_torch() -> Iterator[None]:
    """The processes that trials and traces run in are forked from one that has imported torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "_start", warm.start_child)
        yield


@pytest.fixture
def new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are new Python processes, as for users: a fork's heap has other gaps, which moves peaks by some per cent."""
    monkeypatch.setattr(child, "_start", START)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors have a precision in which sums in another order are the same to a dozen digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
