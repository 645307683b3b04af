"""Eigenvalues, eigenvectors and spectra of the curvature of any PyTorch loss, from matrix-vector products alone."""

from eigenfunc.curvature.hessian import hessian
from eigenfunc.curvature.products import hvp
from eigenfunc.data import Batches
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import EigenfuncError, NotConverged
from eigenfunc.krylov.lanczos import Tridiagonal, lanczos
from eigenfunc.krylov.power import power
from eigenfunc.objective import Objective, functional_loss
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.solution import EigenPairs, Solution, Status

from eigenfunc._version import __version__

__all__ = [
    "Batches",
    "EigenPairs",
    "EigenfuncError",
    "LinearOperator",
    "NotConverged",
    "Objective",
    "Solution",
    "Status",
    "aslinearoperator",
    "eigsh",
    "functional_loss",
    "hessian",
    "hvp",
    "lanczos",
    "power",
]
