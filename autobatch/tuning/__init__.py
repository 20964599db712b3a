"""Tuning: the fastest way to a target, by knobs that trade memory for time."""
