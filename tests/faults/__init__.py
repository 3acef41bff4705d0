"""Faults, injected: kills, a full disk, damaged files, signals. See `tests/faults/scenarios.py` for the commands."""
