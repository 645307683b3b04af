"""Eigenvalues, eigenvectors and spectra of the curvature of any PyTorch loss, from matrix-vector products alone."""

from eigenfunc import alerts, callbacks, errors, landscape, plot
from eigenfunc._version import __version__
from eigenfunc.checkpoint import Checkpoint
from eigenfunc.compat import compute_hessian_eigenthings
from eigenfunc.curvature.fisher import fisher, fishervp
from eigenfunc.curvature.ggn import ggn, ggnvp
from eigenfunc.curvature.hessian import hessian
from eigenfunc.curvature.products import hvp
from eigenfunc.data import Batches
from eigenfunc.distributed.deal import share
from eigenfunc.distributed.parallel import data_parallel
from eigenfunc.eigsh import eigsh
from eigenfunc.errors import EigenfuncError, NotConverged
from eigenfunc.flatness import Flatness, flatness
from eigenfunc.funm import FunctionProduct, funm_multiply
from eigenfunc.implicit import sharpness, top_eigenpairs
from eigenfunc.krylov.lanczos import Tridiagonal, lanczos
from eigenfunc.krylov.power import power
from eigenfunc.krylov.probes import trace_probes
from eigenfunc.krylov.quadrature import Quadrature, quadrature
from eigenfunc.layers import blocks, eigsh_blocks
from eigenfunc.lobpcg import lobpcg
from eigenfunc.nearby import average_sharpness, worst_sharpness
from eigenfunc.objective import Objective, functional_loss
from eigenfunc.operator import LinearOperator, aslinearoperator
from eigenfunc.overlap import gradient_overlap, gradient_shares, principal_angles, subspace_overlap
from eigenfunc.plan import Plan, plan
from eigenfunc.power_iteration import power_iteration
from eigenfunc.preconditioners import adam_preconditioner
from eigenfunc.records import Alert, Record
from eigenfunc.sampling import sampling_error
from eigenfunc.solution import EigenPairs, Solution, Status
from eigenfunc.solve import LinearSolution, solve
from eigenfunc.stochastic.density import Density, spectral_density
from eigenfunc.stochastic.diagonal import diagonal
from eigenfunc.stochastic.estimate import Estimate
from eigenfunc.stochastic.functions import effective_dimension, logdet, moments
from eigenfunc.stochastic.trace import frobenius_norm, trace
from eigenfunc.streaming import eigsh_streaming
from eigenfunc.subspace_iteration import subspace_iteration
from eigenfunc.track import SpectrumTracker

__all__ = [
    "Alert",
    "Batches",
    "Checkpoint",
    "Density",
    "EigenPairs",
    "EigenfuncError",
    "Estimate",
    "Flatness",
    "FunctionProduct",
    "LinearOperator",
    "LinearSolution",
    "NotConverged",
    "Objective",
    "Plan",
    "Quadrature",
    "Record",
    "Solution",
    "SpectrumTracker",
    "Status",
    "Tridiagonal",
    "__version__",
    "adam_preconditioner",
    "aslinearoperator",
    "average_sharpness",
    "blocks",
    "compute_hessian_eigenthings",
    "data_parallel",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "eigsh_blocks",
    "eigsh_streaming",
    "fisher",
    "fishervp",
    "flatness",
    "frobenius_norm",
    "functional_loss",
    "funm_multiply",
    "ggn",
    "ggnvp",
    "gradient_overlap",
    "gradient_shares",
    "hessian",
    "hvp",
    "lanczos",
    "lobpcg",
    "logdet",
    "moments",
    "plan",
    "power",
    "power_iteration",
    "principal_angles",
    "quadrature",
    "sampling_error",
    "share",
    "sharpness",
    "solve",
    "spectral_density",
    "subspace_iteration",
    "subspace_overlap",
    "top_eigenpairs",
    "trace",
    "trace_probes",
    "worst_sharpness",
]

_MODULES = {"alerts": alerts, "callbacks": callbacks, "errors": errors, "landscape": landscape, "plot": plot}


def __dir__() -> list[str]:
    """What is public, `eigenfunc.testing` where it was imported: it needs an extra."""
    return sorted([*__all__, *_MODULES, *({"testing"} & globals().keys())])
