"""The precisions that a training step may have."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
"""float32 throughout, or autocast to bfloat16, or to float16 with a GradScaler."""
