"""What a solver returns: eigenpairs with their true residuals, a verdict, and how it was reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from eigenfunc import archive, bridge, tree
from eigenfunc.errors import FileError, InputError
from eigenfunc.tree import Tree, gibibytes

if TYPE_CHECKING:
    import pandas

_COLUMNS = ("values", "residuals", "bounds", "sharp", "angles")  # the fields (k,) float64


class Status(StrEnum):
    """How a run ended; `Solution.message` adds the figures and the remedy."""

    CONVERGED = "converged"
    NOT_CONVERGED = "not converged"
    STAGNATED = "stagnated at the noise floor"
    INCOMPLETE = "incomplete"
    NOT_SYMMETRIC = "not symmetric"
    NONDETERMINISTIC = "non-deterministic products"


class EigenPairs(NamedTuple):
    values: Tensor  # (k,)
    vectors: Tree  # (k, *leaf)
    residuals: Tensor  # (k,)


@dataclass(frozen=True)
class Stats:
    matvecs: int  # products with the matrix, all told
    verification: int  # those of them that only certify: set-up, completeness probe, fresh products
    passes: int  # sweeps over the data (calls of the operator; a block counts once)
    restarts: int
    seconds: float
    basis_size: int  # vectors kept
    basis_bytes: int
    orthogonality: float  # max |⟨x_i, x_j⟩ − δ_ij| over the returned vectors
    asymmetry: float  # largest |⟨u, A v⟩ − ⟨v, A u⟩| seen, relative to ‖A‖
    norm: float  # largest ‖A q‖ seen over unit q: a lower bound of ‖A‖
    seed: int


@dataclass(frozen=True, eq=False)
class Solution:
    """Eigenpairs of a symmetric operator, on the CPU but for `vectors`, which stay where the operator lives.

    values      (k,) float64, ordered as `which` says: LM by falling magnitude, LA and BE falling, SA rising
    vectors     (k, *leaf), orthonormal
    residuals   (k,) float64, ‖A v − λ v‖ of unit v from fresh products, not from the recurrence
    bounds      (k,) float64: each value lies within its bound of an eigenvalue of A, and values whose intervals
                overlap of as many different ones (W. Kahan's theorem: Parlett, The Symmetric Eigenvalue Problem,
                section 11.5); the noise of the products is added, and whatever the completeness probe could not exclude
    sharp       (k,) float64: as `bounds`, by Kato and Temple, r² over the distance to the rest of the spectrum, where
                that is known and smaller (T. Kato, J. Phys. Soc. Japan 4, 1949); given completeness
    angles      (k,) float64: bound of the sine of the angle between a vector and its eigenvector, r over that
                distance; 1 where values are too close to tell their vectors apart, as for the last pair, beyond which
                nothing is known (C. Davis and W. Kahan, SIAM J. Numer. Anal. 7, 1970)
    converged   (k,) bool: residual ≤ max(tol·|λ|, noise), and nothing missed by the completeness probe, which is
                a random one: see `eigsh`
    noise       the measured rounding noise of the products: no residual can be told from less
    """

    values: Tensor
    vectors: Tree
    residuals: Tensor
    bounds: Tensor
    sharp: Tensor
    angles: Tensor
    converged: Tensor
    noise: float
    which: str
    tol: float
    status: Status
    message: str
    stats: Stats

    @property
    def success(self) -> bool:
        return self.status is Status.CONVERGED

    @property
    def pairs(self) -> EigenPairs:
        return EigenPairs(self.values, self.vectors, self.residuals)

    def verdicts(self) -> list[str]:
        return ["converged" if ok else "NOT converged" for ok in self.converged.tolist()]

    def table(self, extra: dict[str, list[str]] | None = None) -> str:
        """One line an eigenpair, then what the run cost; `extra` adds columns by heading."""
        columns: dict[str, list[str]] = {
            "rank": [str(i + 1) for i in range(len(self.values))],
            "λ": [f"{value:+.10e}" for value in self.values.tolist()],
            "true residual": [f"{value:.1e}" for value in self.residuals.tolist()],
            "bound": [f"{value:.1e}" for value in self.bounds.tolist()],
            "sharp bound": [f"{value:.1e}" for value in self.sharp.tolist()],
            "angle": ["-" if value >= 1 else f"{value:.1e}" for value in self.angles.tolist()],
            **(extra or {}),
            "verdict": self.verdicts(),
        }
        widths = [max(len(head), *map(len, cells)) for head, cells in columns.items()]
        lines = ["  ".join(head.rjust(w) for head, w in zip(columns, widths, strict=True))]
        for cells in zip(*columns.values(), strict=True):
            lines.append("  ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)))
        stats = self.stats
        lines.append(
            f"{stats.matvecs} matvecs ({stats.verification} of them to verify), {stats.passes} passes, "
            f"{stats.restarts} restarts, {stats.seconds:.2f} s, basis {stats.basis_size} vectors "
            f"({gibibytes(stats.basis_bytes)}), noise {self.noise:.1e}, seed {stats.seed}"
        )
        lines.append(f"{self.status}: {self.message}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def report(self) -> dict[str, Any]:
        """Everything but the vectors, as plain Python values at full precision, ready for JSON."""
        return {
            **{name: getattr(self, name).tolist() for name in _COLUMNS},
            "converged": self.converged.tolist(),
            "noise": self.noise,
            "which": self.which,
            "tol": self.tol,
            "status": str(self.status),
            "message": self.message,
            **asdict(self.stats),
        }

    def save(self, path: str | PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write report.json and eigenvectors.safetensors into the folder `path`, replacing an earlier save there.

        The report is `report()` and what `about` adds to it, plain values for readers of the file that `load` leaves
        alone. Needs safetensors, the extra `export`. Raises `FileError` where the folder cannot be written, and
        `InputError` without safetensors or where `about` would overwrite a field of the report.
        """
        report = self.report()
        if taken := [key for key in about or {} if key in report]:
            raise InputError(f"about: '{taken[0]}' is a field of the report already")
        archive.write(Path(path), report | dict(about or {}), self.vectors)

    @classmethod
    def load(cls, path: str | PathLike[str], *, like: Tree | None = None) -> Solution:
        """The solution that `save` wrote into the folder `path`, every field bitwise as it was, `vectors` on the CPU.

        Trees of dicts, lists, tuples and bare tensors come back as such; for other containers pass `like`, a tree of
        the same structure (the parameters), to whose device the vectors then move.

        Raises `FileError` where files are missing, damaged, of different saves or of a later format, `TreeError` where
        `like` does not fit, and `InputError` where it is needed, or without safetensors.
        """
        folder = Path(path)
        record, vectors = archive.read(folder, like)
        with archive.reading(folder):
            columns = {name: torch.tensor([float(x) for x in record[name]], dtype=torch.float64) for name in _COLUMNS}
            converged = torch.tensor(record["converged"], dtype=torch.bool)
            lengths = {len(x) for x in (*columns.values(), converged, *tree.leaves(vectors))}
            if len(lengths) != 1:
                raise FileError(f"{folder / archive.REPORT} is damaged: its columns are of lengths {sorted(lengths)}")
            return cls(
                **columns,
                vectors=vectors,
                converged=converged,
                noise=_number(record["noise"]),
                which=record["which"],
                tol=_number(record["tol"]),
                status=Status(record["status"]),
                message=record["message"],
                stats=Stats(**{field.name: _number(record[field.name]) for field in fields(Stats)}),
            )

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas DataFrame with a row for each eigenpair: value, residual, bound, sharp, angle, converged.

        The index is the rank, from 1. Raises `InputError` without pandas.
        """
        return bridge.dataframe(
            {
                "value": self.values,
                "residual": self.residuals,
                "bound": self.bounds,
                "sharp": self.sharp,
                "angle": self.angles,
                "converged": self.converged,
            }
        )


def _number(x: Any) -> Any:
    """A number out of a report, where NaN and infinities are strings."""
    return x if type(x) is int else float(x)


def gaps(values: Tensor, bounds: Tensor, outer: Tensor) -> Tensor:
    """Distances (k,) from each value to the rest of the spectrum: the other intervals, and what is `outer` away."""
    apart = (values[:, None] - values[None, :]).abs() - bounds[None, :]
    inner = apart.fill_diagonal_(torch.inf).amin(1) if len(values) > 1 else torch.full_like(values, torch.inf)
    return torch.minimum(inner, outer).clamp_min(0.0)


def cluster_bounds(values: Tensor, residuals: Tensor, noise: float) -> Tensor:
    """Error bounds (k,) for Ritz values with true residual norms, grouped where their intervals overlap.

    For orthonormal vectors with residual matrix R there are as many eigenvalues, counted with multiplicity, each
    within ‖R‖₂ of its Ritz value; ‖R‖₂ is bounded by the Frobenius norm. Alone, a value needs only its own
    residual. (W. Kahan 1967; Parlett, section 11.5.)
    """
    order = torch.argsort(values)
    theta, r = values[order], residuals[order] + noise
    bounds = r.clone()
    while True:
        reach = torch.cummax(theta + bounds, 0).values[:-1]
        floor = torch.flip(torch.cummin(torch.flip(theta - bounds, [0]), 0).values, [0])[1:]
        group = torch.cat([torch.zeros(1, dtype=torch.long), (floor > reach).long().cumsum(0)])
        squares = torch.zeros(len(theta), dtype=r.dtype).index_add(0, group, r * r)
        grown = torch.maximum(bounds, torch.sqrt(squares[group]))
        if torch.equal(grown, bounds):
            break
        bounds = grown
    return torch.empty_like(bounds).index_copy(0, order, bounds)
