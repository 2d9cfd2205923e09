"""Runs that are killed at random moments: `python -m tests.faults --help`."""
