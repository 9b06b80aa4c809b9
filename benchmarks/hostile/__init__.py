"""Hostile inputs and environments: `python -m benchmarks.hostile`."""
