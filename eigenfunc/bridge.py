"""Objects of other libraries, which are asked for only where one is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eigenfunc.errors import InputError

if TYPE_CHECKING:
    import pandas
    import scipy.sparse.linalg


def scipy_operator(
    n: int, dtype: torch.dtype, device: torch.device, rows: Callable[[Tensor], Tensor]
) -> scipy.sparse.linalg.LinearOperator:
    """A symmetric real operator for SciPy, from a function that multiplies the rows of a tensor (p, n) by it."""
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise InputError("to_scipy() needs SciPy: pip install scipy") from error

    def real(x: Any) -> Any:
        given = torch.tensor(np.ascontiguousarray(x.T), dtype=dtype, device=device)
        return rows(given).detach().cpu().numpy().T

    def matmat(x: Any) -> Any:
        return real(x.real) + 1j * real(x.imag) if np.iscomplexobj(x) else real(x)

    def matvec(x: Any) -> Any:
        return matmat(x.reshape(-1, 1))[:, 0]

    return LinearOperator((n, n), matvec, matvec, matmat, torch.zeros(0, dtype=dtype).numpy().dtype, matmat)


def dataframe(columns: dict[str, Tensor]) -> pandas.DataFrame:
    """A data frame of the columns (k,), all on the CPU, with their rank from 1 as its index."""
    try:
        import pandas
    except ImportError as error:
        raise InputError("to_dataframe() needs pandas: pip install pandas") from error
    count = len(next(iter(columns.values())))
    index = pandas.RangeIndex(1, count + 1, name="rank")
    return pandas.DataFrame({name: x.numpy() for name, x in columns.items()}, index=index)
