"""Spectral densities against known spectra: distances, exact outliers, no ghosts, invariances, what is refused."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import scipy.stats
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy

from benchmarks.spectra import diagonal, hess
from eigenfunc import EigenPairs, NotConverged, aslinearoperator, demo, eigsh, functional_loss, hessian, tree
from eigenfunc.errors import InputError, NonFiniteError, TransformError, TreeError
from eigenfunc.stochastic.density import Density, spectral_density
from eigenfunc.testing import spectrum
from tests.helpers import Counted, dense_hessian, never, on_tree, plain, rotated, seeded
from tests.test_density_band import groups, share

Layer = namedtuple("Layer", ["weight", "bias"])


def wasserstein(density: Density, values: Tensor) -> float:
    """∫ |F − F̂| over the axis."""
    at = torch.cat([density.nodes.flatten(), density.values])
    mass = torch.cat([density.weights.flatten() / len(density.nodes), torch.full_like(density.values, 1 / density.n)])
    return float(scipy.stats.wasserstein_distance(values.numpy(), at.numpy(), None, mass.numpy()))


def test_the_wasserstein_distance_to_a_network_like_spectrum_is_below_1_percent() -> None:
    values = hess(5000)
    density = spectral_density(diagonal(values), num_probes=10, num_steps=80, seed=0)
    assert wasserstein(density, values) < 0.001 * values.abs().max()
    assert density.nodes.shape == density.weights.shape == (10, 80)
    assert density.matvecs == 802
    assert density.passes == 82


def test_the_wasserstein_distance_to_the_hessian_of_a_network_on_digits_is_below_1_percent() -> None:
    images, labels = demo.digits()
    with seeded():
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10))
        demo.train(net, images[:600], labels[:600], seed=0, epochs=5)
    net, images = net.double(), images[:600].double()
    loss, params = functional_loss(net, cross_entropy)
    truth = torch.linalg.eigvalsh(dense_hessian(plain(net, lambda m: cross_entropy(m(images), labels[:600])), params))
    A = hessian(loss, params, (images, labels[:600]))
    density = spectral_density(A, num_probes=10, num_steps=80, seed=0)
    assert wasserstein(density, truth) < 0.01 * truth.abs().max()
    at = torch.tensor([-1e-2, 1e-3, 1e-1, 0.5]).double() * truth.max()
    low, high = density.cdf(at)[1]
    assert ((low <= share(truth, at)) & (share(truth, at) <= high)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_300_steps_bring_no_second_copy_of_an_outlier(dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([100.0, 50.0, -20.0]), torch.linspace(0, 1, 397)]).to(dtype)
    density = spectral_density(aslinearoperator(lambda v: values * v, values), num_probes=2, num_steps=300, seed=0)
    for outlier in (100.0, 50.0, -20.0):
        near = (density.nodes - outlier).abs() < 1
        assert near.sum(1).tolist() == [1, 1]
    assert torch.allclose(density.weights.sum(1), torch.ones(2).double(), atol=1e-12)


@pytest.mark.parametrize("family", ["identity", "zero", "rank one", "low rank", "integers"])
@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_exhausted_spaces_end_the_recurrence_without_a_spurious_node(family: str, n: int) -> None:
    values = spectrum(family, n, seed=2)
    density = spectral_density(rotated(values, 3), num_probes=3, num_steps=50, seed=0)
    carrying = density.nodes[density.weights > 1e-10]
    assert ((carrying[:, None] - values).abs().amin(1) < 1e-10 * (1 + values.abs().max())).all()
    assert torch.allclose(density.weights.sum(1), torch.ones(3).double(), atol=1e-12)
    for field in (density.grid, density.density, density.band, density.nodes):
        assert torch.isfinite(field).all()
    assert (density.grid.diff() > 0).all()
    spacing = torch.gradient(density.grid)[0]
    assert abs((density.density * spacing).sum() - 1) < 0.01
    if family != "integers":  # rounding may add products there
        assert density.matvecs <= 2 + 3 * min(n, len(torch.unique(values.round(decimals=9))) + 1)


# known pairs


def test_known_eigenpairs_enter_exactly_and_the_rest_holds_none_of_them() -> None:
    values = hess(3000)
    A = diagonal(values)
    solution = eigsh(A, 12, which="LA", seed=0)
    density = spectral_density(A, num_probes=4, num_steps=40, pairs=solution, seed=0)
    top = values.sort(descending=True).values[:13]
    assert torch.allclose(density.values.flip(0), top[:12], atol=1e-7, rtol=0)
    assert (density.residuals < 1e-4).all()
    assert torch.allclose(density.weights.sum(1), torch.full((4,), (3000 - 12) / 3000).double(), atol=1e-12)
    assert density.nodes.max() < top[12] + 1e-6
    at = (top[1:12] + top[:11]) / 2
    estimate, (low, high) = density.cdf(at)
    assert torch.allclose(estimate, 1 - torch.arange(1, 12).double() / 3000, atol=1e-12)
    assert (low <= share(values, at) + 1e-15).all()
    assert (share(values, at) <= high + 1e-15).all()
    assert (high - low).max() < 1e-12
    assert abs((density.density * torch.gradient(density.grid)[0]).sum() - (3000 - 12) / 3000) < 0.01
    assert density.matvecs == 2 + 12 + 4 * 40


def test_pairs_known_to_their_residuals_leave_the_band_wide_enough() -> None:
    values = torch.cat([torch.tensor([1.0, 0.6]), torch.linspace(0, 0.1, 98)]).double()
    generator = torch.Generator().manual_seed(0)
    vectors = torch.eye(100).double()[:2] + 3e-4 * torch.randn(2, 100, generator=generator, dtype=torch.float64)
    many = spectral_density(
        aslinearoperator(lambda v: values * v, values),
        num_probes=120,
        num_steps=8,
        pairs=EigenPairs(values[:2], vectors, values[:2]),
        seed=0,
    )
    assert many.residuals.max() > 1e-4
    found = float(many.values[1])  # a Rayleigh quotient, and so a little below the eigenvalue at 1
    assert found < 1 - 1e-7
    at = torch.tensor([0.05, 0.3, 0.7, (1 + found) / 2, 1.01]).double()
    for one in groups(many, 4):
        low, high = one.cdf(at)[1]
        assert ((low <= share(values, at)) & (share(values, at) <= high)).all()


def test_vectors_of_another_matrix_are_refused() -> None:
    A, B = rotated(torch.linspace(0, 1, 30).double(), 0), rotated(torch.linspace(0, 1, 30).double(), 1)
    with pytest.raises(InputError, match="no eigenvectors of this matrix: residual"):
        spectral_density(A, pairs=eigsh(B, 3, seed=0), num_steps=5, seed=0)
    twice = EigenPairs(torch.ones(2), eigsh(A, 1, seed=0).vectors.expand(2, -1), torch.zeros(2))
    with pytest.raises(InputError, match="not orthogonal"):
        spectral_density(A, pairs=twice, num_steps=5, seed=0)


# invariances


def test_a_seed_gives_the_same_density_bitwise_and_leaves_the_global_random_state_alone() -> None:
    A = diagonal(hess(500))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (spectral_density(A, num_probes=3, num_steps=20, seed=7) for _ in range(2))
    other = spectral_density(A, num_probes=3, num_steps=20)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    for name in ("grid", "density", "band", "nodes", "weights"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.nodes, other.nodes)
    repeated = spectral_density(A, num_probes=3, num_steps=20, seed=other.seed)
    assert torch.equal(other.nodes, repeated.nodes)


def test_the_number_of_probes_that_advance_together_changes_the_passes_and_nothing_else() -> None:
    A = rotated(hess(300), 0)
    together = spectral_density(A, num_probes=5, num_steps=10, seed=0)
    apart = spectral_density(A, num_probes=5, num_steps=10, seed=0, block_size=2)
    assert together.passes == 12
    assert apart.passes == 32
    assert together.matvecs == apart.matvecs == 52
    assert torch.allclose(together.nodes, apart.nodes, atol=1e-12, rtol=0)


def test_scale_and_shift_carry_over() -> None:
    A = aslinearoperator(rotated(hess(200), 0))
    plain_one = spectral_density(A, num_probes=3, num_steps=15, seed=0)
    other = spectral_density((-3.0 * A).shift(2.0), num_probes=3, num_steps=15, seed=0)
    assert torch.allclose(other.nodes.flip(1), 2 - 3 * plain_one.nodes, atol=1e-10, rtol=0)
    assert torch.allclose(other.weights.flip(1), plain_one.weights, atol=1e-8, rtol=0)
    at = torch.linspace(-0.11, 1.1, 13).double()
    assert torch.allclose(other.cdf(2 - 3 * at)[0], 1 - plain_one.cdf(at)[0], atol=1e-8, rtol=0)
    width = plain_one.width
    left = plain_one.on(plain_one.grid, width=width)
    right = other.on(2 - 3 * plain_one.grid.flip(0), width=3 * width)
    assert torch.allclose(3 * right.density.flip(0), left.density, atol=1e-6, rtol=0)
    assert torch.allclose(3 * right.band.flip(1), left.band, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e200), (torch.float64, 1e-200), (torch.float32, 1e25)])
def test_extreme_scales_give_the_same_shape(dtype: torch.dtype, scale: float) -> None:
    A = rotated(spectrum("outliers", 60), 0).to(dtype)
    one = spectral_density(A, num_probes=2, num_steps=10, seed=0)
    far = spectral_density(scale * A, num_probes=2, num_steps=10, seed=0)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert torch.allclose(far.nodes / scale, one.nodes, atol=tolerance, rtol=0)
    assert torch.allclose(
        far.cdf(torch.tensor([0.02, 0.3]).double() * scale)[1], one.cdf([0.02, 0.3])[1], atol=1e-3, rtol=0
    )
    assert torch.isfinite(far.band).all()


TREES = {
    "dict": {"w": torch.zeros(5, 4), "b": torch.zeros(10)},
    "list": [torch.zeros(()), torch.zeros(29)],
    "named tuple": Layer(torch.zeros(5, 5), torch.zeros(5)),
    "nested": {"z": (torch.zeros(3), [torch.zeros(7)]), "a": torch.zeros(2, 10)},
}


@pytest.mark.parametrize("layout", TREES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trees_give_what_their_flat_vectors_give(layout: str, dtype: torch.dtype) -> None:
    like = tree.tree_map(lambda leaf: leaf.to(dtype), TREES[layout])
    matrix = rotated(spectrum("outliers", 30, seed=1), 0)
    A = on_tree(matrix.to(dtype), like)
    nested = spectral_density(A, num_probes=2, num_steps=8, seed=0, pairs=eigsh(A, 2, which="LA", seed=0))
    bare = spectral_density(matrix, num_probes=2, num_steps=8, seed=0, pairs=eigsh(matrix, 2, which="LA", seed=0))
    assert nested.nodes.dtype == torch.float64
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    assert torch.allclose(nested.nodes, bare.nodes, atol=tolerance, rtol=0)
    assert torch.allclose(nested.values, bare.values, atol=1e-5, rtol=0)


def test_other_libraries_operators_and_half_precision_leaves() -> None:
    matrix = rotated(torch.linspace(-1, 1, 40).double(), 0)
    foreign = scipy.sparse.linalg.aslinearoperator(matrix.numpy())
    exact = spectral_density(matrix, num_probes=2, num_steps=6, seed=0)
    found = spectral_density(foreign, num_probes=2, num_steps=6, seed=0)
    assert torch.allclose(found.nodes, exact.nodes, atol=1e-12, rtol=0)
    like = torch.zeros(40, dtype=torch.bfloat16)
    half = aslinearoperator(lambda v: (v.double() @ matrix).to(v.dtype), like)
    pairs = eigsh(half, 1, which="LA", tol=0.02, seed=0, throw=False)
    coarse = spectral_density(half, num_probes=2, num_steps=6, seed=0, pairs=pairs)
    assert abs(coarse.values[0] - 1) < 0.02
    assert coarse.noise > 1e-3


def test_no_remnant_of_known_pairs_grows_in_60_steps() -> None:
    values = torch.cat([torch.tensor([5.0]), torch.linspace(1, 2, 199)]).double()
    A = rotated(values, 0)
    _, u = torch.linalg.eigh(A)
    pairs = EigenPairs(values[:1], u.mT[-1:], values[:1])
    density = spectral_density(A, num_probes=2, num_steps=60, pairs=pairs, seed=0)
    carrying = density.nodes[density.weights > 0]
    assert carrying.min() > 1 - 1e-9  # the matrix in the complement maps the known vector to zero
    assert carrying.max() < 2 + 1e-9


def test_moving_to_another_grid_and_width() -> None:
    density = spectral_density(rotated(torch.linspace(-1, 1, 50).double(), 0), num_probes=2, num_steps=60, seed=0)
    fine = density.on(torch.linspace(-2, 2, 801), width=0.1)
    exact = (density.weights[:, :, None] * torch.exp(-((density.nodes[:, :, None] - fine.grid) ** 2) / 0.02)).sum(1)
    assert torch.allclose(fine.density, exact.mean(0) / (0.1 * math.sqrt(2 * math.pi)), atol=1e-12, rtol=0)
    assert fine.width == 0.1
    assert torch.equal(fine.nodes, density.nodes)
    logarithmic = density.on(threshold=0.01)
    assert logarithmic.grid[0] < -1
    assert logarithmic.threshold == 0.01
    assert abs(torch.trapezoid(logarithmic.density, logarithmic.grid) - 1) < 0.01
    for wrong in ({"width": 0.0}, {"width": math.nan}, {"threshold": -1.0}, {"grid": [0, 0, 1]}, {"grid": [[1.0]]}):
        with pytest.raises(InputError):
            density.on(**wrong)
    with pytest.raises(InputError, match="finite"):
        density.cdf([0.0, math.nan])


def test_it_prints_as_a_table_of_shares_with_bands() -> None:
    A = diagonal(hess(500))
    text = str(spectral_density(A, num_probes=2, num_steps=20, seed=3, pairs=eigsh(A, 2, which="LA", seed=0)))
    assert "2 eigenvalues known, from 0.5 to 1" in text
    assert "2 probes of 20 steps" in text
    assert "seed 3" in text
    assert any(line.lstrip().startswith("+0.000e+00") for line in text.splitlines())
    assert len(text.splitlines()) < 12


# what is refused


def test_bad_arguments_are_refused_before_the_first_product() -> None:
    A = aslinearoperator(never, torch.zeros(5))
    rows = EigenPairs(torch.zeros(5), torch.eye(5), torch.zeros(5))
    nan = EigenPairs(torch.zeros(1), torch.full((1, 5), torch.nan), torch.zeros(1))
    wrong: list[dict[str, Any]] = [
        {"num_probes": 0},
        {"num_probes": 2.5},
        {"num_steps": 1},
        {"num_steps": True},
        {"seed": -1},
        {"block_size": 0},
        {"pairs": 3},
        {"pairs": rows},
        {"pairs": nan},
    ]
    for arguments in wrong:
        with pytest.raises(InputError):
            spectral_density(A, **arguments)
    with pytest.raises(TreeError, match=r"pairs\.vectors"):
        spectral_density(A, pairs=EigenPairs(torch.zeros(1), torch.zeros(1, 4), torch.zeros(1)))
    with pytest.raises(TreeError):
        spectral_density(aslinearoperator(never, torch.zeros(0)))


def test_a_product_with_nan_is_named_by_its_step() -> None:
    values = torch.linspace(0, 1, 40).double()
    product = Counted(lambda v: values * v * (math.nan if product.calls == 2 + 3 * 4 + 2 else 1.0))
    with pytest.raises(NonFiniteError, match=r"step 5 of probe 2: product"):
        spectral_density(aslinearoperator(product, values), num_probes=3, num_steps=10, seed=0)


def test_an_asymmetric_operator_is_found_out() -> None:
    A = rotated(torch.linspace(0, 1, 30).double(), 0)
    A[3, 5] += 1e-5
    with pytest.raises(NotConverged, match=r"not symmetric: ⟨u, A v⟩ and ⟨v, A u⟩ differ by .* of ‖A‖"):
        spectral_density(aslinearoperator(lambda v: A @ v, A[0]), num_probes=2, num_steps=10, seed=0)


def test_inside_a_transform_it_names_the_pure_functions() -> None:
    with pytest.raises(TransformError, match=r"eigenfunc\.lanczos"):
        vmap(lambda v: spectral_density(torch.eye(3), num_probes=1).nodes + v)(torch.zeros(2))


def test_noise_in_the_products_is_told_and_widens_the_band() -> None:
    values = torch.tensor([0.0] * 20 + [1.0] * 20).double()
    generator = torch.Generator().manual_seed(0)

    def product(v: Tensor) -> Tensor:
        return values * v + 1e-4 * v.norm() * torch.randn(40, generator=generator, dtype=torch.float64) / 40**0.5

    density = spectral_density(aslinearoperator(product, values), num_probes=4, num_steps=8, seed=0)
    assert density.noise > 1e-4
    low, high = density.cdf(torch.tensor([0.0, 0.5, 1.0]))[1]
    assert ((low <= torch.tensor([0.5, 0.5, 1.0])) & (torch.tensor([0.5, 0.5, 1.0]) <= high)).all()
    assert low[0] == 0
