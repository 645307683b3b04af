"""Runs that are stopped anywhere and taken up again: the same bits at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from eigenfunc import Batches, checkpoint, completeness, eigsh, functional_loss, hessian
from eigenfunc.certificate import Products
from eigenfunc.checkpoint import Checkpoint
from eigenfunc.errors import NotConverged
from eigenfunc.plan import plan_for
from eigenfunc.thick_restart import Run
from tests.helpers import rotated
from tests.stopped import assert_same, diagonal, quick_disk, spectrum, stopped

__all__ = ["quick_disk"]


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "restarts": ("bulk", torch.float64, {"k": 4, "which": "LA", "basis_size": 10}),
    "both ends": ("bulk", torch.float64, {"k": (2, 1), "which": "BE", "basis_size": 14, "tol": 1e-6}),
    "probes that find something": ("copies", torch.float64, {"k": 4, "which": "LM", "basis_size": 12, "tol": 1e-7}),
    "blocks": ("copies", torch.float32, {"k": 4, "basis_size": 14, "block_size": 3}),
    "half-precision basis": (
        "copies",
        torch.float32,
        {"k": 2, "basis_size": 14, "tol": 1e-2, "basis_dtype": torch.bfloat16},
    ),
    "breakdown": ("few", torch.float64, {"k": 3, "which": "LA", "basis_size": 30}),
    "blocks that break down": ("few", torch.float32, {"k": 3, "which": "SA", "basis_size": 20, "block_size": 4}),
    "zero": ("zero", torch.float64, {"k": 2, "which": "SA", "basis_size": 10}),
    "scaled": ("huge", torch.float64, {"k": 3, "which": "LM", "basis_size": 12}),
    "whole space": ("bulk", torch.float64, {"k": 3, "which": "SA", "basis_size": 100}),
    "out of budget": (
        "bulk",
        torch.float64,
        {"k": 3, "which": "SA", "basis_size": 10, "tol": 1e-12, "max_matvecs": 40},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_anywhere_ends_like_one_that_was_not(name: str, tmp_path: Path) -> None:
    kind, dtype, asked = CASES[name]
    A, path = diagonal(spectrum(kind, dtype=dtype)), tmp_path / "run"
    truth = eigsh(A, **asked, seed=3, throw=False)
    halfway = 0
    for call in range(1, truth.stats.passes, max(1, truth.stats.passes // 14)):
        path.unlink(missing_ok=True)
        saved = stopped(A, path, call, **asked, seed=3)
        if saved is None:
            break
        halfway += "probe" in saved.facts
        assert_same(eigsh(A, **asked, checkpoint=path, throw=False), truth)
    assert_same(eigsh(A, **asked, checkpoint=path, throw=False), truth)  # from a file that a finished run left
    assert halfway > 0 or name in ("whole space", "zero", "breakdown", "blocks that break down", "scaled")


@given(data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_run_stopped_again_and_again_ends_like_one_that_was_not(data: st.DataObject, seed: int) -> None:
    kind, dtype, asked = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    A = diagonal(spectrum(kind, dtype=dtype))
    truth = eigsh(A, **asked, seed=seed, throw=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        for _ in range(10):
            call = data.draw(st.integers(1, max(2, truth.stats.passes // 3)))
            if stopped(A, path, call, **asked, seed=seed) is None:
                break
        assert_same(eigsh(A, **asked, checkpoint=path, throw=False), truth)


def test_a_search_for_missing_values_goes_on_in_any_of_its_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completeness._Evidence, "drowned", lambda self, chain: chain.length >= 4)
    n = 60
    values = torch.linspace(-1, 0.999, n).double()
    A, plan = diagonal(values), plan_for(1, "LA", 1e-6, n)
    basis = torch.eye(n).double()[-3:].flip(0)
    span = completeness.Span(basis[:1], basis[1:2], values[-1:], torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    slack = torch.full((2, 1), 1e-9, dtype=torch.float64)

    def search(products: Products, keep: Any = lambda halfway: None, halfway: Any = None) -> completeness.Finding:
        g = torch.Generator().manual_seed(0)
        return completeness.search(plan, products, span, values[-1:], slack, 1.0, g, 50, keep, halfway)

    cuts: list[completeness.Halfway] = []
    whole = Products(A)
    truth = search(whole, lambda halfway: cuts.append(halfway()))
    assert {cut.chain for cut in cuts} == {0, 1, 2}
    for cut in cuts:
        products = Products(A)
        finding = search(products, halfway=cut)
        assert finding.limits == truth.limits
        assert (products.matvecs, products.passes) == (whole.matvecs, whole.passes)
        assert (finding.direction is None) == (truth.direction is None)
        assert finding.direction is None or torch.equal(finding.direction, truth.direction)


def test_more_products_may_be_spent_when_a_run_goes_on(tmp_path: Path) -> None:
    A, path = diagonal(spectrum("bulk")), tmp_path / "run"
    asked: dict[str, Any] = {"k": 3, "which": "SA", "basis_size": 12, "tol": 1e-9, "seed": 0}
    with pytest.raises(NotConverged):
        eigsh(A, **asked, max_matvecs=40, checkpoint=Checkpoint(path, minutes=0))
    truth = eigsh(A, **asked)
    assert_same(eigsh(A, **asked, checkpoint=path), truth)
    probed = 0
    for call in range(36, 49, 4):  # the budget is spent, and the probe that comes then is of no use with a larger one
        path.unlink()
        saved = stopped(A, path, call, **asked, max_matvecs=40)
        assert saved is not None
        probed += "probe" in saved.facts
        assert_same(eigsh(A, **asked, checkpoint=path), truth)
    assert probed > 0


def test_nothing_that_a_run_knows_is_forgotten(tmp_path: Path) -> None:
    A, plan, path = diagonal(spectrum("bulk")), plan_for(3, "LA", 1e-6, 100, basis_size=20), tmp_path / "run"

    def made(seed: int) -> Run:
        run = Run(plan, Products(A), torch.Generator().manual_seed(seed), None)
        run.start(*run.products.calibrate(run.generator))
        return run

    run, other = made(0), made(1)
    for _ in range(7):
        run.advance()
    run.look()
    run.restarts, run.rounds, run.stop, run.verification, run.strictness, run.asym = 3, 2, 77, 5, 0.25, 1e-9
    run.limits = completeness.Limits({1: 0.1 + 0.2, -1: float("inf")}, True)
    run.products.scale, run.products.noise, run.products.passes = 2.0**-40, 1e-15, 99
    checkpoint.write(path, run.snapshot())
    saved = checkpoint.read(path)
    assert saved is not None
    other.restore(saved)
    apart = ("state", "products", "generator", "plan", "bar", "journal")
    kept = [{k: v for k, v in vars(each).items() if k not in apart} for each in (run, other)]
    assert kept[0] == kept[1]
    plain = [{k: v for k, v in vars(each.products).items() if isinstance(v, (int, float))} for each in (run, other)]
    assert plain[0] == plain[1]
    assert torch.equal(run.generator.get_state(), other.generator.get_state())
    for name in run.state._fields:
        assert torch.equal(getattr(run.state, name), getattr(other.state, name)), name


@pytest.mark.parametrize("block_size", [1, 3])
def test_a_dense_matrix_goes_on_bit_for_bit(tmp_path: Path, block_size: int) -> None:
    A = rotated(spectrum("bulk", 60), 0).float()
    A, path = (A + A.mT) / 2, tmp_path / "run"
    asked: dict[str, Any] = {"k": 4, "which": "BE", "basis_size": 16, "seed": 2, "block_size": block_size}
    truth = eigsh(A, **asked)
    assert stopped(A, path, 21 // block_size, **asked) is not None
    assert_same(eigsh(A, **asked, checkpoint=str(path)), truth)


def test_what_rode_along_with_a_proof_is_not_multiplied_again(tmp_path: Path) -> None:
    """The products of the certificate, made in the first pass of the proof, are in what is saved from then on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    loss, params = functional_loss(model, nn.functional.cross_entropy)
    X, y = torch.randn(90, 6).double(), torch.randint(0, 3, (90,))
    A, path = (
        hessian(loss, params, Batches(list(zip(X.split(30), y.split(30), strict=True))), cache=0),
        tmp_path / "run",
    )
    asked: dict[str, Any] = {"k": 3, "block_size": 4, "basis_size": 30, "seed": 1}
    truth = eigsh(A, **asked)
    with_images = []
    for call in range(1, truth.stats.passes):
        path.unlink(missing_ok=True)
        saved = stopped(A, path, call, **asked)
        if saved is None or "probe" not in saved.facts:
            continue
        if saved.facts["probe"]["alphas"]:
            with_images.append(call)
            assert saved.tensors["riders"].shape == (3, A.size)
        else:
            assert "riders" not in saved.tensors
        assert_same(eigsh(A, **asked, checkpoint=path), truth)
    assert len(with_images) >= 1
