"""Memory regressions: what a training step takes now against what it took, and which line is to blame."""
