"""What the tests need before they start."""

import signal

import torch

# A shell that starts a job in the background has it ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if torch.version.cuda is None:
    # torchvision's wheels have no compiled operators for a CPU build of torch, and it cannot be imported without these
    # two.
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
