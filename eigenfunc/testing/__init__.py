"""For people who write their own solvers, operators and models: hypothesis strategies and contracts.

`check_eigensolver` and `check_operator` hold a solver or an operator to its contract; `strategies` draws the spectra,
operators, parameter trees and losses they are tried on; `Problem` makes an operator of known spectrum from one line.
Needs the extra `testing`.
"""

from eigenfunc.testing import strategies
from eigenfunc.testing.contract import Tally, check_eigensolver
from eigenfunc.testing.layouts import LAYOUTS, Layer, parameter_tree
from eigenfunc.testing.losses import LOSSES, SmallLoss, small_loss
from eigenfunc.testing.operators import OperatorFault, check_operator
from eigenfunc.testing.problems import Case, Problem, random_case
from eigenfunc.testing.relations import RELATIONS
from eigenfunc.testing.spectra import FAMILIES, Family, spectrum
from eigenfunc.testing.verdicts import Claim, SolverFault, faults

__all__ = [
    "FAMILIES",
    "LAYOUTS",
    "LOSSES",
    "RELATIONS",
    "Case",
    "Claim",
    "Family",
    "Layer",
    "OperatorFault",
    "Problem",
    "SmallLoss",
    "SolverFault",
    "Tally",
    "check_eigensolver",
    "check_operator",
    "faults",
    "parameter_tree",
    "random_case",
    "small_loss",
    "spectrum",
    "strategies",
]
