"""Estimates from random probes, each with the error that it can have."""
