"""Every way in which eigenfunc says no, each naming what is wrong, where, and the remedy."""

from __future__ import annotations

from typing import Any


class EigenfuncError(Exception):
    """Root of all errors that eigenfunc raises on purpose."""


class InputError(EigenfuncError, ValueError):
    """An argument cannot be used: `k`, `tol`, `which`, `v0`, a basis size, a selection."""


class TreeError(InputError):
    """A pytree does not have the structure, shapes, dtypes or devices it should."""


class ObjectiveError(InputError):
    """The loss or its parameters cannot be differentiated as asked."""


class DataError(InputError):
    """The data is empty, spent, impossible to weigh, or makes the loss non-finite."""


class BudgetError(InputError):
    """What is asked for does not fit into `memory_budget`; `smallest` bytes are the least that would do."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class FileError(InputError):
    """A saved result is missing, damaged or of a later format, or cannot be written."""


class ProductError(EigenfuncError, RuntimeError):
    """No way of forming the matrix-vector product proves right on this model."""


class NonFiniteError(EigenfuncError, ArithmeticError):
    """A product with the matrix came out as NaN or infinity."""


class TransformError(EigenfuncError, RuntimeError):
    """A host-side function was called inside a `torch.func` transform."""


class NotConverged(EigenfuncError, RuntimeError):
    """What was asked for was not reached: eigenpairs, a residual, an error; `solution` holds what was found."""

    def __init__(self, message: str, solution: Any) -> None:
        super().__init__(message)
        self.solution = solution


class DistributedError(EigenfuncError, RuntimeError):
    """Another process failed, died or does not answer, or the processes no longer do the same."""


class CheckpointError(EigenfuncError, RuntimeError):
    """A checkpoint cannot be used: torn, corrupted, of another problem or another version, or not to be written."""


class StorageError(EigenfuncError, RuntimeError):
    """The disk does not take the vectors that were to be kept there."""


class Stopped(EigenfuncError, RuntimeError):
    """A run was stopped on request, after it was saved: the same call goes on from there."""


class CheckpointWarning(UserWarning):
    """A run goes on without being saved, or from a state whose products no longer repeat to the last bit."""


class DataWarning(UserWarning):
    """Two passes over the data disagree, or another cut into batches gives another mean, and so another matrix."""


class CompileWarning(UserWarning):
    """A product could not be compiled, or came out wrong so: it is formed eagerly."""


class ConvergenceWarning(UserWarning):
    """A result was returned that does not carry a certificate."""
