"""Faults injected into real runs of several processes, and what is left of them: `python -m tests.faults`."""
