"""Traces, diagonals and norms from random probes, each with an honest standard error."""
