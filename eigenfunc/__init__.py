"""Eigenvalues, eigenvectors and spectra of the curvature of any PyTorch loss, from matrix-vector products alone."""

from eigenfunc._version import __version__
from eigenfunc.compat import compute_hessian_eigenthings
from eigenfunc.curvature.fisher import fisher, fishervp
from eigenfunc.curvature.ggn import ggn, ggnvp
from eigenfunc.curvature.hessian import hessian
from eigenfunc.curvature.products import hvp
from eigenfunc.data import Batches
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import EigenfuncError, NotConverged
from eigenfunc.implicit import sharpness, top_eigenpairs
from eigenfunc.krylov.lanczos import Tridiagonal, lanczos
from eigenfunc.krylov.power import power
from eigenfunc.lobpcg import lobpcg
from eigenfunc.objective import Objective, functional_loss
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.power_iteration import power_iteration
from eigenfunc.solution import EigenPairs, Solution, Status
from eigenfunc.subspace_iteration import subspace_iteration

__all__ = [
    "Batches",
    "EigenPairs",
    "EigenfuncError",
    "LinearOperator",
    "NotConverged",
    "Objective",
    "Solution",
    "Status",
    "Tridiagonal",
    "__version__",
    "aslinearoperator",
    "compute_hessian_eigenthings",
    "eigsh",
    "fisher",
    "fishervp",
    "functional_loss",
    "ggn",
    "ggnvp",
    "hessian",
    "hvp",
    "lanczos",
    "lobpcg",
    "power",
    "power_iteration",
    "sharpness",
    "subspace_iteration",
    "top_eigenpairs",
]
