"""Curvature matrices of a loss as linear operators: one file and one function a matrix."""
