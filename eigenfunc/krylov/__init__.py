"""Pure kernels: fixed shapes, tensors only, no host reads, so that vmap, jvp, grad and compile go through them."""

from eigenfunc.krylov.lanczos import Tridiagonal
from eigenfunc.krylov.stepped import run

__all__ = ["Tridiagonal", "run"]
