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
from eigenfunc.layers import blocks, eigsh_blocks
from eigenfunc.lobpcg import lobpcg
from eigenfunc.objective import Objective, functional_loss
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.overlap import gradient_overlap, gradient_shares, principal_angles, subspace_overlap
from eigenfunc.power_iteration import power_iteration
from eigenfunc.preconditioners import adam_preconditioner
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
    "adam_preconditioner",
    "aslinearoperator",
    "blocks",
    "compute_hessian_eigenthings",
    "eigsh",
    "eigsh_blocks",
    "fisher",
    "fishervp",
    "functional_loss",
    "ggn",
    "ggnvp",
    "gradient_overlap",
    "gradient_shares",
    "hessian",
    "hvp",
    "lanczos",
    "lobpcg",
    "power",
    "power_iteration",
    "principal_angles",
    "sharpness",
    "subspace_iteration",
    "subspace_overlap",
    "top_eigenpairs",
]
